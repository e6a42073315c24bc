// plan: which tokens go to which node, in token order, and where each (token, expert) stands among its expert's rows:
// what cpu/plan.h makes, in one launch and without the host. Stable and deterministic: nothing depends on timing (I3).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/fault.h"
#include "kernels/cuda/plan_view.h"
#include "proto/region.h"

namespace moe_efa::kernels::cuda {

struct PlanArgs {
  proto::LayoutConfig config;
  const std::int64_t* topk_idx;  // [num_tokens, top_k], -1 = none
  const float* topk_weights;     // [num_tokens, top_k]; entries of -1 slots are not read
  std::uint32_t num_tokens;
  std::uint32_t num_nics;
  SendView* send;                // [num_nodes]
  std::uint32_t* row_token;      // [plan_rows]: of all nodes
  std::uint32_t* entry_begin;    // [plan_rows + num_nodes]
  proto::RowEntry* entries;      // [num_tokens * top_k]
  std::uint32_t* expert_counts;  // [num_experts]
  std::uint32_t* columns;        // [plan_warps * plan_columns]: for the kernel's own use
  bool recorded;                 // in a graph: nothing happens behind a fault, as where its gate was not passed
  Watch watch;                   // an id outside [-1, num_experts) is a fault, and taken for -1
};

inline constexpr std::uint32_t kPlanThreads = 256;
inline constexpr std::uint32_t kPlanBlocks = 16;  // at 4096 tokens a warp has 32 of them
inline constexpr std::uint32_t kPlanSharedWords =
    12 * 1024 - 16;  // what a launch gets without asking, less its Tickets

// What each warp counts: rows of every expert, rows and entries of every node.
constexpr std::uint32_t plan_columns(const proto::LayoutConfig& config) {
  return config.experts_per_rank * config.node_size * config.num_nodes + 2 * config.num_nodes;
}
constexpr std::uint32_t plan_shared_words(const proto::LayoutConfig& config, std::uint32_t warps) {
  return warps * plan_columns(config) + 4 * config.num_nodes;
}
// Whether the kernel's counters have room, for one warp at least.
constexpr std::uint32_t most_plan_columns(std::uint32_t num_nodes) { return kPlanSharedWords - 4 * num_nodes; }
constexpr bool can_plan(const proto::LayoutConfig& config) {
  return config.top_k <= kWarpSize && plan_columns(config) <= most_plan_columns(config.num_nodes);
}
// The most rows that all nodes together can get.
constexpr std::size_t plan_rows(const proto::LayoutConfig& config, std::uint32_t num_tokens) {
  return std::size_t{num_tokens} * (config.top_k < config.num_nodes ? config.top_k : config.num_nodes);
}
// The most chunks that one node can get: for PlanView::send_chunks where the host does not know the plan.
constexpr std::uint32_t most_send_chunks(const proto::LayoutConfig& config, std::uint32_t num_tokens,
                                         std::uint32_t num_nics) {
  std::uint32_t whole = common::ceil_div(num_tokens, config.chunk_rows);
  return whole > 2 * num_nics ? whole : 2 * num_nics;
}

// A resident grid of kPlanBlocks. Throws StatusError naming the call that failed, and for more than 32 experts of a
// token or more experts than its counters have room for.
void launch_plan(const PlanArgs& args, void* stream);

const void* plan_kernel_entry();  // for loading it before it is launched

}  // namespace moe_efa::kernels::cuda
