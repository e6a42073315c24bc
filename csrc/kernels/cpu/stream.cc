#include "kernels/cpu/stream.h"

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace moe_efa::kernels::cpu {

#if defined(__SSE2__)

void stream_copy(void* dst, const void* src, std::size_t bytes) {
  constexpr std::size_t kVector = sizeof(__m128i), kLine = 64;
  auto* to = static_cast<std::byte*>(dst);
  const auto* from = static_cast<const std::byte*>(src);
  // Whole lines only: a line that is written in part costs more than a cached store.
  std::size_t head = -reinterpret_cast<std::uintptr_t>(to) % kLine;
  if (head >= bytes) {
    std::memcpy(to, from, bytes);
    return;
  }
  std::memcpy(to, from, head);
  std::size_t i = head;
  for (; i + kLine <= bytes; i += kLine) {
    __m128i line[kLine / kVector];
    std::memcpy(line, from + i, kLine);
    for (std::size_t v = 0; v < kLine / kVector; ++v) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + v * kVector), line[v]);
    }
  }
  std::memcpy(to + i, from + i, bytes - i);
}

void stream_fence() { _mm_sfence(); }

#else

void stream_copy(void* dst, const void* src, std::size_t bytes) { std::memcpy(dst, src, bytes); }
void stream_fence() {}

#endif

}  // namespace moe_efa::kernels::cpu
