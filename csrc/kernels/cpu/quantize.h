// Row loops of FP8: 1x128 quantization into a row of the wire (proto/chunk.h) and back, bitwise equal to
// moe_efa/quantization.py. Compiled for several instruction sets, chosen at load time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "proto/chunk.h"

namespace moe_efa::kernels::cpu {

// An FP8 row in memory: codes and scales lie together on the wire and apart in a dispatch's output.
struct Fp8Row {
  std::uint8_t* codes;  // [hidden_size]
  std::byte* scales;    // [fp8_blocks(hidden_size)] fp32, of any alignment
};

inline Fp8Row fp8_row(void* wire_row, std::uint32_t hidden_size) {
  auto* bytes = static_cast<std::byte*>(wire_row);
  return {reinterpret_cast<std::uint8_t*>(bytes), bytes + proto::fp8_scales_offset(hidden_size)};
}

// `count` columns of a row from column `begin`, a multiple of the block size. src points at the first of them, bf16 or
// fp32. Either count is a multiple of the block size too, or the row ends with it.
void quantize_columns(const Fp8Row& dst, std::uint32_t begin, const void* src, proto::DType src_dtype,
                      std::uint32_t count, proto::Fp8Scale format);

// dst[i] = code * scale, rounded once to bf16 or fp32.
void dequantize_row(void* dst, proto::DType dst_dtype, const void* wire_row, std::uint32_t hidden_size);

// sum[i] = term, or sum[i] + term, where term = code * scale of column begin + i of the row.
void add_dequantized(float* sum, bool first, const void* wire_row, std::uint32_t hidden_size, std::uint32_t begin,
                     std::uint32_t count);

// Zeros: codes 0, scales 1.
void clear_fp8_row(const Fp8Row& dst, std::uint32_t hidden_size);

}  // namespace moe_efa::kernels::cpu
