// The 32-bit immediate: every field survives the round trip, the bits are where the drawing says.
#include <doctest/doctest.h>

#include <initializer_list>

#include "proto/imm.h"

using namespace moe_efa::proto;

TEST_CASE("immediate-round-trip-of-every-kind-and-extreme") {
  for (int kind = 0; kind < 8; ++kind) {
    for (bool last : {false, true}) {
      for (std::uint64_t epoch : {0, 1, 7, 15}) {
        for (std::uint32_t node : {0u, 1u, 511u, kMaxNodes - 1}) {
          for (std::uint64_t value : {0, 1, 8191, 8192, 16383}) {
            Imm imm = Imm::make(static_cast<ImmKind>(kind), last, epoch, node, value);
            Imm back = Imm::decode(imm.encode());
            CHECK(back.kind == imm.kind);
            CHECK(back.last == last);
            CHECK(back.epoch == epoch);
            CHECK(back.source_node == node);
            CHECK(back.value == value);
          }
        }
      }
    }
  }
}

TEST_CASE("immediate-bits-are-where-the-drawing-says") {
  CHECK(Imm::make(ImmKind::kHello, false, 0, 0, 0).encode() == 7u << 29);
  CHECK(Imm::make(ImmKind::kInvalid, true, 0, 0, 0).encode() == 1u << 28);
  CHECK(Imm::make(ImmKind::kInvalid, false, 15, 0, 0).encode() == 15u << 24);
  CHECK(Imm::make(ImmKind::kInvalid, false, 0, 1023, 0).encode() == 1023u << 14);
  CHECK(Imm::make(ImmKind::kInvalid, false, 0, 0, 16383).encode() == 16383u);
  CHECK(Imm::decode(0).kind == ImmKind::kInvalid);
}

TEST_CASE("immediate-truncates-epochs-and-values") {
  Imm imm = Imm::make(ImmKind::kDispatchChunk, false, 16 * 5 + 3, 2, kImmValueModulus * 9 + 17);
  CHECK(imm.epoch == 3);
  CHECK(imm.value == 17);
}

TEST_CASE("expand-value-finds-the-smallest-number-not-below-the-floor") {
  CHECK(expand_value(0, 0) == 0);
  CHECK(expand_value(5, 5) == 5);
  CHECK(expand_value(4, 5) == kImmValueModulus + 4);
  CHECK(expand_value(0, kImmValueModulus - 1) == kImmValueModulus);
  for (std::uint64_t floor : {std::uint64_t{0}, std::uint64_t{1}, kImmValueModulus - 1, 3 * kImmValueModulus + 100,
                              (std::uint64_t{1} << 40) + 12345}) {
    for (std::uint64_t ahead : {std::uint64_t{0}, std::uint64_t{1}, kImmValueModulus / 2, kImmValueModulus - 1}) {
      auto value = static_cast<std::uint32_t>((floor + ahead) % kImmValueModulus);
      CHECK(expand_value(value, floor) == floor + ahead);
    }
  }
}

TEST_CASE("kinds-of-the-two-phases-differ") {
  CHECK(chunk_kind(Phase::kDispatch) != chunk_kind(Phase::kCombine));
  CHECK(counts_kind(Phase::kDispatch) != counts_kind(Phase::kCombine));
  CHECK(credit_kind(Phase::kDispatch) != credit_kind(Phase::kCombine));
}
