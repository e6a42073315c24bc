// What the body of a CUDA kernel is written against: a Block, which is a block of threads of a grid. CudaBlock
// (cuda_block.h) is the real one; tests run the same bodies on fibers and host threads. No CUDA header here.
//
//   thread(), num_threads(), block(), num_blocks()   where this thread is; warps have 32 threads
//   sync(), sync_warp()                              barriers that also order memory
//   shuffle(v, lane), shuffle_xor(v, mask), ballot(bool), match_any(v)   among the whole warp
//   add(word, n), add_acq_rel(word, n)                old value; among threads of the device
//   compare_swap(word, from, to)                     was it `from`? Orders what follows after what led to `from`
//   load_relaxed(word)                                a word that another block changes
//   raise(word, v)                                    word = max(word, v), 64 bits, in no order with anything else
//   load_acquire(word), store_release(word, v)        words that ranks, the driver and the NIC's side share (system)
//   load(vec), load_fresh(vec), store(vec, v)         16 bytes; fresh: written while the kernel runs, past the L1
//   now_ns(), pause()                                 for waits, which all are bounded (I5)
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MOE_EFA_DEVICE __device__
#define MOE_EFA_UNROLL _Pragma("unroll")
#define MOE_EFA_NO_UNROLL _Pragma("unroll 1")
#else
#define MOE_EFA_DEVICE
#define MOE_EFA_UNROLL
#define MOE_EFA_NO_UNROLL
#endif

namespace moe_efa::kernels::cuda {

inline constexpr std::uint32_t kWarpSize = 32;

// One 16-byte access.
struct alignas(16) Vec16 {
  std::uint32_t word[4];
};

template <class Block>
MOE_EFA_DEVICE std::uint32_t lane_of(const Block& block) {
  return block.thread() % kWarpSize;
}
template <class Block>
MOE_EFA_DEVICE std::uint32_t warp_of(const Block& block) {
  return block.thread() / kWarpSize;
}
template <class Block>
MOE_EFA_DEVICE std::uint32_t num_warps(const Block& block) {
  return block.num_threads() / kWarpSize;
}

// Number of bits set.
MOE_EFA_DEVICE inline std::uint32_t count_bits(std::uint32_t mask) {
#if defined(__CUDA_ARCH__)
  return __popc(mask);
#else
  return static_cast<std::uint32_t>(__builtin_popcount(mask));
#endif
}
// Index of the lowest bit set; mask is not 0.
MOE_EFA_DEVICE inline std::uint32_t lowest_bit(std::uint32_t mask) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(mask)) - 1;
#else
  return static_cast<std::uint32_t>(__builtin_ctz(mask));
#endif
}
MOE_EFA_DEVICE inline std::uint32_t lowest_bit(std::uint64_t mask) {
  auto low = static_cast<std::uint32_t>(mask);
  return low != 0 ? lowest_bit(low) : 32 + lowest_bit(static_cast<std::uint32_t>(mask >> 32));
}

}  // namespace moe_efa::kernels::cuda
