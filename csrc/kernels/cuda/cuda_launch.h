// What the launchers share: CUDA_CHECK, and grids that are resident as a whole.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <sstream>
#include <type_traits>

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

// Launches a grid whose blocks are resident together; one that cannot be is an error of the launch.
template <class... Params, class... Args>
void launch_resident(void (*kernel)(Params...), std::uint32_t num_blocks, std::uint32_t num_threads,
                     std::size_t shared_bytes, void* stream, Args... args) {
  static_assert((std::is_same_v<Params, Args> && ...), "arguments are passed by address");
  void* pointers[] = {static_cast<void*>(&args)...};
  CUDA_CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(num_blocks), dim3(num_threads),
                                         pointers, shared_bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace moe_efa::kernels::cuda
