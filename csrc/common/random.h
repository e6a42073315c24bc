// The mixing function (splitmix64) behind every seeded draw: simulator, fault injection. Not for statistics.
#pragma once

#include <cstdint>

namespace moe_efa::common {

constexpr std::uint64_t mix64(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

inline constexpr std::uint64_t kMixStep = 0x9e3779b97f4a7c15ull;  // between the states of one stream

}  // namespace moe_efa::common
