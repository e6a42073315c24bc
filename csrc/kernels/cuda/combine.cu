#include "kernels/cuda/combine.h"

#include "kernels/cuda/cuda_block.h"
#include "kernels/cuda/cuda_launch.h"
#include "kernels/cuda/recorded_body.h"

namespace moe_efa::kernels::cuda {

namespace {

__global__ void __launch_bounds__(kCombineThreads, 1)
    combine_kernel(const __grid_constant__ CombineArgs args, const __grid_constant__ CombineBlocks blocks) {
  __shared__ CombineShared shared;
  CudaBlock block;
  combine_body(block, args, blocks, shared);
}

__global__ void __launch_bounds__(kCombineThreads, 1)
    recorded_combine_kernel(const CombineArgs* args, const __grid_constant__ Watch watch,
                            const __grid_constant__ CombineBlocks blocks) {
  __shared__ RecordedCombineShared shared;
  CudaBlock block;
  recorded_combine_body(block, args, watch, blocks, shared);
}

}  // namespace

const void* recorded_combine_kernel_entry() { return reinterpret_cast<const void*>(recorded_combine_kernel); }

void launch_recorded_combine(const CombineArgs* args, const Watch& watch, const CombineBlocks& blocks, void* stream) {
  launch_resident(recorded_combine_kernel, blocks.publish + blocks.forward + blocks.reduce, kCombineThreads, 0, stream,
                  args, watch, blocks);
}

const void* combine_kernel_entry() { return reinterpret_cast<const void*>(combine_kernel); }

void launch_combine(const CombineArgs& args, const CombineBlocks& blocks, void* stream) {
  launch_resident(combine_kernel, blocks.publish + blocks.forward + blocks.reduce, kCombineThreads, 0, stream, args,
                  blocks);
}

}  // namespace moe_efa::kernels::cuda
