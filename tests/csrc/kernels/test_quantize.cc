// FP8 rows against slow rounding by definition: a table of the e4m3 numbers and the nearest of them, the even one of a
// tie. Every code, every bf16, blocks with NaN, infinities, zeros and subnormals, short blocks, sums from and to FP8.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels/cpu/quantize.h"
#include "kernels/cpu/rows.h"
#include "kernels/row_math.h"

using namespace moe_efa;
using kernels::bf16_to_float;
using kernels::bits_to_float;
using kernels::e4m3_to_float;
using kernels::float_to_bf16;
using kernels::float_to_bits;
using kernels::float_to_e4m3;
using proto::DType;
using proto::Fp8Scale;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr std::uint32_t kWidths[] = {1, 5, 15, 16, 127, 128, 129, 200, 512, 513, 640, 1100};

double naive_decode(unsigned code) {
  unsigned exponent = code >> 3 & 15, mantissa = code & 7;
  double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, static_cast<int>(exponent) - 10);
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}

std::uint8_t naive_encode(float value) {
  if (std::isnan(value)) return 0x7f;
  double magnitude = std::abs(static_cast<double>(value));
  unsigned up = 0;
  while (up < 0x7e && naive_decode(up) < magnitude) ++up;
  unsigned code = up;
  if (up > 0 && magnitude < 448) {
    double above = naive_decode(up) - magnitude, below = magnitude - naive_decode(up - 1);
    if (below < above || (below == above && up % 2 == 1)) code = up - 1;
  }
  return static_cast<std::uint8_t>(code | (std::signbit(value) ? 0x80 : 0));
}

struct NaiveRow {
  std::vector<std::uint8_t> codes;
  std::vector<float> scales;
};

NaiveRow naive_quantize(const std::vector<float>& row, Fp8Scale format) {
  NaiveRow out;
  for (std::size_t begin = 0; begin < row.size(); begin += 128) {
    std::size_t end = std::min(row.size(), begin + 128);
    float amax = 0;
    bool finite = true;
    for (std::size_t i = begin; i < end; ++i) {
      finite = finite && std::isfinite(row[i]);
      amax = std::max(amax, std::abs(row[i]));
    }
    auto scale = static_cast<float>(static_cast<double>(amax) / 448);
    if (scale < 0x1p-126f) scale = 0x1p-126f;
    if (format == Fp8Scale::kUe8m0) {
      float power = 0x1p-126f;
      while (power < scale) power *= 2;
      scale = power;
    }
    if (amax == 0) scale = 1;
    if (!finite) scale = kNan;
    out.scales.push_back(scale);
    for (std::size_t i = begin; i < end; ++i) out.codes.push_back(finite ? naive_encode(row[i] / scale) : 0x7f);
  }
  return out;
}

std::vector<std::byte> as_dtype(const std::vector<float>& values, DType dtype) {
  std::vector<std::byte> bytes(values.size() * proto::dtype_bytes(dtype));
  kernels::cpu::convert_row(bytes.data(), dtype, values.data(), DType::kFp32, static_cast<std::uint32_t>(values.size()),
                            Fp8Scale::kFp32);
  return bytes;
}

std::vector<float> as_floats(const std::vector<std::byte>& bytes, DType dtype) {
  std::vector<float> values(bytes.size() / proto::dtype_bytes(dtype));
  kernels::cpu::convert_row(values.data(), DType::kFp32, bytes.data(), dtype, static_cast<std::uint32_t>(values.size()),
                            Fp8Scale::kFp32);
  return values;
}

// A wire row between guard bytes.
struct WireRow {
  std::uint32_t hidden;
  std::vector<std::byte> memory;

  explicit WireRow(std::uint32_t hidden_size)
      : hidden(hidden_size), memory(proto::hidden_row_bytes(hidden_size, DType::kFp8) + 64, std::byte{0xA5}) {}
  std::byte* data() { return memory.data() + 32; }
  std::uint8_t code(std::uint32_t i) { return static_cast<std::uint8_t>(data()[i]); }
  std::uint32_t scale_bits(std::uint32_t block) {
    std::uint32_t bits;
    std::memcpy(&bits, data() + proto::fp8_scales_offset(hidden) + block * 4, 4);
    return bits;
  }
  void check(const NaiveRow& expected) {
    for (std::uint32_t i = 0; i < hidden; ++i) REQUIRE(code(i) == expected.codes[i]);
    for (std::uint32_t b = 0; b < expected.scales.size(); ++b) {
      REQUIRE(scale_bits(b) == float_to_bits(expected.scales[b]));
    }
    std::size_t scales = proto::fp8_scales_offset(hidden), end = scales + expected.scales.size() * 4;
    for (std::size_t i = 0; i < memory.size(); ++i) {
      bool written = i >= 32 && (i - 32 < hidden || (i - 32 >= scales && i - 32 < end));
      if (!written) REQUIRE(memory[i] == std::byte{0xA5});
    }
  }
};

// Blocks of very different sizes, some of them special.
std::vector<float> random_row(std::uint32_t hidden, std::mt19937& random, bool specials) {
  std::vector<float> row(hidden);
  int exponent = 0, kind = 9;
  for (std::uint32_t i = 0; i < hidden; ++i) {
    if (i % 128 == 0) {
      exponent = static_cast<int>(random() % 60) - 30;
      kind = specials ? static_cast<int>(random() % 8) : 9;
    }
    float value = std::ldexp(static_cast<float>(static_cast<int>(random() % 2001) - 1000), exponent - 10);
    if (kind == 0) value = i % 2 == 0 ? 0.0f : -0.0f;
    if (kind == 1) value = bits_to_float(random() & 0x807fffffu);  // subnormal
    if (kind == 2) value = bits_to_float(random() & 0xff7fffffu);  // any finite
    if (kind == 3 && random() % 100 == 0) value = random() % 2 == 0 ? kInfinity : -kInfinity;
    if (kind == 4 && random() % 100 == 0) value = bits_to_float(0xff800001u + random() % 1000);
    row[i] = value;
  }
  return row;
}

}  // namespace

TEST_CASE("every-code-decodes-to-its-number-and-encodes-back") {
  for (unsigned code = 0; code < 256; ++code) {
    float value = e4m3_to_float(static_cast<std::uint8_t>(code));
    if ((code & 0x7f) == 0x7f) {
      CHECK(std::isnan(value));
      CHECK(float_to_e4m3(value) == 0x7f);
    } else {
      CHECK(static_cast<double>(value) == naive_decode(code));
      CHECK(std::signbit(value) == (code >= 0x80));
      CHECK(float_to_e4m3(value) == code);
    }
  }
}

TEST_CASE("every-bf16-rounds-to-the-nearest-code-at-several-scales") {
  for (float scale : {1.0f, 0.0078125f, 1.0f / 448.0f, 3.7e-3f, 0x1p-126f, 1.7e30f}) {
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
      float quotient = bf16_to_float(static_cast<std::uint16_t>(bits)) / scale;
      INFO("bf16 ", bits, " at scale ", scale);
      REQUIRE(float_to_e4m3(quotient) == naive_encode(quotient));
    }
  }
}

TEST_CASE("neighbours-of-every-tie-go-to-their-own-side") {
  for (unsigned code = 0; code < 0x7e; ++code) {
    auto tie = static_cast<float>((naive_decode(code) + naive_decode(code + 1)) / 2);
    for (float value : {std::nextafter(tie, 0.0f), tie, std::nextafter(tie, kInfinity)}) {
      REQUIRE(float_to_e4m3(value) == naive_encode(value));
      REQUIRE(float_to_e4m3(-value) == naive_encode(-value));
    }
  }
  for (float value : {448.0f, 463.0f, 464.0f, 465.0f, 1e30f, kInfinity}) CHECK(float_to_e4m3(value) == 0x7e);
  CHECK(float_to_e4m3(-kInfinity) == 0xfe);
  for (std::uint32_t bits : {0x7fc00000u, 0xffc00000u, 0x7f800001u, 0x7fffffffu, 0xffffffffu}) {
    CHECK(float_to_e4m3(bits_to_float(bits)) == 0x7f);
  }
}

TEST_CASE("rows-are-quantized-as-by-definition-bitwise") {
  std::mt19937 random(3);
  for (std::uint32_t hidden : kWidths) {
    for (Fp8Scale format : {Fp8Scale::kFp32, Fp8Scale::kUe8m0}) {
      for (DType dtype : {DType::kBf16, DType::kFp32}) {
        for (int repeat = 0; repeat < 6; ++repeat) {
          std::vector<std::byte> row = as_dtype(random_row(hidden, random, repeat > 0), dtype);
          WireRow wire(hidden);
          kernels::cpu::convert_row(wire.data(), DType::kFp8, row.data(), dtype, hidden, format);
          wire.check(naive_quantize(as_floats(row, dtype), format));
        }
      }
    }
  }
}

TEST_CASE("special-blocks-have-the-scales-that-the-rule-says") {
  struct Special {
    std::vector<float> values;
    float scale, ue8m0;
  };
  const Special specials[] = {
      {{0.0f, -0.0f}, 1, 1},
      {{448.0f, 1.0f}, 1, 1},
      {{448.00003f, 1.0f}, 448.00003f / 448.0f, 2},
      {{3.0f}, 3.0f / 448.0f, 0.0078125f},
      {{0x1p-149f, -0x1p-140f}, 0x1p-126f, 0x1p-126f},
      {{448 * 0x1p-126f}, 0x1p-126f, 0x1p-126f},
      {{std::numeric_limits<float>::max()}, std::numeric_limits<float>::max() / 448.0f, 0x1p120f},
      {{1.0f, kNan}, kNan, kNan},
      {{-kInfinity, 1.0f}, kNan, kNan},
  };
  for (const Special& special : specials) {
    for (std::uint32_t hidden : {2u, 128u, 200u}) {
      std::vector<float> row(hidden, 0.0f);
      std::copy(special.values.begin(), special.values.end(), row.end() - static_cast<long>(special.values.size()));
      for (Fp8Scale format : {Fp8Scale::kFp32, Fp8Scale::kUe8m0}) {
        WireRow wire(hidden);
        kernels::cpu::convert_row(wire.data(), DType::kFp8, row.data(), DType::kFp32, hidden, format);
        float scale = format == Fp8Scale::kFp32 ? special.scale : special.ue8m0;
        CHECK(wire.scale_bits(proto::fp8_blocks(hidden) - 1) == float_to_bits(scale));
        wire.check(naive_quantize(row, format));
        if (!std::isnan(scale)) continue;
        std::vector<float> back(hidden, 0.0f);
        kernels::cpu::convert_row(back.data(), DType::kFp32, wire.data(), DType::kFp8, hidden, format);
        for (std::uint32_t i = (hidden - 1) / 128 * 128; i < hidden; ++i) CHECK(std::isnan(back[i]));
        if (hidden == 200) CHECK(back[0] == 0.0f);  // the other block is untouched
      }
    }
  }
}

TEST_CASE("rows-dequantize-to-code-times-scale-rounded-once") {
  std::mt19937 random(4);
  for (std::uint32_t hidden : kWidths) {
    WireRow wire(hidden);
    std::vector<float> row = random_row(hidden, random, true);
    kernels::cpu::convert_row(wire.data(), DType::kFp8, row.data(), DType::kFp32, hidden, Fp8Scale::kFp32);
    for (std::uint32_t i = 0; i < hidden; ++i) wire.data()[i] = static_cast<std::byte>(random());  // any code
    std::vector<float> out(hidden + 1, 7.0f);
    std::vector<std::uint16_t> half(hidden + 1, 7);
    kernels::cpu::convert_row(out.data(), DType::kFp32, wire.data(), DType::kFp8, hidden, Fp8Scale::kFp32);
    kernels::cpu::convert_row(half.data(), DType::kBf16, wire.data(), DType::kFp8, hidden, Fp8Scale::kFp32);
    for (std::uint32_t i = 0; i < hidden; ++i) {
      float scale = bits_to_float(wire.scale_bits(i / 128));
      unsigned code = wire.code(i);
      bool nan = (code & 0x7f) == 0x7f || std::isnan(scale);
      float expected = nan ? kNan : static_cast<float>(naive_decode(code)) * scale;
      if (nan) {
        REQUIRE(std::isnan(out[i]));
      } else {
        REQUIRE(float_to_bits(out[i]) == float_to_bits(expected));
      }
      REQUIRE(half[i] == float_to_bf16(expected));
    }
    CHECK(out[hidden] == 7.0f);
    CHECK(half[hidden] == 7);
  }
}

TEST_CASE("sums-to-fp8-are-the-fp32-sum-quantized") {
  std::mt19937 random(5);
  for (std::uint32_t hidden : kWidths) {
    for (DType dtype : {DType::kBf16, DType::kFp32}) {
      for (std::uint32_t num_rows : {0u, 1u, 2u, 5u, 9u}) {
        std::vector<std::vector<std::byte>> rows;
        std::vector<const void*> pointers;
        std::vector<float> sum(hidden, 0.0f);
        for (std::uint32_t r = 0; r < num_rows; ++r) {
          rows.push_back(as_dtype(random_row(hidden, random, false), dtype));
          std::vector<float> values = as_floats(rows.back(), dtype);
          for (std::uint32_t i = 0; i < hidden; ++i) sum[i] = r == 0 ? values[i] : sum[i] + values[i];
        }
        for (const auto& row : rows) pointers.push_back(row.data());
        for (Fp8Scale format : {Fp8Scale::kFp32, Fp8Scale::kUe8m0}) {
          WireRow wire(hidden);
          kernels::cpu::sum_rows({wire.data(), DType::kFp8, pointers.data(), nullptr, num_rows, dtype, hidden, format});
          wire.check(naive_quantize(sum, format));
        }
      }
    }
  }
}

TEST_CASE("sums-of-fp8-add-the-values-in-order-and-round-once") {
  std::mt19937 random(6);
  for (std::uint32_t hidden : kWidths) {
    for (std::uint32_t num_rows : {0u, 1u, 2u, 3u, 7u}) {
      std::vector<WireRow> rows;
      std::vector<const void*> pointers;
      std::vector<float> sum(hidden, 0.0f);
      for (std::uint32_t r = 0; r < num_rows; ++r) {
        std::vector<float> row = random_row(hidden, random, false);
        rows.emplace_back(hidden);
        kernels::cpu::convert_row(rows.back().data(), DType::kFp8, row.data(), DType::kFp32, hidden, Fp8Scale::kFp32);
        NaiveRow naive = naive_quantize(row, Fp8Scale::kFp32);
        for (std::uint32_t i = 0; i < hidden; ++i) {
          float value = static_cast<float>(naive_decode(naive.codes[i])) * naive.scales[i / 128];
          sum[i] = r == 0 ? value : sum[i] + value;
        }
      }
      for (auto& row : rows) pointers.push_back(row.data());
      for (DType dtype : {DType::kBf16, DType::kFp32}) {
        std::vector<std::byte> out(hidden * proto::dtype_bytes(dtype), std::byte{0xCD});
        kernels::cpu::sum_rows(
            {out.data(), dtype, pointers.data(), nullptr, num_rows, DType::kFp8, hidden, Fp8Scale::kFp32});
        CHECK(std::memcmp(out.data(), as_dtype(sum, dtype).data(), out.size()) == 0);
      }
    }
  }
}
