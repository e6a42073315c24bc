// The 32-bit immediate of every RDMA write, drawn once:
//   bits 31..29 kind | 28 last | 27..24 epoch mod 16 | 23..14 source node | 13..0 value
// value is the ring sequence number (chunks) or the cumulative count (credits), modulo 2^14.
#pragma once

#include <cstdint>

#include "proto/topology.h"

namespace moe_efa::proto {

enum class ImmKind : std::uint8_t {
  kInvalid = 0,  // an all-zero immediate never means anything
  kDispatchChunk = 1,
  kCombineChunk = 2,
  kDispatchCounts = 3,
  kCombineCounts = 4,
  kDispatchCredit = 5,
  kCombineCredit = 6,
  kHello = 7,  // first contact, at construction
};

inline constexpr std::uint32_t kImmValueBits = 14;
inline constexpr std::uint32_t kImmNodeBits = 10;
inline constexpr std::uint32_t kImmEpochBits = 4;
inline constexpr std::uint32_t kImmLastBits = 1;
inline constexpr std::uint32_t kImmKindBits = 3;
static_assert(kImmValueBits + kImmNodeBits + kImmEpochBits + kImmLastBits + kImmKindBits == 32);

inline constexpr std::uint32_t kImmNodeShift = kImmValueBits;
inline constexpr std::uint32_t kImmEpochShift = kImmNodeShift + kImmNodeBits;
inline constexpr std::uint32_t kImmLastShift = kImmEpochShift + kImmEpochBits;
inline constexpr std::uint32_t kImmKindShift = kImmLastShift + kImmLastBits;

inline constexpr std::uint64_t kImmValueModulus = 1ull << kImmValueBits;
inline constexpr std::uint64_t kImmEpochModulus = 1ull << kImmEpochBits;
// A truncated sequence number is unambiguous only inside half of its range.
inline constexpr std::uint32_t kMaxSlots = 1u << (kImmValueBits - 1);
inline constexpr std::uint32_t kMaxNodes = 1u << kImmNodeBits;

struct Imm {
  ImmKind kind = ImmKind::kInvalid;
  bool last = false;
  std::uint32_t epoch = 0;        // modulo 16
  std::uint32_t source_node = 0;  // node of the writer
  std::uint32_t value = 0;        // modulo 2^14

  static constexpr Imm make(ImmKind kind, bool last, std::uint64_t epoch, std::uint32_t node, std::uint64_t value) {
    return {kind, last, static_cast<std::uint32_t>(epoch % kImmEpochModulus), node,
            static_cast<std::uint32_t>(value % kImmValueModulus)};
  }
  constexpr std::uint32_t encode() const {
    return static_cast<std::uint32_t>(kind) << kImmKindShift | static_cast<std::uint32_t>(last) << kImmLastShift |
           epoch << kImmEpochShift | source_node << kImmNodeShift | value;
  }
  static constexpr Imm decode(std::uint32_t bits) {
    return {static_cast<ImmKind>(bits >> kImmKindShift), (bits >> kImmLastShift & 1) != 0,
            static_cast<std::uint32_t>(bits >> kImmEpochShift & (kImmEpochModulus - 1)),
            bits >> kImmNodeShift & (kMaxNodes - 1), static_cast<std::uint32_t>(bits & (kImmValueModulus - 1))};
  }
};

constexpr ImmKind chunk_kind(Phase phase) {
  return phase == Phase::kDispatch ? ImmKind::kDispatchChunk : ImmKind::kCombineChunk;
}
constexpr ImmKind counts_kind(Phase phase) {
  return phase == Phase::kDispatch ? ImmKind::kDispatchCounts : ImmKind::kCombineCounts;
}
constexpr ImmKind credit_kind(Phase phase) {
  return phase == Phase::kDispatch ? ImmKind::kDispatchCredit : ImmKind::kCombineCredit;
}

// The smallest number >= `floor` that equals `value` modulo 2^14.
constexpr std::uint64_t expand_value(std::uint32_t value, std::uint64_t floor) {
  return floor + ((value - floor) & (kImmValueModulus - 1));
}

}  // namespace moe_efa::proto
