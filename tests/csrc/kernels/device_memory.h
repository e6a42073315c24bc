// With MOE_EFA_TEST_ON_GPU (bench/gpu_check.py) the tests of CUDA bodies launch the kernels instead of running them on
// fibers: everything they allocate is managed memory, so that the same pointers are good on both sides.
#pragma once

#if defined(MOE_EFA_TEST_ON_GPU)

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <new>

namespace moe_efa::testing {

inline constexpr bool kOnGpu = true;

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s, %s\n", what, cudaGetErrorName(error), cudaGetErrorString(error));
  std::_Exit(3);
}

// One arena, of which pages come into being when they are touched; nothing is given back.
inline void* allocate_managed(std::size_t bytes) {
  constexpr std::size_t kArenaBytes = std::size_t{8} << 30, kAlign = 256;
  static std::byte* arena = [] {
    void* memory = nullptr;
    check_cuda(cudaMallocManaged(&memory, kArenaBytes), "cudaMallocManaged");
    return static_cast<std::byte*>(memory);
  }();
  static std::atomic<std::size_t> used{0};
  std::size_t at = used.fetch_add((bytes + kAlign - 1) / kAlign * kAlign);
  if (at + bytes > kArenaBytes) throw std::bad_alloc();
  return arena + at;
}

// After a launch.
inline void finish_kernels() { check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize"); }

}  // namespace moe_efa::testing

void* operator new(std::size_t bytes) { return moe_efa::testing::allocate_managed(bytes); }
void operator delete(void*) noexcept {}
void operator delete(void*, std::size_t) noexcept {}

#else

namespace moe_efa::testing {
inline constexpr bool kOnGpu = false;
inline void finish_kernels() {}
}  // namespace moe_efa::testing

#endif
