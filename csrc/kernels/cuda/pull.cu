#include "kernels/cuda/pull.h"

#include "kernels/cuda/cuda_block.h"
#include "kernels/cuda/cuda_launch.h"
#include "kernels/cuda/recorded_body.h"

namespace moe_efa::kernels::cuda {

namespace {

__global__ void __launch_bounds__(kPullThreads, 1)
    pull_kernel(const __grid_constant__ PullArgs args, const __grid_constant__ PackArgs rest,
                std::uint32_t pack_blocks) {
  __shared__ PullShared shared;
  CudaBlock block;
  if (blockIdx.x < pack_blocks) {
    pack_body(block, rest, pack_blocks, shared.tickets);
  } else {
    pull_body(block, args, gridDim.x - pack_blocks, shared);
  }
}

__global__ void __launch_bounds__(kPullThreads, 1)
    recorded_pull_kernel(const RecordedPull* args, const __grid_constant__ Watch watch, std::uint32_t pack_blocks) {
  __shared__ RecordedPullShared shared;
  CudaBlock block;
  recorded_pull_body(block, args, watch, pack_blocks, shared);
}

}  // namespace

const void* recorded_pull_kernel_entry() { return reinterpret_cast<const void*>(recorded_pull_kernel); }

void launch_recorded_pull(const RecordedPull* args, const Watch& watch, std::uint32_t num_blocks,
                          std::uint32_t pack_blocks, void* stream) {
  launch_resident(recorded_pull_kernel, num_blocks, kPullThreads, 0, stream, args, watch, pack_blocks);
}

const void* pull_kernel_entry() { return reinterpret_cast<const void*>(pull_kernel); }

void launch_pull(const PullArgs& args, std::uint32_t num_blocks, const PackArgs* rest, std::uint32_t pack_blocks,
                 void* stream) {
  launch_resident(pull_kernel, num_blocks, kPullThreads, 0, stream, args, rest == nullptr ? PackArgs{} : *rest,
                  rest == nullptr ? 0u : pack_blocks);
}

}  // namespace moe_efa::kernels::cuda
