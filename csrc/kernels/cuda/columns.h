// Rows seen by a warp: 16 columns of 512 per thread and step, so that every access is of 16 bytes and 8 neighbours have
// an FP8 block of 128 between them. Sources read columns, sinks write them; rows of any alignment and length are
// served, slowly where 16-byte accesses would not fit, and never beyond hidden_size (I10).
#pragma once

#include <cstdint>

#include "kernels/cuda/block.h"
#include "kernels/row_math.h"
#include "proto/chunk.h"

namespace moe_efa::kernels::cuda {

inline constexpr std::uint32_t kColumns = 16;                 // of a thread
inline constexpr std::uint32_t kStep = kColumns * kWarpSize;  // of a warp
inline constexpr std::uint32_t kLanesPerBlock = proto::kFp8BlockSize / kColumns;
static_assert(kStep % proto::kFp8BlockSize == 0);

struct Columns {
  float value[kColumns];
};

// Is memory that is written while the kernel runs (a ring) or not (a user's tensor).
enum class Memory { kQuiet, kFresh };

template <Memory kMemory, class Block>
MOE_EFA_DEVICE Vec16 load_vec(Block& block, const void* from) {
  if constexpr (kMemory == Memory::kFresh) return block.load_fresh(static_cast<const Vec16*>(from));
  return block.load(static_cast<const Vec16*>(from));
}

MOE_EFA_DEVICE inline bool is_aligned(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
}

// Columns that are not there are zeros.
template <Memory kMemory>
struct Bf16Source {
  const std::uint16_t* row;
  std::uint32_t hidden_size;
  bool wide;

  template <class Block>
  MOE_EFA_DEVICE void read(Block& block, std::uint32_t column, Columns* to) const {
    if (wide && column + kColumns <= hidden_size) {
      MOE_EFA_UNROLL
      for (std::uint32_t half = 0; half < 2; ++half) {
        Vec16 vec = load_vec<kMemory>(block, row + column + half * 8);
        MOE_EFA_UNROLL
        for (std::uint32_t i = 0; i < 4; ++i) {
          to->value[half * 8 + 2 * i] = bits_to_float(vec.word[i] << 16);
          to->value[half * 8 + 2 * i + 1] = bits_to_float(vec.word[i] & 0xffff0000u);
        }
      }
      return;
    }
    MOE_EFA_UNROLL
    for (std::uint32_t i = 0; i < kColumns; ++i) {
      to->value[i] = column + i < hidden_size ? bf16_to_float(row[column + i]) : 0.0f;
    }
  }
};

template <Memory kMemory>
struct Fp32Source {
  const float* row;
  std::uint32_t hidden_size;
  bool wide;

  template <class Block>
  MOE_EFA_DEVICE void read(Block& block, std::uint32_t column, Columns* to) const {
    if (wide && column + kColumns <= hidden_size) {
      MOE_EFA_UNROLL
      for (std::uint32_t quarter = 0; quarter < 4; ++quarter) {
        Vec16 vec = load_vec<kMemory>(block, row + column + quarter * 4);
        MOE_EFA_UNROLL
        for (std::uint32_t i = 0; i < 4; ++i) to->value[quarter * 4 + i] = bits_to_float(vec.word[i]);
      }
      return;
    }
    MOE_EFA_UNROLL
    for (std::uint32_t i = 0; i < kColumns; ++i) to->value[i] = column + i < hidden_size ? row[column + i] : 0.0f;
  }
};

// A row of the wire: codes, then scales.
template <Memory kMemory>
struct Fp8Source {
  const std::uint8_t* row;
  std::uint32_t hidden_size;
  bool wide;

  template <class Block>
  MOE_EFA_DEVICE void read(Block& block, std::uint32_t column, Columns* to) const {
    MOE_EFA_UNROLL
    for (std::uint32_t i = 0; i < kColumns; ++i) to->value[i] = 0.0f;
    if (column >= hidden_size) return;
    float scale =
        reinterpret_cast<const float*>(row + proto::fp8_scales_offset(hidden_size))[column / proto::kFp8BlockSize];
    if (wide && column + kColumns <= hidden_size) {
      Vec16 vec = load_vec<kMemory>(block, row + column);
      MOE_EFA_UNROLL
      for (std::uint32_t i = 0; i < kColumns; ++i) {
        to->value[i] = dequantize(static_cast<std::uint8_t>(vec.word[i / 4] >> 8 * (i % 4)), scale);
      }
      return;
    }
    MOE_EFA_UNROLL
    for (std::uint32_t i = 0; i < kColumns; ++i) {
      if (column + i < hidden_size) to->value[i] = dequantize(row[column + i], scale);
    }
  }
};

struct Bf16Sink {
  std::uint16_t* row;
  std::uint32_t hidden_size;
  bool wide;

  template <class Block>
  MOE_EFA_DEVICE void write(Block& block, std::uint32_t column, const Columns& from) const {
    if (wide && column + kColumns <= hidden_size) {
      MOE_EFA_UNROLL
      for (std::uint32_t half = 0; half < 2; ++half) {
        Vec16 vec;
        MOE_EFA_UNROLL
        for (std::uint32_t i = 0; i < 4; ++i) {
          vec.word[i] = float_to_bf16(from.value[half * 8 + 2 * i]) |
                        static_cast<std::uint32_t>(float_to_bf16(from.value[half * 8 + 2 * i + 1])) << 16;
        }
        block.store(reinterpret_cast<Vec16*>(row + column + half * 8), vec);
      }
      return;
    }
    MOE_EFA_UNROLL
    for (std::uint32_t i = 0; i < kColumns; ++i) {
      if (column + i < hidden_size) row[column + i] = float_to_bf16(from.value[i]);
    }
  }
};

struct Fp32Sink {
  float* row;
  std::uint32_t hidden_size;
  bool wide;

  template <class Block>
  MOE_EFA_DEVICE void write(Block& block, std::uint32_t column, const Columns& from) const {
    if (wide && column + kColumns <= hidden_size) {
      MOE_EFA_UNROLL
      for (std::uint32_t quarter = 0; quarter < 4; ++quarter) {
        Vec16 vec;
        MOE_EFA_UNROLL
        for (std::uint32_t i = 0; i < 4; ++i) vec.word[i] = float_to_bits(from.value[quarter * 4 + i]);
        block.store(reinterpret_cast<Vec16*>(row + column + quarter * 4), vec);
      }
      return;
    }
    MOE_EFA_UNROLL
    for (std::uint32_t i = 0; i < kColumns; ++i) {
      if (column + i < hidden_size) row[column + i] = from.value[i];
    }
  }
};

// The scale of the FP8 block that these columns belong to; all threads of the warp take part.
template <class Block>
MOE_EFA_DEVICE std::int32_t block_magnitude(Block& block, const Columns& from) {
  std::int32_t largest = 0;
  MOE_EFA_UNROLL
  for (std::uint32_t i = 0; i < kColumns; ++i) {
    std::int32_t magnitude = magnitude_bits(from.value[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  MOE_EFA_UNROLL
  for (std::uint32_t mask = 1; mask < kLanesPerBlock; mask *= 2) {
    auto other = static_cast<std::int32_t>(block.shuffle_xor(static_cast<std::uint32_t>(largest), mask));
    largest = other > largest ? other : largest;
  }
  return largest;
}

struct Fp8Sink {
  std::uint8_t* row;  // of the wire
  std::uint32_t hidden_size;
  proto::Fp8Scale format;

  template <class Block>
  MOE_EFA_DEVICE void write(Block& block, std::uint32_t column, const Columns& from) const {
    std::int32_t largest = block_magnitude(block, from);
    if (column >= hidden_size) return;
    float scale = fp8_block_scale(largest, format);
    bool finite = largest < kFp32Infinity;
    if (column % proto::kFp8BlockSize == 0) {
      reinterpret_cast<float*>(row + proto::fp8_scales_offset(hidden_size))[column / proto::kFp8BlockSize] = scale;
    }
    Vec16 vec = {{0, 0, 0, 0}};
    MOE_EFA_UNROLL
    for (std::uint32_t i = 0; i < kColumns; ++i) {
      std::uint32_t code = finite ? quantize(from.value[i], scale) : kE4m3Nan;
      vec.word[i / 4] |= code << 8 * (i % 4);
    }
    if (column + kColumns <= hidden_size) {  // rows of the wire are aligned
      block.store(reinterpret_cast<Vec16*>(row + column), vec);
      return;
    }
    MOE_EFA_UNROLL
    for (std::uint32_t i = 0; i < kColumns; ++i) {
      if (column + i < hidden_size) row[column + i] = static_cast<std::uint8_t>(vec.word[i / 4] >> 8 * (i % 4));
    }
  }
};

// A source or sink whose dtype is known when the kernel runs: the same for the whole warp.
template <Memory kMemory>
struct AnySource {
  const void* row;
  proto::DType dtype;
  std::uint32_t hidden_size;

  template <class Block>
  MOE_EFA_DEVICE void read(Block& block, std::uint32_t column, Columns* to) const {
    bool wide = is_aligned(row);
    if (dtype == proto::DType::kBf16) {
      Bf16Source<kMemory>{static_cast<const std::uint16_t*>(row), hidden_size, wide}.read(block, column, to);
    } else if (dtype == proto::DType::kFp32) {
      Fp32Source<kMemory>{static_cast<const float*>(row), hidden_size, wide}.read(block, column, to);
    } else {
      Fp8Source<kMemory>{static_cast<const std::uint8_t*>(row), hidden_size, wide}.read(block, column, to);
    }
  }
};

struct AnySink {
  void* row;
  proto::DType dtype;
  std::uint32_t hidden_size;
  proto::Fp8Scale format;

  template <class Block>
  MOE_EFA_DEVICE void write(Block& block, std::uint32_t column, const Columns& from) const {
    bool wide = is_aligned(row);
    if (dtype == proto::DType::kBf16) {
      Bf16Sink{static_cast<std::uint16_t*>(row), hidden_size, wide}.write(block, column, from);
    } else if (dtype == proto::DType::kFp32) {
      Fp32Sink{static_cast<float*>(row), hidden_size, wide}.write(block, column, from);
    } else {
      Fp8Sink{static_cast<std::uint8_t*>(row), hidden_size, format}.write(block, column, from);
    }
  }
};

// Rounds to a dtype and back.
template <class Block>
MOE_EFA_DEVICE void round_to(Block& block, proto::DType dtype, proto::Fp8Scale format, Columns* columns) {
  if (dtype == proto::DType::kFp32) return;
  if (dtype == proto::DType::kBf16) {
    MOE_EFA_UNROLL
    for (std::uint32_t i = 0; i < kColumns; ++i) {
      columns->value[i] = bf16_to_float(float_to_bf16(columns->value[i]));
    }
    return;
  }
  std::int32_t largest = block_magnitude(block, *columns);
  float scale = fp8_block_scale(largest, format);
  MOE_EFA_UNROLL
  for (std::uint32_t i = 0; i < kColumns; ++i) {
    std::uint8_t code = largest < kFp32Infinity ? quantize(columns->value[i], scale) : kE4m3Nan;
    columns->value[i] = dequantize(code, scale);
  }
}

// What a warp does for a row: every thread its columns, all in step, so that they may take part in shuffles.
template <class Block, class Source, class Sink>
MOE_EFA_DEVICE void convert_columns(Block& block, const Source& source, const Sink& sink, std::uint32_t hidden_size) {
  for (std::uint32_t begin = 0; begin < hidden_size; begin += kStep) {
    std::uint32_t column = begin + lane_of(block) * kColumns;
    Columns columns;
    source.read(block, column, &columns);
    sink.write(block, column, columns);
  }
}

template <Memory kMemory, class Block>
MOE_EFA_DEVICE void copy_bytes(Block& block, void* to, const void* from, std::uint64_t bytes) {
  auto* dst = static_cast<std::uint8_t*>(to);
  const auto* src = static_cast<const std::uint8_t*>(from);
  std::uint64_t whole = is_aligned(dst) && is_aligned(src) ? bytes / sizeof(Vec16) : 0;
  for (std::uint64_t i = lane_of(block); i < whole; i += kWarpSize) {
    block.store(reinterpret_cast<Vec16*>(dst) + i, load_vec<kMemory>(block, src + i * sizeof(Vec16)));
  }
  MOE_EFA_NO_UNROLL
  for (std::uint64_t i = whole * sizeof(Vec16) + lane_of(block); i < bytes; i += kWarpSize) dst[i] = src[i];
}

// convert_row of the CPU kernels (cpu/rows.h), for a warp. One of the two may be FP8, which is then a row of the wire.
template <Memory kMemory, class Block>
MOE_EFA_DEVICE void convert_row(Block& block, void* dst, proto::DType dst_dtype, const void* src,
                                proto::DType src_dtype, std::uint32_t hidden_size, proto::Fp8Scale format) {
  using proto::DType;
  if (dst_dtype == src_dtype) {
    return copy_bytes<kMemory>(block, dst, src, std::uint64_t{hidden_size} * proto::dtype_bytes(dst_dtype));
  }
  Bf16Source<kMemory> bf16{static_cast<const std::uint16_t*>(src), hidden_size, is_aligned(src)};
  Fp32Source<kMemory> fp32{static_cast<const float*>(src), hidden_size, is_aligned(src)};
  Fp8Source<kMemory> fp8{static_cast<const std::uint8_t*>(src), hidden_size, is_aligned(src)};
  Bf16Sink to_bf16{static_cast<std::uint16_t*>(dst), hidden_size, is_aligned(dst)};
  Fp32Sink to_fp32{static_cast<float*>(dst), hidden_size, is_aligned(dst)};
  Fp8Sink to_fp8{static_cast<std::uint8_t*>(dst), hidden_size, format};
  if (dst_dtype == DType::kFp8) {
    if (src_dtype == DType::kBf16) return convert_columns(block, bf16, to_fp8, hidden_size);
    return convert_columns(block, fp32, to_fp8, hidden_size);
  }
  if (dst_dtype == DType::kBf16) {
    if (src_dtype == DType::kFp8) return convert_columns(block, fp8, to_bf16, hidden_size);
    return convert_columns(block, fp32, to_bf16, hidden_size);
  }
  if (src_dtype == DType::kFp8) return convert_columns(block, fp8, to_fp32, hidden_size);
  convert_columns(block, bf16, to_fp32, hidden_size);
}

}  // namespace moe_efa::kernels::cuda
