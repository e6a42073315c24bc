// Small integer helpers, usable on host and device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MOE_EFA_HOST_DEVICE __host__ __device__
#else
#define MOE_EFA_HOST_DEVICE
#endif

namespace moe_efa::common {

template <typename T>
MOE_EFA_HOST_DEVICE constexpr T ceil_div(T value, T divisor) {
  return (value + divisor - 1) / divisor;
}

template <typename T>
MOE_EFA_HOST_DEVICE constexpr T round_up(T value, T multiple) {
  return ceil_div(value, multiple) * multiple;
}

template <typename T>
MOE_EFA_HOST_DEVICE constexpr T clamp(T value, T low, T high) {
  return value < low ? low : (value > high ? high : value);
}

}  // namespace moe_efa::common
