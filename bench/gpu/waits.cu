#include "waits.h"

#include "kernels/cuda/cuda_block.h"
#include "kernels/cuda/cuda_launch.h"

namespace moe_efa::bench {

namespace {

__global__ void flag_latency_kernel(FlagLatencyArgs args) {
  kernels::cuda::CudaBlock block;
  flag_latency_body(block, args);
}

__global__ void pause_kernel(std::uint64_t nanoseconds) {
  kernels::cuda::CudaBlock block;
  pause_body(block, nanoseconds);
}

}  // namespace

void launch_flag_latency(const FlagLatencyArgs& args, void* stream) {
  flag_latency_kernel<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(args);
  CUDA_CHECK(cudaGetLastError());
}

void launch_pause(std::uint64_t nanoseconds, void* stream) {
  pause_kernel<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(nanoseconds);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace moe_efa::bench
