// Row arithmetic: bitwise equal to the obvious loops, with infinities, NaN and ties.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels/cpu/rows.h"
#include "kernels/row_math.h"

using namespace moe_efa;
using kernels::bf16_to_float;
using kernels::bits_to_float;
using kernels::float_to_bf16;
using kernels::float_to_bits;
using proto::DType;

namespace {

// By the definition: the nearest of the two neighbours, the even one of a tie.
std::uint16_t naive_bf16(float value) {
  if (std::isnan(value)) return 0x7fc0;
  std::uint32_t bits = float_to_bits(value);
  auto down = static_cast<std::uint16_t>(bits >> 16);
  if ((bits & 0xffff) == 0 || std::isinf(value)) return down;
  auto up = static_cast<std::uint16_t>(down + 1);  // away from zero; past the largest it is infinity
  double low = std::abs(static_cast<double>(bf16_to_float(down)));
  double high = std::isinf(bf16_to_float(up)) ? std::ldexp(1.0, 128) : std::abs(static_cast<double>(bf16_to_float(up)));
  double exact = std::abs(static_cast<double>(value));
  if (exact - low != high - exact) return exact - low < high - exact ? down : up;
  return down % 2 == 0 ? down : up;
}

std::vector<float> values_with_specials(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> values;
  float infinity = std::numeric_limits<float>::infinity();
  for (std::size_t i = 0; i < count; ++i) {
    switch (random() % 12) {
      case 0:
        values.push_back(bits_to_float((random() & 0xffff0000u) | 0x8000u));
        break;  // a tie
      case 1:
        values.push_back(i % 2 == 0 ? infinity : -infinity);
        break;
      case 2:
        values.push_back(-0.0f);
        break;
      case 3:
        values.push_back(std::numeric_limits<float>::max());
        break;
      default:
        values.push_back(bits_to_float(random()));
        break;  // anything, NaN included
    }
  }
  return values;
}

std::uint32_t canonical(std::uint32_t bits, DType dtype) {
  // A NaN out of fp32 arithmetic may carry any payload; a bf16 NaN that was rounded is 0x7fc0.
  if (dtype == DType::kFp32 && std::isnan(bits_to_float(bits))) return 0x7fc00000u;
  return bits;
}

}  // namespace

TEST_CASE("float-to-bf16-rounds-to-nearest-even-bitwise") {
  std::mt19937 random(1);
  for (int i = 0; i < 200'000; ++i) {
    float value = bits_to_float(i < 100'000 ? random() : (random() & 0xffff0000u) | (random() % 3 + 0x7fff));
    REQUIRE(float_to_bf16(value) == naive_bf16(value));
  }
  CHECK(float_to_bf16(std::numeric_limits<float>::max()) == 0x7f80);
  CHECK(float_to_bf16(bits_to_float(0xffc12345)) == 0x7fc0);
  CHECK(float_to_bf16(bits_to_float(0x7f800001)) == 0x7fc0);  // would round to infinity
  CHECK(float_to_bf16(-0.0f) == 0x8000);
}

TEST_CASE("bf16-survives-the-way-to-float-and-back") {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    auto half = static_cast<std::uint16_t>(bits);
    std::uint16_t expected = std::isnan(bf16_to_float(half)) ? 0x7fc0 : half;
    REQUIRE(float_to_bf16(bf16_to_float(half)) == expected);
  }
}

TEST_CASE("convert-row-agrees-with-the-scalar-conversion") {
  for (std::uint32_t hidden : {1u, 3u, 16u, 31u, 1025u}) {
    std::vector<float> from = values_with_specials(hidden, hidden);
    std::vector<std::uint16_t> half(hidden, 1);
    kernels::cpu::convert_row(half.data(), DType::kBf16, from.data(), DType::kFp32, hidden, proto::Fp8Scale::kFp32);
    for (std::uint32_t i = 0; i < hidden; ++i) REQUIRE(half[i] == naive_bf16(from[i]));
    std::vector<float> back(hidden, 1);
    kernels::cpu::convert_row(back.data(), DType::kFp32, half.data(), DType::kBf16, hidden, proto::Fp8Scale::kFp32);
    for (std::uint32_t i = 0; i < hidden; ++i) REQUIRE(float_to_bits(back[i]) == std::uint32_t{half[i]} << 16);
    std::vector<float> copy(hidden, 1);
    kernels::cpu::convert_row(copy.data(), DType::kFp32, from.data(), DType::kFp32, hidden, proto::Fp8Scale::kFp32);
    CHECK(std::memcmp(copy.data(), from.data(), hidden * 4) == 0);  // a move keeps every bit, of NaN too
  }
}

TEST_CASE("sum-rows-is-the-fixed-order-sum-bitwise") {
  for (DType src : {DType::kBf16, DType::kFp32}) {
    for (DType dst : {DType::kBf16, DType::kFp32}) {
      for (bool weighted : {false, true}) {
        for (std::uint32_t num_rows = 0; num_rows < 5; ++num_rows) {
          for (std::uint32_t hidden : {1u, 33u, 511u, 512u, 1100u}) {
            std::vector<std::vector<std::byte>> rows;
            std::vector<const void*> pointers;
            for (std::uint32_t r = 0; r < num_rows; ++r) {
              std::vector<float> values = values_with_specials(hidden, hidden * 10 + r);
              rows.emplace_back(hidden * proto::dtype_bytes(src));
              kernels::cpu::convert_row(rows.back().data(), src, values.data(), DType::kFp32, hidden,
                                        proto::Fp8Scale::kFp32);
            }
            for (const auto& row : rows) pointers.push_back(row.data());
            std::vector<float> weights = {0.1f, -3.7f, 1e20f, 0.0f, 2.0f};
            std::vector<std::byte> out(hidden * proto::dtype_bytes(dst), std::byte{0xCD});
            kernels::cpu::sum_rows({out.data(), dst, pointers.data(), weighted ? weights.data() : nullptr, num_rows,
                                    src, hidden, proto::Fp8Scale::kFp32});
            for (std::uint32_t i = 0; i < hidden; ++i) {
              float sum = 0;
              std::uint16_t copied = 0;
              for (std::uint32_t r = 0; r < num_rows; ++r) {
                float value;
                if (src == DType::kFp32) {
                  std::memcpy(&value, rows[r].data() + i * 4, 4);
                } else {
                  std::memcpy(&copied, rows[r].data() + i * 2, 2);
                  value = bf16_to_float(copied);
                }
                float product = weighted ? weights[r] * value : value;
                sum = r == 0 ? product : sum + product;
              }
              bool moved = num_rows == 1 && !weighted && src == dst;
              if (dst == DType::kFp32) {
                std::uint32_t got;
                std::memcpy(&got, out.data() + i * 4, 4);
                REQUIRE(canonical(got, dst) == canonical(float_to_bits(sum), dst));
              } else {
                std::uint16_t got;
                std::memcpy(&got, out.data() + i * 2, 2);
                REQUIRE(got == (moved ? copied : naive_bf16(sum)));
              }
            }
          }
        }
      }
    }
  }
}
