// State: what the calls of one rank share on its device: flags, counters and copies' memory, made once, so that no call
// allocates (I9). Calls of a phase use it one after the other.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <vector>

#include "common/atomic.h"
#include "engine/descriptor_ring.h"
#include "kernels/cuda/combine.h"
#include "kernels/cuda/fault.h"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/pull.h"
#include "kernels/cuda/ready_queue.h"
#include "kernels/device.h"
#include "proto/region.h"
#include "proto/region_memory.h"

namespace moe_efa::kernels::device {

struct StateConfig {
  std::uint32_t max_tokens = 0;  // of any rank
  std::uint32_t num_nics = 1;
  double timeout_s = 600;  // of every wait of a kernel
};

// For destructors and after errors: a device that is broken says so at every call.
template <typename Action>
void quietly(const Action& action) noexcept {
  try {
    action();
  } catch (const std::exception&) {
  }
}

// How many blocks the grids of a call have.
struct GridSizes {
  std::uint32_t pack, pull_and_rest, pack_rest;  // of pull_and_rest, so many pack what is left
  cuda::CombineBlocks combine;
};

// Of one call that a graph has captured: see recording.h.
struct GateWords {
  static constexpr std::uint32_t kPoints = 4;
  std::uint64_t knocked[kPoints], opened[kPoints];
};

// Of one phase.
struct PhaseState {
  std::byte* staging = nullptr;    // host: what is copied to the device
  std::byte* arguments = nullptr;  // device: where most of it goes
  std::size_t staging_bytes = 0, arguments_bytes = 0;
  cuda::GridState* grids = nullptr;         // [3], device
  std::uint32_t* faults = nullptr;          // device
  cuda::Fault* fault = nullptr;             // host
  std::uint32_t* words = nullptr;           // device: zeros between calls
  cuda::ChunkReady* ready_words = nullptr;  // host
  std::unique_ptr<cuda::ReadyQueue> ready;  // see State::send
};

// What a call sends to a node: chunks from `first_seq` on.
struct Sending {
  std::uint32_t node;
  std::uint64_t first_seq;
  std::uint32_t num_chunks;
};

class State {
 public:
  // `view`: as the host sees the node. `memory` [node_size]: the same as kernels see it.
  State(std::shared_ptr<Device> device, const proto::NodeView& view, const std::vector<proto::RegionMemory>& memory,
        const StateConfig& config);
  ~State();
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  Device& device() { return *device_; }
  const StateConfig& config() const { return config_; }
  const proto::NodeView& view() const { return device_view_; }  // for kernels
  PhaseState& phase(proto::Phase phase) { return phases_[static_cast<int>(phase)]; }
  GridSizes grids(bool alone) const;  // alone: nothing else runs beside the call
  cuda::Watch watch(proto::Phase phase, std::uint32_t grid);
  // Throws what a kernel has found.
  void check(proto::Phase phase) const;
  // Every grid leaves soon, and its call stays unfinished. No call of the device, which might wait for them.
  void stop() { common::store_release(stop_, 1); }

  // From here on what kernels pack for an epoch becomes descriptors, behind those that `announce` pushes. This and
  // feed() are the descriptors' producers, on any thread, and none of them calls the device: who holds up chunks holds
  // up all ranks.
  template <typename Announce>
  void send(proto::Phase phase, std::uint64_t epoch, const std::vector<Sending>& sending, const Announce& announce) {
    std::lock_guard lock(ready_mutex_);
    announce();
    for (const Sending& to : sending) {
      this->phase(phase).ready->expect(to.node, epoch, to.first_seq, to.num_chunks);
    }
  }
  bool feed(engine::DescriptorRing* descriptors);  // true when anything moved
  bool all_fed(proto::Phase phase);

  // Words of a phase (device), in order.
  std::uint32_t most_chunks() const { return most_chunks_; }  // to one node, or of one ring
  std::uint32_t num_rings() const;
  // What plan makes and only the pack of the same call reads (device).
  struct SendScratch {
    std::uint32_t* entry_begin;
    proto::RowEntry* entries;
    std::uint32_t* expert_counts;  // [num_experts]
    std::uint32_t* columns;
  };
  const SendScratch& scratch() const { return scratch_; }
  // Words of their own for one more captured call: on the host, and the count of its replays on the device. From the
  // first one on this object has to outlive every graph.
  struct Gates {
    GateWords* words;
    std::uint64_t* run;
  };
  Gates take_gates();
  bool has_gates() const { return gates_taken_; }
  // Where sizes come back to the host: SendView [num_nodes] | uint32 [num_experts].
  std::byte* sizes() { return sizes_; }

 private:
  static constexpr std::uint32_t kGatesAtOnce = 64;  // more are allocated for more captured calls

  void add_gates();

  template <typename T>
  T* take_device(std::size_t count);
  template <typename T>
  T* take_host(std::size_t count);

  std::shared_ptr<Device> device_;
  StateConfig config_;
  proto::NodeView device_view_;
  std::uint32_t most_chunks_;
  std::vector<void*> device_memory_, host_memory_;
  PhaseState phases_[proto::kNumPhases];
  std::mutex ready_mutex_;
  std::uint64_t* stop_ = nullptr;  // host
  SendScratch scratch_{};
  Gates gates_{};
  std::uint32_t gates_left_ = 0;
  bool gates_taken_ = false;
  std::byte* sizes_ = nullptr;
};

}  // namespace moe_efa::kernels::device
