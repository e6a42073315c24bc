// Arithmetic of rows, shared by every kernel on CPU and GPU: conversions, quantization and the terms of fixed-order
// sums. Products and sums are rounded to fp32 one by one (the build forbids contraction), so that every implementation
// agrees bitwise (DESIGN: numerics).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/math.h"
#include "proto/chunk.h"

namespace moe_efa::kernels {

MOE_EFA_HOST_DEVICE inline float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

MOE_EFA_HOST_DEVICE inline std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

MOE_EFA_HOST_DEVICE inline float bf16_to_float(std::uint16_t value) {
  return bits_to_float(static_cast<std::uint32_t>(value) << 16);
}

// Round to nearest even; every NaN becomes the quiet 0x7fc0.
MOE_EFA_HOST_DEVICE inline std::uint16_t float_to_bf16(float value) {
  std::uint32_t bits = float_to_bits(value);
  std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

MOE_EFA_HOST_DEVICE inline float widen(std::uint16_t value) { return bf16_to_float(value); }
MOE_EFA_HOST_DEVICE inline float widen(float value) { return value; }
MOE_EFA_HOST_DEVICE inline void narrow(std::uint16_t* to, float value) { *to = float_to_bf16(value); }
MOE_EFA_HOST_DEVICE inline void narrow(float* to, float value) { *to = value; }

// A product and a sum that no compiler fuses.
MOE_EFA_HOST_DEVICE inline float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

MOE_EFA_HOST_DEVICE inline float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// FP8, e4m3: a sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, the largest is 448, NaN is 0x7f and 0xff.
// Both ways choose by masks and not by branches, so that compilers make vector instructions of row loops.

inline constexpr std::int32_t kFp32Infinity = 0x7f800000;
inline constexpr std::uint8_t kE4m3Nan = 0x7f;

// a where x < y, else b; |x - y| fits.
MOE_EFA_HOST_DEVICE inline std::int32_t select_less(std::int32_t x, std::int32_t y, std::int32_t a, std::int32_t b) {
  return b ^ ((a ^ b) & ((x - y) >> 31));
}

// Rounds to nearest even and clamps to +-448; every NaN becomes 0x7f.
MOE_EFA_HOST_DEVICE inline std::uint8_t float_to_e4m3(float value) {
  constexpr std::int32_t kSmallestNormal = (127 - 6) << 23;  // 2^-6
  constexpr std::int32_t kBiasDifference = (127 - 7) << 3;
  constexpr float kMagic = 16384.0f;  // in [2^14, 2^15) the ulp of a float is 2^-9, that of an e4m3 subnormal
  std::uint32_t bits = float_to_bits(value), unsigned_bits = bits & 0x7fffffffu;
  auto magnitude = static_cast<std::int32_t>(unsigned_bits);
  std::int32_t normal =
      static_cast<std::int32_t>((unsigned_bits + 0x7ffffu + (unsigned_bits >> 20 & 1u)) >> 20) - kBiasDifference;
  std::uint32_t shifted = float_to_bits(bits_to_float(unsigned_bits) + kMagic);
  auto subnormal = static_cast<std::int32_t>(shifted - float_to_bits(kMagic));
  std::int32_t code = select_less(magnitude, kSmallestNormal, subnormal, normal);
  code = select_less(0x7e, code, 0x7e, code) | static_cast<std::int32_t>(bits >> 24 & 0x80u);
  return static_cast<std::uint8_t>(select_less(kFp32Infinity, magnitude, kE4m3Nan, code));
}

// Exact.
MOE_EFA_HOST_DEVICE inline float e4m3_to_float(std::uint8_t code) {
  std::int32_t magnitude = code & 0x7f;
  std::int32_t normal = (magnitude << 20) + ((127 - 7) << 23);
  // A subnormal m * 2^-9 is (1 + m/8) * 2^-6 - 2^-6.
  float shifted = bits_to_float(static_cast<std::uint32_t>((magnitude << 20) + ((127 - 6) << 23)));
  auto subnormal = static_cast<std::int32_t>(float_to_bits(shifted - 0.015625f));
  std::int32_t bits = select_less(magnitude, 8, subnormal, normal);
  bits = select_less(0x7e, magnitude, 0x7fc00000, bits);
  return bits_to_float(static_cast<std::uint32_t>(bits) | (code & 0x80u) << 24);
}

// The bits of |value|, which order like magnitudes.
MOE_EFA_HOST_DEVICE inline std::int32_t magnitude_bits(float value) {
  return static_cast<std::int32_t>(float_to_bits(value) & 0x7fffffffu);
}

// The scale of a block whose largest magnitude has these bits: magnitudes order like their bits, and NaN is above
// infinity. max(amax / 448, 2^-126), for ue8m0 the smallest power of two that is not below it; 1 for zeros, NaN where
// something is not finite.
MOE_EFA_HOST_DEVICE inline float fp8_block_scale(std::int32_t amax_bits, proto::Fp8Scale format) {
  constexpr std::uint32_t kSmallestScale = 1u << 23;  // 2^-126
  if (amax_bits == 0) return 1.0f;
  if (amax_bits >= kFp32Infinity) return bits_to_float(0x7fc00000u);
  std::uint32_t scale = float_to_bits(bits_to_float(static_cast<std::uint32_t>(amax_bits)) / 448.0f);
  if (scale < kSmallestScale) scale = kSmallestScale;
  if (format == proto::Fp8Scale::kUe8m0) scale = (scale + 0x7fffffu) & 0x7f800000u;
  return bits_to_float(scale);
}

// A value of a block with this scale, in e4m3.
MOE_EFA_HOST_DEVICE inline std::uint8_t quantize(float value, float scale) { return float_to_e4m3(value / scale); }

MOE_EFA_HOST_DEVICE inline float dequantize(std::uint8_t code, float scale) {
  return multiply(e4m3_to_float(code), scale);
}

}  // namespace moe_efa::kernels
