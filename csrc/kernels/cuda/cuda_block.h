// CudaBlock: a Block (block.h) of the grid that runs. For .cu files only.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/block.h"

namespace moe_efa::kernels::cuda {

struct CudaBlock {
  __device__ std::uint32_t thread() const { return threadIdx.x; }
  __device__ std::uint32_t num_threads() const { return blockDim.x; }
  __device__ std::uint32_t block() const { return blockIdx.x; }
  __device__ std::uint32_t num_blocks() const { return gridDim.x; }

  __device__ void sync() { __syncthreads(); }
  __device__ void sync_warp() { __syncwarp(); }

  __device__ std::uint32_t shuffle(std::uint32_t value, std::uint32_t lane) { return __shfl_sync(~0u, value, lane); }
  __device__ std::uint32_t shuffle_xor(std::uint32_t value, std::uint32_t mask) {
    return __shfl_xor_sync(~0u, value, mask);
  }
  __device__ std::uint32_t ballot(bool value) { return __ballot_sync(~0u, value); }
  __device__ std::uint32_t match_any(std::uint32_t value) { return __match_any_sync(~0u, value); }

  __device__ std::uint32_t add(std::uint32_t* word, std::uint32_t count) {
    std::uint32_t old;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(global(word)), "r"(count)
                 : "memory");
    return old;
  }
  __device__ std::uint32_t add_acq_rel(std::uint32_t* word, std::uint32_t count) {
    std::uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(global(word)), "r"(count)
                 : "memory");
    return old;
  }
  __device__ bool compare_swap(std::uint32_t* word, std::uint32_t from, std::uint32_t to) {
    std::uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.cas.b32 %0, [%1], %2, %3;"
                 : "=r"(old)
                 : "l"(global(word)), "r"(from), "r"(to)
                 : "memory");
    return old == from;
  }
  __device__ std::uint32_t load_relaxed(const std::uint32_t* word) {
    std::uint32_t value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(global(word)) : "memory");
    return value;
  }
  __device__ void raise(std::uint64_t* word, std::uint64_t value) {
    asm volatile("red.relaxed.gpu.global.max.u64 [%0], %1;" : : "l"(global(word)), "l"(value) : "memory");
  }
  __device__ std::uint64_t load_acquire(const std::uint64_t* word) {
    std::uint64_t value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(global(word)) : "memory");
    return value;
  }
  __device__ void store_release(std::uint64_t* word, std::uint64_t value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" : : "l"(global(word)), "l"(value) : "memory");
  }

  __device__ Vec16 load(const Vec16* from) { return vec(__ldg(reinterpret_cast<const uint4*>(from))); }
  __device__ Vec16 load_fresh(const Vec16* from) { return vec(__ldcg(reinterpret_cast<const uint4*>(from))); }
  __device__ void store(Vec16* to, const Vec16& value) {
    __builtin_assume(__isGlobal(to));
    *reinterpret_cast<uint4*>(to) = make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]);
  }

  __device__ std::uint64_t now_ns() {
    std::uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
  }
  __device__ void pause() { __nanosleep(64); }

 private:
  __device__ static std::size_t global(const void* address) { return __cvta_generic_to_global(address); }
  __device__ static Vec16 vec(const uint4& value) { return {{value.x, value.y, value.z, value.w}}; }
};

}  // namespace moe_efa::kernels::cuda
