// Acquire loads and release stores on plain 64-bit words in memory that other processes map, or a device.
#pragma once

#include <cstdint>

namespace moe_efa::common {

inline std::uint64_t load_acquire(const std::uint64_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

inline void store_release(std::uint64_t* word, std::uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

// Sends off what this thread has stored so far, before anything that it stores later: also through a mapping of a
// device's memory, which gathers stores and keeps them in no order (write combining).
inline void store_fence() {
#if defined(__x86_64__)
  asm volatile("sfence" ::: "memory");
#elif defined(__aarch64__)
  asm volatile("dsb st" ::: "memory");
#else
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

}  // namespace moe_efa::common
