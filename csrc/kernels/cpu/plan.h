// plan: which tokens go to which node, in token order, and where each (token, expert) stands among its expert's rows.
// Stable and deterministic: positions depend on the routing alone (I3).
#pragma once

#include <cstdint>
#include <memory>

#include "kernels/plan.h"
#include "proto/region.h"

namespace moe_efa::kernels::cpu {

struct PlanArgs {
  const std::int64_t* topk_idx = nullptr;  // [num_tokens, top_k], -1 = none
  const float* topk_weights = nullptr;     // [num_tokens, top_k]; entries of -1 slots are not read
  std::uint32_t num_tokens = 0;
  std::uint32_t expert_alignment = 1;
  std::uint32_t num_nics = 1;
  std::int64_t capacity = Plan::kExact;  // rows of the output in static mode
};

// Throws StatusError(kInvalid) on an expert id outside [-1, num_experts); nothing has been sent then (I17).
std::shared_ptr<Plan> build_send_plan(const PlanArgs& args, const proto::NodeView& view);

}  // namespace moe_efa::kernels::cpu
