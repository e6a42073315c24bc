// Random numbers of the simulator: one seed, any number of independent streams, one per purpose, so that a new knob
// does not shift the draws of the others. The same seed gives the same run everywhere.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/random.h"

namespace moe_efa::simulator {

enum class Stream : std::uint64_t {
  kShape = 1,
  kScript,
  kProfile,
  kDelay,
  kDuplicate,
  kAgain,
  kPoll,
  kSchedule,
  kFault,
  kTieBreak,
  kRouting,
  kInput,
  kGradient,
  kWeight,
  kFp8,
  kStatic,
  kAhead,
  kMemory,
};

class Rng {
 public:
  Rng(std::uint64_t seed, Stream stream, std::uint64_t a = 0, std::uint64_t b = 0)
      : state_(mix(mix(mix(mix(seed) ^ static_cast<std::uint64_t>(stream)) ^ a) ^ (b + 0x51ed27ull))) {}

  std::uint64_t next() { return mix(state_ += common::kMixStep); }
  std::uint64_t below(std::uint64_t bound) { return next() % bound; }
  // Both ends included.
  std::uint32_t between(std::uint32_t low, std::uint32_t high) {
    return low + static_cast<std::uint32_t>(below(high - low + 1));
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  bool chance(double probability) { return uniform() < probability; }
  double exponential(double mean) { return -mean * std::log1p(-uniform()); }

 private:
  static std::uint64_t mix(std::uint64_t z) { return common::mix64(z); }
  std::uint64_t state_;
};

}  // namespace moe_efa::simulator
