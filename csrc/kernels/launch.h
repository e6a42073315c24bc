// Arguments of the kernels: one struct per operation, the same for every implementation. Pointers are to memory of the
// device that runs the kernel; nothing is owned.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "common/doorbell.h"
#include "engine/descriptor_ring.h"
#include "kernels/executor.h"
#include "kernels/plan.h"
#include "proto/chunk.h"
#include "proto/region.h"

namespace moe_efa::kernels {

// Counters of one rank that outlive a call. A failed call leaves them undefined: its group is dead (I6).
struct RankState {
  explicit RankState(const proto::Topology& topology)
      : dispatch_sent(topology.num_nodes(), 0),
        dispatch_seen(std::size_t{topology.node_size} * topology.num_nodes(), 0),
        combine_seen(std::size_t{topology.node_size} * topology.num_nodes(), 0),
        combine_received(topology.num_nodes(), 0) {}

  std::uint64_t epoch[proto::kNumPhases] = {0, 0};  // next epoch of the phase
  std::uint64_t call = 0;                           // next call
  std::vector<std::uint64_t> dispatch_sent;         // [node]: chunks written into the rings of that node
  std::vector<std::uint64_t> dispatch_seen;         // [local * nodes + node]: chunks of that ring so far
  std::vector<std::uint64_t> combine_seen;          // [local * nodes + node]: chunks published for that source
  std::vector<std::uint64_t> combine_received;      // [node]: chunks received from that node
};

// What a call runs on.
struct CallContext {
  const proto::NodeView& view;
  RankState& state;
  engine::DescriptorRing* descriptors;  // null where there is one node
  Executor& executor;
  std::uint32_t num_nics = 1;
  common::Doorbell* doorbell = nullptr;  // null: nobody sleeps

  void ring(std::uint32_t local_rank) const {
    if (doorbell != nullptr) doorbell->ring(local_rank);
  }
  void ring_all() const {
    if (doorbell != nullptr) doorbell->ring_all();
  }
};

struct DispatchArgs {
  const void* x = nullptr;  // [num_tokens, hidden_size]
  proto::DType x_dtype = proto::DType::kBf16;
  proto::DType wire_dtype = proto::DType::kBf16;
  proto::DType out_dtype = proto::DType::kBf16;  // x_dtype, or FP8 where the wire's dtype is FP8
  std::shared_ptr<Plan> plan;                    // fresh (from build_send_plan) or complete (a replay)
};

struct DispatchOutput {
  void* x = nullptr;         // [rows, hidden_size] in out_dtype
  float* weights = nullptr;  // [rows]; null in a replay
  float* scales = nullptr;   // [rows, fp8_blocks(hidden_size)]; of FP8 rows only
  bool stream = false;       // x is larger than what the caches could keep of it
};

struct CombineArgs {
  const void* y = nullptr;  // [rows, hidden_size]
  proto::DType y_dtype = proto::DType::kBf16;
  proto::DType wire_dtype = proto::DType::kBf16;
  std::shared_ptr<const Plan> plan;
  const float* weights = nullptr;       // [rows]; null: plain sum
  const float* weight_grads = nullptr;  // [rows]; null: none travel
  void* out = nullptr;                  // [num_tokens, hidden_size] in y_dtype
  float* topk_weight_grads = nullptr;   // [num_tokens, top_k]; with weight_grads
};

// Whom a call waits for, for deadlines and warnings (I5).
struct Waiting {
  int rank = -1;
  std::int64_t chunk = -1;
  const char* what = "";
  bool absent = false;  // it has not entered the call; otherwise it may itself be waiting for another
};

}  // namespace moe_efa::kernels
