// PlanView: a Plan as flat arrays that a kernel can read, and FlatPlan, which lays them out in one block of bytes so
// that one copy brings a plan to a device. Pointers are to memory of the device that runs the kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/plan.h"

namespace moe_efa::kernels::cuda {

// What is sent to one node. Entries are of a fresh dispatch only.
struct SendView {
  RingFacts facts;
  const std::uint32_t* row_token;    // [rows]
  const std::uint32_t* entry_begin;  // [rows + 1]
  const proto::RowEntry* entries;
};

// What one source sends to this node, and this rank's part of it. Chunks of all rings are numbered through.
struct RingView {
  RingFacts facts;
  std::uint32_t first_chunk;
  std::uint32_t first_pull;  // a fresh dispatch fills [first_pull, first_pull + num_pulls) with its chunks in any order
  std::uint32_t num_pulls;
};

struct PlanView {
  std::uint32_t num_tokens;
  std::uint32_t num_nodes;
  std::uint32_t num_rings;
  std::uint32_t num_chunks;  // of all rings
  std::uint32_t mask_bytes;
  std::uint32_t send_chunks;        // the most to one node
  std::uint32_t send_chunk_rows;    // the most in one chunk
  std::uint32_t ring_chunks;        // the most of one ring
  const SendView* send;             // [num_nodes]
  const RingView* rings;            // [node_size * num_nodes]
  std::uint32_t* pull_begin;        // [num_chunks]
  std::uint32_t* pull_count;        // [num_chunks]
  PullEntry* pulls;                 // of each chunk in row order
  const std::uint32_t* first_mask;  // [num_nodes]: bytes
  std::uint8_t* masks;
  // Of static mode, otherwise null.
  std::uint64_t* overflow;        // Plan::overflow: kernels raise it, and the user reads it at any moment
  std::uint64_t* chunk_overflow;  // [num_nodes * ring_chunks]: Plan::chunk_overflow
};

// Which of this rank's rows a mate has experts for: Plan::mask.
MOE_EFA_HOST_DEVICE inline std::uint64_t mask_of(const PlanView& plan, std::uint32_t node, std::uint32_t row) {
  const std::uint8_t* bytes = plan.masks + plan.first_mask[node] + std::size_t{row} * plan.mask_bytes;
  std::uint64_t mask = 0;
  for (std::uint32_t i = 0; i < plan.mask_bytes; ++i) mask |= std::uint64_t{bytes[i]} << (8 * i);
  return mask;
}

// Of a chunk of the source (node, own local rank): Plan::overflow_of.
MOE_EFA_HOST_DEVICE inline std::uint64_t overflow_of(const PlanView& plan, std::uint32_t node, std::uint32_t chunk) {
  return plan.chunk_overflow == nullptr ? 0 : plan.chunk_overflow[std::size_t{node} * plan.ring_chunks + chunk];
}

// The arrays of `plan`, which may be a send plan (nothing to pull yet), a plan whose sizes are known but which pulled
// nothing (num_pulls of each ring are given), or complete.
class FlatPlan {
 public:
  explicit FlatPlan(const Plan& plan, const std::vector<std::uint32_t>& num_pulls = {});

  const std::vector<std::byte>& bytes() const { return bytes_; }
  // For bytes() copied to `base`, which is aligned to 16 bytes. Call place() before the copy: the bytes hold addresses.
  PlanView place(std::byte* base);

 private:
  std::size_t take(std::size_t bytes);
  template <typename T>
  std::size_t take(const std::vector<T>& values);

  std::vector<std::byte> bytes_;
  PlanView view_{};
  std::vector<SendView> send_;
  std::vector<RingView> rings_;
  std::vector<std::size_t> send_offsets_;  // of row_token, entry_begin, entries for each node
  std::size_t send_at_ = 0, rings_at_ = 0, pull_begin_at_ = 0, pull_count_at_ = 0, pulls_at_ = 0, first_mask_at_ = 0,
              masks_at_ = 0, overflow_at_ = 0, chunk_overflow_at_ = 0;
};

// The inverse, for what a fresh dispatch has filled in: pulls, masks and chunk_overflow of a plan whose rings are
// known.
void read_back(const PlanView& view, Plan* plan);

}  // namespace moe_efa::kernels::cuda
