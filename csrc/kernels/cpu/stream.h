// Stores that go past the caches, for outputs that are larger than what the caches could keep: a line that is wholly
// written need not be read first, and what other kernels have in the caches stays there.
#pragma once

#include <cstddef>

namespace moe_efa::kernels::cpu {

// Copies bytes. The stores are ordered by stream_fence() only. Where there are no such stores, a plain copy.
void stream_copy(void* dst, const void* src, std::size_t bytes);
void stream_fence();

}  // namespace moe_efa::kernels::cpu
