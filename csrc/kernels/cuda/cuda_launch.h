// What the launchers share: CUDA_CHECK, and the largest grid that is resident as a whole.
#pragma once

#include <cuda_runtime.h>

#include <sstream>

#include "common/status.h"

#define CUDA_CHECK(call)                                                                        \
  do {                                                                                          \
    if (cudaError_t cuda_check_error = (call); cuda_check_error != cudaSuccess) {               \
      std::ostringstream cuda_check_stream;                                                     \
      cuda_check_stream << #call << ": " << cudaGetErrorName(cuda_check_error) << ", "          \
                        << cudaGetErrorString(cuda_check_error);                                \
      throw ::moe_efa::common::StatusError(                                                     \
          {::moe_efa::common::StatusCode::kInternal, -1, -1, -1, -1, cuda_check_stream.str()}); \
    }                                                                                           \
  } while (0)

namespace moe_efa::kernels::cuda {

// Blocks of `kernel` that this device can hold at once: a grid that waits for its own blocks must not be larger.
template <class Kernel>
std::uint32_t most_resident_blocks(Kernel* kernel, std::uint32_t num_threads) {
  int device = 0, num_sms = 0, per_sm = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, static_cast<int>(num_threads), 0));
  return static_cast<std::uint32_t>(num_sms * per_sm);
}

// Launches a grid whose blocks are resident together.
template <class... Params, class... Args>
void launch_resident(void (*kernel)(Params...), std::uint32_t num_blocks, std::uint32_t num_threads, void* stream,
                     Args... args) {
  void* pointers[] = {static_cast<void*>(&args)...};
  CUDA_CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(num_blocks), dim3(num_threads),
                                         pointers, 0, static_cast<cudaStream_t>(stream)));
}

}  // namespace moe_efa::kernels::cuda
