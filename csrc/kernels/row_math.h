// Arithmetic of rows, shared by every kernel: conversions and fixed-order sums. Products and sums are rounded to fp32
// one by one (the build forbids contraction), so that every implementation agrees bitwise (DESIGN: numerics).
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

}  // namespace moe_efa::kernels
