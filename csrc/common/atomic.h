// Acquire loads and release stores on plain 64-bit words in memory that other processes map.
#pragma once

#include <cstdint>

namespace moe_efa::common {

inline std::uint64_t load_acquire(const std::uint64_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

inline void store_release(std::uint64_t* word, std::uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

}  // namespace moe_efa::common
