#include "kernels/cuda/pack.h"

#include "kernels/cuda/cuda_block.h"
#include "kernels/cuda/cuda_launch.h"
#include "kernels/cuda/recorded_body.h"

namespace moe_efa::kernels::cuda {

namespace {

__global__ void __launch_bounds__(kPackThreads, 1) pack_kernel(const __grid_constant__ PackArgs args) {
  __shared__ Tickets shared;
  CudaBlock block;
  pack_body(block, args, gridDim.x, shared);
}

__global__ void __launch_bounds__(kPackThreads, 1)
    recorded_pack_kernel(const PackArgs* args, const __grid_constant__ Watch watch) {
  __shared__ RecordedPackShared shared;
  CudaBlock block;
  recorded_pack_body(block, args, watch, shared);
}

}  // namespace

const void* recorded_pack_kernel_entry() { return reinterpret_cast<const void*>(recorded_pack_kernel); }

void launch_recorded_pack(const PackArgs* args, const Watch& watch, std::uint32_t num_blocks, void* stream) {
  launch_grid(recorded_pack_kernel, num_blocks, kPackThreads, stream, args, watch);
}

const void* pack_kernel_entry() { return reinterpret_cast<const void*>(pack_kernel); }

void launch_pack(const PackArgs& args, std::uint32_t num_blocks, void* stream) {
  launch_grid(pack_kernel, num_blocks, kPackThreads, stream, args);
}

}  // namespace moe_efa::kernels::cuda
