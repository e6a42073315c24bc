// The launchers of the CUDA kernels on fibers and host threads, so that the shim and all that calls it run without a
// GPU. Grids are smaller than those asked for; results are the same for any.
#include <algorithm>

#include "emulated_block.h"
#include "kernels/cuda/combine_body.h"
#include "kernels/cuda/pack_body.h"
#include "kernels/cuda/plan_body.h"
#include "kernels/cuda/pull_body.h"
#include "waits.h"

namespace moe_efa::kernels::cuda {

namespace {

using testing::EmulatedBlock;
using testing::run_grid;

constexpr std::uint32_t kMostBlocks = 2, kThreads = 64;

std::uint32_t fewer(std::uint32_t blocks) { return std::min(blocks, kMostBlocks); }

struct PlanShared {
  Tickets tickets;
  std::uint32_t words[kPlanSharedWords];
};

}  // namespace

void launch_plan(const PlanArgs& args, void*) {
  run_grid<PlanShared>(kMostBlocks, kThreads, 1, [&](EmulatedBlock& block, PlanShared& shared) {
    plan_body(block, args, shared.tickets, shared.words);
  });
}

void launch_pack(const PackArgs& args, std::uint32_t num_blocks, void*) {
  std::uint32_t blocks = fewer(num_blocks);
  run_grid<Tickets>(blocks, kThreads, 1,
                    [&](EmulatedBlock& block, Tickets& shared) { pack_body(block, args, blocks, shared); });
}

void launch_pull(const PullArgs& args, std::uint32_t num_blocks, const PackArgs*, std::uint32_t, void*) {
  std::uint32_t blocks = fewer(num_blocks);
  run_grid<PullShared>(blocks, kThreads, 1,
                       [&](EmulatedBlock& block, PullShared& shared) { pull_body(block, args, blocks, shared); });
}

void launch_combine(const CombineArgs& args, const CombineBlocks& asked, void*) {
  CombineBlocks blocks{fewer(asked.publish), fewer(asked.forward), fewer(asked.reduce)};
  run_grid<CombineShared>(
      blocks.publish + blocks.forward + blocks.reduce, kThreads, 1,
      [&](EmulatedBlock& block, CombineShared& shared) { combine_body(block, args, blocks, shared); });
}

}  // namespace moe_efa::kernels::cuda

namespace moe_efa::bench {

struct Nothing {};

void launch_flag_latency(const FlagLatencyArgs& args, void*) {
  testing::run_grid<Nothing>(1, 32, 1,
                             [&](testing::EmulatedBlock& block, Nothing&) { flag_latency_body(block, args); });
}

void launch_pause(std::uint64_t nanoseconds, void*) {
  testing::run_grid<Nothing>(1, 32, 1,
                             [&](testing::EmulatedBlock& block, Nothing&) { pause_body(block, nanoseconds); });
}

}  // namespace moe_efa::bench
