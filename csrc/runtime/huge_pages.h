// Fresh output tensors are unmapped memory: asking for huge pages first turns thousands of page faults into a few.
// Advice only: where the kernel has none to give, nothing changes.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace moe_efa::runtime {

inline constexpr std::uintptr_t kHugePage = 2u << 20;

inline void prefer_huge_pages(void* data, std::size_t bytes) {
  auto begin = reinterpret_cast<std::uintptr_t>(data);
  std::uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  std::uintptr_t end = (begin + bytes) / kHugePage * kHugePage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
}

}  // namespace moe_efa::runtime
