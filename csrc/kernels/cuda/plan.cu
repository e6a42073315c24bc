#include "kernels/cuda/plan.h"

#include "kernels/cuda/cuda_block.h"
#include "kernels/cuda/cuda_launch.h"
#include "kernels/cuda/plan_body.h"

namespace moe_efa::kernels::cuda {

namespace {

__global__ void __launch_bounds__(kPlanThreads, 1) plan_kernel(const __grid_constant__ PlanArgs args) {
  __shared__ Tickets shared;
  extern __shared__ std::uint32_t words[];
  CudaBlock block;
  plan_body(block, args, shared, words);
}

}  // namespace

const void* plan_kernel_entry() { return reinterpret_cast<const void*>(plan_kernel); }

void launch_plan(const PlanArgs& args, void* stream) {
  std::uint32_t warps = kPlanThreads / kWarpSize;
  while (warps > 1 && plan_shared_words(args.config, warps) > kPlanSharedWords) warps /= 2;
  if (!can_plan(args.config)) {
    std::ostringstream text;
    text << "plan on a GPU: top_k " << args.config.top_k << " with " << plan_columns(args.config)
         << " counters (experts + 2 nodes); supported are top_k up to " << kWarpSize << " with up to "
         << most_plan_columns(args.config.num_nodes) << " counters";
    throw common::StatusError({common::StatusCode::kConfig, -1, -1, -1, -1, text.str()});
  }
  launch_resident(plan_kernel, kPlanBlocks, warps * kWarpSize,
                  plan_shared_words(args.config, warps) * sizeof(std::uint32_t), stream, args);
}

}  // namespace moe_efa::kernels::cuda
