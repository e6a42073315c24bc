#include "kernels/cpu/quantize.h"

#include <algorithm>
#include <cstring>

#include "kernels/cpu/clones.h"
#include "kernels/row_math.h"

namespace moe_efa::kernels::cpu {

using proto::DType;
using proto::Fp8Scale;

namespace {

constexpr std::uint32_t kBlock = proto::kFp8BlockSize;

template <typename In>
inline __attribute__((always_inline)) void quantize_block(std::uint8_t* __restrict codes, std::byte* scale_to,
                                                          const In* __restrict src, std::uint32_t count,
                                                          Fp8Scale format) {
  std::int32_t amax = 0;
  for (std::uint32_t i = 0; i < count; ++i) {
    std::int32_t magnitude = magnitude_bits(widen(src[i]));
    amax = magnitude > amax ? magnitude : amax;
  }
  float scale = fp8_block_scale(amax, format);
  std::memcpy(scale_to, &scale, sizeof(scale));
  if (amax >= kFp32Infinity) {
    std::memset(codes, kE4m3Nan, count);
    return;
  }
  for (std::uint32_t i = 0; i < count; ++i) codes[i] = quantize(widen(src[i]), scale);
}

template <typename In>
inline __attribute__((always_inline)) void quantize_blocks(std::uint8_t* codes, std::byte* scales, const In* src,
                                                           std::uint32_t count, Fp8Scale format) {
  std::uint32_t i = 0;
  for (; i + kBlock <= count; i += kBlock, scales += sizeof(float)) {
    quantize_block(codes + i, scales, src + i, kBlock, format);  // of known length
  }
  if (i < count) quantize_block(codes + i, scales, src + i, count - i, format);
}

template <typename Out>
inline __attribute__((always_inline)) void dequantize_block(Out* __restrict dst, const std::uint8_t* __restrict codes,
                                                            float scale, std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; ++i) narrow(dst + i, dequantize(codes[i], scale));
}

template <typename Out>
inline __attribute__((always_inline)) void dequantize_blocks(Out* dst, const std::uint8_t* codes,
                                                             const std::byte* scales, std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; i += kBlock, scales += sizeof(float)) {
    float scale;
    std::memcpy(&scale, scales, sizeof(scale));
    if (count - i >= kBlock) {
      dequantize_block(dst + i, codes + i, scale, kBlock);
    } else {
      dequantize_block(dst + i, codes + i, scale, count - i);
    }
  }
}

inline __attribute__((always_inline)) void add_block(float* __restrict sum, const std::uint8_t* __restrict codes,
                                                     float scale, std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; ++i) sum[i] = add(sum[i], dequantize(codes[i], scale));
}

MOE_EFA_CLONES void quantize_bf16(std::uint8_t* codes, std::byte* scales, const std::uint16_t* src, std::uint32_t count,
                                  Fp8Scale format) {
  quantize_blocks(codes, scales, src, count, format);
}

MOE_EFA_CLONES void quantize_fp32(std::uint8_t* codes, std::byte* scales, const float* src, std::uint32_t count,
                                  Fp8Scale format) {
  quantize_blocks(codes, scales, src, count, format);
}

MOE_EFA_CLONES void dequantize_bf16(std::uint16_t* dst, const std::uint8_t* codes, const std::byte* scales,
                                    std::uint32_t count) {
  dequantize_blocks(dst, codes, scales, count);
}

MOE_EFA_CLONES void dequantize_fp32(float* dst, const std::uint8_t* codes, const std::byte* scales,
                                    std::uint32_t count) {
  dequantize_blocks(dst, codes, scales, count);
}

MOE_EFA_CLONES void add_fp32(float* sum, const std::uint8_t* codes, const std::byte* scales, std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; i += kBlock, scales += sizeof(float)) {
    float scale;
    std::memcpy(&scale, scales, sizeof(scale));
    if (count - i >= kBlock) {
      add_block(sum + i, codes + i, scale, kBlock);
    } else {
      add_block(sum + i, codes + i, scale, count - i);
    }
  }
}

const std::uint8_t* codes_of(const void* wire_row) { return static_cast<const std::uint8_t*>(wire_row); }

const std::byte* scales_of(const void* wire_row, std::uint32_t hidden_size) {
  return static_cast<const std::byte*>(wire_row) + proto::fp8_scales_offset(hidden_size);
}

}  // namespace

void quantize_columns(const Fp8Row& dst, std::uint32_t begin, const void* src, DType src_dtype, std::uint32_t count,
                      Fp8Scale format) {
  std::uint8_t* codes = dst.codes + begin;
  std::byte* scales = dst.scales + begin / kBlock * sizeof(float);
  if (src_dtype == DType::kBf16) {
    quantize_bf16(codes, scales, static_cast<const std::uint16_t*>(src), count, format);
  } else {
    quantize_fp32(codes, scales, static_cast<const float*>(src), count, format);
  }
}

void dequantize_row(void* dst, DType dst_dtype, const void* wire_row, std::uint32_t hidden_size) {
  const std::uint8_t* codes = codes_of(wire_row);
  const std::byte* scales = scales_of(wire_row, hidden_size);
  if (dst_dtype == DType::kBf16) {
    dequantize_bf16(static_cast<std::uint16_t*>(dst), codes, scales, hidden_size);
  } else {
    dequantize_fp32(static_cast<float*>(dst), codes, scales, hidden_size);
  }
}

void add_dequantized(float* sum, bool first, const void* wire_row, std::uint32_t hidden_size, std::uint32_t begin,
                     std::uint32_t count) {
  const std::uint8_t* codes = codes_of(wire_row) + begin;
  const std::byte* scales = scales_of(wire_row, hidden_size) + begin / kBlock * sizeof(float);
  if (first) {
    dequantize_fp32(sum, codes, scales, count);
  } else {
    add_fp32(sum, codes, scales, count);
  }
}

void clear_fp8_row(const Fp8Row& dst, std::uint32_t hidden_size) {
  constexpr float kOne = 1;
  std::memset(dst.codes, 0, hidden_size);
  for (std::uint32_t i = 0; i < proto::fp8_blocks(hidden_size); ++i) {
    std::memcpy(dst.scales + i * sizeof(kOne), &kOne, sizeof(kOne));
  }
}

}  // namespace moe_efa::kernels::cpu
