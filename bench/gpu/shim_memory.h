// Copies between host and device for the shim: CUDA's, or plain ones where kernels run on host threads.
#pragma once

#include <cstddef>
#include <cstring>

#if defined(MOE_EFA_SHIM_ON_GPU)

#include <cuda_runtime.h>

#include "kernels/cuda/cuda_launch.h"

namespace moe_efa::bench {

inline void transfer(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) CUDA_CHECK(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}
inline void transfer_on(void* to, const void* from, std::size_t bytes, void* stream) {
  if (bytes > 0) CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)));
}
// An error of a launch would be found again by whoever asks next.
inline void forget_error() { static_cast<void>(cudaGetLastError()); }
inline void finish(void* stream) { CUDA_CHECK(cudaStreamSynchronize(static_cast<cudaStream_t>(stream))); }

}  // namespace moe_efa::bench

#else

namespace moe_efa::bench {

inline void transfer(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}
inline void transfer_on(void* to, const void* from, std::size_t bytes, void*) { transfer(to, from, bytes); }
inline void forget_error() {}
inline void finish(void*) {}

}  // namespace moe_efa::bench

#endif
