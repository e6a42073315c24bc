// Plan: the routing facts of one dispatch, kept by the handle for combine, backward and replays (I8). It owns no slot
// and no payload: 8 bytes per received row, 4 per row sent, one mask (a byte for nodes of 8) per row forwarded.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "proto/chunk.h"
#include "proto/topology.h"

namespace moe_efa::kernels {

namespace cuda {
struct PlanView;
}

// Rows of one source for one node, and how they are cut.
struct RingFacts {
  std::uint32_t rows = 0;
  std::uint32_t rows_per_chunk = 0;
  std::uint32_t num_chunks = 0;

  constexpr std::uint32_t first_row(std::uint32_t chunk) const { return chunk * rows_per_chunk; }
  constexpr std::uint32_t rows_in(std::uint32_t chunk) const {
    std::uint32_t first = first_row(chunk);
    return rows - first < rows_per_chunk ? rows - first : rows_per_chunk;
  }
  bool operator==(const RingFacts&) const = default;
};

// What this rank sends to one node: rows in token order. Entries live only until they are packed.
struct SendPlan {
  RingFacts facts;
  std::vector<std::uint32_t> row_token;
  std::vector<std::uint32_t> entry_begin;  // [rows + 1]
  std::vector<proto::RowEntry> entries;
  std::vector<std::uint32_t> expert_counts;  // [experts per node]
};

// One (row, own expert): where the row of a chunk goes in the expert-major output.
struct PullEntry {
  static constexpr std::uint32_t kTopKBits = 6;
  std::uint32_t row_and_topk;  // row within the chunk << 6 | top-k position
  std::uint32_t out_row;

  constexpr std::uint32_t row() const { return row_and_topk >> kTopKBits; }
  constexpr std::uint32_t topk_pos() const { return row_and_topk & ((1u << kTopKBits) - 1); }
};
static_assert(sizeof(PullEntry) == 8 && proto::kMaxTopK == 1u << PullEntry::kTopKBits);

struct Plan {
  std::uint64_t plan_id = 0;
  std::uint32_t num_tokens = 0;
  std::uint32_t expert_alignment = 1;
  bool complete = false;  // its dispatch has finished

  std::vector<SendPlan> send;                              // [num_nodes]
  std::vector<RingFacts> rings;                            // [node_size * num_nodes]: source (node, local rank)
  std::vector<std::vector<std::vector<PullEntry>>> pulls;  // [node_size * num_nodes][chunk], in row order
  std::uint32_t mask_bytes = 1;                            // ceil(node_size / 8)
  std::vector<std::vector<std::uint8_t>> masks;            // [num_nodes][row * mask_bytes]: mates that own experts of
                                                           // the row, of the sources that this rank forwards for
  std::vector<std::int64_t> tokens_per_expert;             // [experts_per_rank]
  std::vector<std::int64_t> offsets;                       // [experts_per_rank + 1], padded starts

  // Of a rank with a device: where its arrays are there; here are only facts, counts and offsets then.
  std::shared_ptr<cuda::PlanView> device_view;

  // Static mode: the output has `capacity` rows, whatever comes; a row whose place is not below usable_rows() is lost,
  // and tokens_per_expert and offsets are those of the rows that are not.
  static constexpr std::int64_t kExact = -1;
  std::int64_t capacity = kExact;
  std::vector<std::vector<std::uint64_t>> chunk_overflow;  // [num_nodes][chunk], of the sources that this rank forwards
                                                           // for: 0, or the capacity that the mate which lost rows of
                                                           // the chunk needed. Empty: no mate lost any
  std::shared_ptr<std::int64_t> overflow;  // for the user: 0, or the capacity that this rank's tokens, or its experts,
                                           // needed and some rank did not have. It only grows. With a device_view,
                                           // whose word is the user's, what is known of the experts alone

  bool is_static() const { return capacity != kExact; }
  std::int64_t usable_rows() const { return is_static() ? capacity - capacity % expert_alignment : INT64_MAX; }
  std::uint64_t overflow_of(std::uint32_t node, std::uint32_t chunk) const {
    return chunk_overflow.empty() ? 0 : chunk_overflow[node][chunk];
  }
  void raise_overflow(std::uint64_t required) const {  // one writer at a time; readers may look at any moment
    auto value = static_cast<std::int64_t>(required);
    if (value > __atomic_load_n(overflow.get(), __ATOMIC_RELAXED)) {
      __atomic_store_n(overflow.get(), value, __ATOMIC_RELEASE);
    }
  }

  void set_mask(std::uint32_t node, std::uint32_t row, std::uint64_t mask) {
    for (std::uint32_t i = 0; i < mask_bytes; ++i) {
      masks[node][std::size_t{row} * mask_bytes + i] = static_cast<std::uint8_t>(mask >> (8 * i));
    }
  }
  std::uint64_t mask(std::uint32_t node, std::uint32_t row) const {
    std::uint64_t mask = 0;
    for (std::uint32_t i = 0; i < mask_bytes; ++i) {
      mask |= std::uint64_t{masks[node][std::size_t{row} * mask_bytes + i]} << (8 * i);
    }
    return mask;
  }
  std::int64_t rows() const { return is_static() ? capacity : offsets.empty() ? 0 : offsets.back(); }

  std::size_t nbytes() const {
    std::size_t total = 0;
    for (const SendPlan& node : send)
      total += node.row_token.size() * 4 + node.entries.size() * sizeof(proto::RowEntry);
    for (const auto& ring : pulls) {
      for (const auto& chunk : ring) total += chunk.size() * sizeof(PullEntry);
    }
    for (const auto& mask : masks) total += mask.size();
    for (const auto& node : chunk_overflow) total += node.size() * sizeof(std::uint64_t);
    return total;
  }
};

inline constexpr std::uint32_t kMaxNodeSize = 64;  // bits of a mask

}  // namespace moe_efa::kernels
