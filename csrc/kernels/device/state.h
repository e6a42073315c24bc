// State: what the calls of one rank share on its device: flags, counters and copies' memory, made once, so that no call
// allocates (I9). Calls of a phase use it one after the other.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <vector>

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
  std::uint32_t pack, pack_rest, pull;
  cuda::CombineBlocks combine;
};

// Of one phase.
struct PhaseState {
  std::byte* staging = nullptr;    // host: what is copied to the device
  std::byte* arguments = nullptr;  // device: where most of it goes
  std::size_t staging_bytes = 0, arguments_bytes = 0;
  cuda::GridState* grids = nullptr;  // [3], device
  std::uint32_t* faults = nullptr;   // device
  cuda::Fault* fault = nullptr;      // host
  std::uint32_t* words = nullptr;    // device: zeros between calls
  std::unique_ptr<cuda::ReadyQueue> ready;
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
  // Every grid leaves soon, and its call stays unfinished. Neither throws: they are for the time after an error.
  void stop() noexcept;
  void drain() noexcept;  // until no kernel runs

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
  // Where sizes come back to the host: SendView [num_nodes] | uint32 [num_experts].
  std::byte* sizes() { return sizes_; }

 private:
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
  SendScratch scratch_{};
  std::byte* sizes_ = nullptr;
};

}  // namespace moe_efa::kernels::device
