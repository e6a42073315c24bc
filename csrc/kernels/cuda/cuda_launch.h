// What the launchers share: CUDA_CHECK, and launches of grids, resident as a whole or not.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <sstream>
#include <type_traits>

#include "common/status.h"

#define CUDA_CHECK(call) ::moe_efa::kernels::cuda::check_cuda((call), #call)

namespace moe_efa::kernels::cuda {

// A result that is no success becomes StatusError with the call and CUDA's text.
inline void check_cuda(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  std::ostringstream text;
  text << call << ": " << cudaGetErrorName(error) << ", " << cudaGetErrorString(error);
  throw common::StatusError({common::StatusCode::kInternal, -1, -1, -1, -1, text.str()});
}

// Launches a grid. Unlike <<<>>>, whose errors have to be asked for, this tells of its own only.
template <class... Params, class... Args>
void launch_grid(void (*kernel)(Params...), std::uint32_t num_blocks, std::uint32_t num_threads, void* stream,
                 Args... args) {
  static_assert((std::is_same_v<Params, Args> && ...), "arguments are passed by address");
  void* pointers[] = {static_cast<void*>(&args)...};
  CUDA_CHECK(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(num_blocks), dim3(num_threads), pointers, 0,
                              static_cast<cudaStream_t>(stream)));
}

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
