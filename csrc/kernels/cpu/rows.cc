#include "kernels/cpu/rows.h"

#include <algorithm>
#include <cstring>

#include "common/check.h"
#include "kernels/cpu/clones.h"
#include "kernels/cpu/quantize.h"
#include "kernels/row_math.h"

namespace moe_efa::kernels::cpu {

using proto::DType;

namespace {

constexpr std::uint32_t kBlock = 512;  // columns summed at a time: the accumulator stays in the first-level cache
static_assert(kBlock % proto::kFp8BlockSize == 0);
constexpr std::uint32_t kRowsPerPass = 4;  // rows that share one load and store of the accumulator

// dst = ((sum + w0*r0) + w1*r1) + ...; without a sum when this is the first pass. A weight of 1 changes no bit.
template <typename In, typename Out, std::uint32_t kRows, bool kFirst>
inline __attribute__((always_inline)) void add_rows(Out* dst, const float* sum, const void* const* rows,
                                                    const float* weights, std::uint32_t begin, std::uint32_t count) {
  const In* row[kRows];
  float weight[kRows];
  for (std::uint32_t k = 0; k < kRows; ++k) {
    row[k] = static_cast<const In*>(rows[k]) + begin;
    weight[k] = weights[k];
  }
#pragma GCC ivdep
  for (std::uint32_t i = 0; i < count; ++i) {
    float total = multiply(weight[0], widen(row[0][i]));
    if (!kFirst) total = add(sum[i], total);
#pragma GCC unroll 4
    for (std::uint32_t k = 1; k < kRows; ++k) {
      total = add(total, multiply(weight[k], widen(row[k][i])));
    }
    narrow(dst + i, total);
  }
}

template <typename Out>
using AddRows = void (*)(Out*, const float*, const void* const*, const float*, std::uint32_t, std::uint32_t);

// The loader's choice works on functions, not on templates: one name each.
#define MOE_EFA_ADD_ROWS(name, In, Out, kRows, kFirst)                                                \
  MOE_EFA_CLONES void name(Out* dst, const float* sum, const void* const* rows, const float* weights, \
                           std::uint32_t begin, std::uint32_t count) {                                \
    add_rows<In, Out, kRows, kFirst>(dst, sum, rows, weights, begin, count);                          \
  }
#define MOE_EFA_ADD_ROWS_TABLE(name, In, Out)                                                                   \
  MOE_EFA_ADD_ROWS(name##_first_1, In, Out, 1, true)                                                            \
  MOE_EFA_ADD_ROWS(name##_first_2, In, Out, 2, true)                                                            \
  MOE_EFA_ADD_ROWS(name##_first_3, In, Out, 3, true)                                                            \
  MOE_EFA_ADD_ROWS(name##_first_4, In, Out, 4, true)                                                            \
  MOE_EFA_ADD_ROWS(name##_next_1, In, Out, 1, false)                                                            \
  MOE_EFA_ADD_ROWS(name##_next_2, In, Out, 2, false)                                                            \
  MOE_EFA_ADD_ROWS(name##_next_3, In, Out, 3, false)                                                            \
  MOE_EFA_ADD_ROWS(name##_next_4, In, Out, 4, false)                                                            \
  constexpr AddRows<Out> name[2][kRowsPerPass] = {{name##_next_1, name##_next_2, name##_next_3, name##_next_4}, \
                                                  {name##_first_1, name##_first_2, name##_first_3, name##_first_4}};

MOE_EFA_ADD_ROWS_TABLE(bf16_to_bf16_sum, std::uint16_t, std::uint16_t)
MOE_EFA_ADD_ROWS_TABLE(bf16_to_fp32_sum, std::uint16_t, float)
MOE_EFA_ADD_ROWS_TABLE(fp32_to_bf16_sum, float, std::uint16_t)
MOE_EFA_ADD_ROWS_TABLE(fp32_to_fp32_sum, float, float)

MOE_EFA_CLONES void bf16_to_fp32(float* __restrict dst, const std::uint16_t* __restrict src, std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; ++i) dst[i] = bf16_to_float(src[i]);
}

MOE_EFA_CLONES void fp32_to_bf16(std::uint16_t* __restrict dst, const float* __restrict src, std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; ++i) dst[i] = float_to_bf16(src[i]);
}

// `count` columns from `begin` into `out`, which may be `sum` itself.
template <typename Out>
void sum_columns(const SumRowsArgs& args, const AddRows<float> (&to_sum)[2][kRowsPerPass],
                 const AddRows<Out> (&to_out)[2][kRowsPerPass], Out* out, float* sum, std::uint32_t begin,
                 std::uint32_t count) {
  static constexpr float kOnes[kRowsPerPass] = {1, 1, 1, 1};
  for (std::uint32_t row = 0; row < args.num_rows; row += kRowsPerPass) {
    std::uint32_t left = args.num_rows - row;
    const float* weights = args.weights != nullptr ? args.weights + row : kOnes;
    if (left > kRowsPerPass) {
      to_sum[row == 0][kRowsPerPass - 1](sum, sum, args.rows + row, weights, begin, count);
    } else {
      to_out[row == 0][left - 1](out, sum, args.rows + row, weights, begin, count);
    }
  }
}

template <typename Out>
void sum_in_passes(const SumRowsArgs& args, const AddRows<float> (&to_sum)[2][kRowsPerPass],
                   const AddRows<Out> (&to_out)[2][kRowsPerPass]) {
  auto* out = static_cast<Out*>(args.dst);
  alignas(64) float sum[kBlock];
  // Few rows need no accumulator, and so no blocks.
  std::uint32_t block = args.num_rows <= kRowsPerPass ? args.hidden_size : kBlock;
  for (std::uint32_t begin = 0; begin < args.hidden_size; begin += block) {
    std::uint32_t count = args.hidden_size - begin < block ? args.hidden_size - begin : block;
    sum_columns(args, to_sum, to_out, out + begin, sum, begin, count);
  }
}

// The sum of a block goes from the first-level cache into its codes.
void sum_to_fp8(const SumRowsArgs& args, const AddRows<float> (&to_sum)[2][kRowsPerPass]) {
  Fp8Row out = fp8_row(args.dst, args.hidden_size);
  alignas(64) float sum[kBlock];
  for (std::uint32_t begin = 0; begin < args.hidden_size; begin += kBlock) {
    std::uint32_t count = std::min(kBlock, args.hidden_size - begin);
    sum_columns(args, to_sum, to_sum, sum, sum, begin, count);
    quantize_columns(out, begin, sum, DType::kFp32, count, args.fp8_scale);
  }
}

void sum_of_fp8(const SumRowsArgs& args) {
  MOE_EFA_CHECK(args.weights == nullptr, "FP8 rows are summed without weights");
  auto* out = static_cast<std::byte*>(args.dst);
  alignas(64) float sum[kBlock];
  for (std::uint32_t begin = 0; begin < args.hidden_size; begin += kBlock) {
    std::uint32_t count = std::min(kBlock, args.hidden_size - begin);
    for (std::uint32_t row = 0; row < args.num_rows; ++row) {
      add_dequantized(sum, row == 0, args.rows[row], args.hidden_size, begin, count);
    }
    convert_row(out + std::size_t{begin} * proto::dtype_bytes(args.dst_dtype), args.dst_dtype, sum, DType::kFp32, count,
                args.fp8_scale);
  }
}

}  // namespace

void convert_row(void* dst, DType dst_dtype, const void* src, DType src_dtype, std::uint32_t hidden_size,
                 proto::Fp8Scale fp8_scale) {
  if (dst_dtype == DType::kFp8) {
    MOE_EFA_CHECK(src_dtype != DType::kFp8, "FP8 rows are not converted to FP8");
    quantize_columns(fp8_row(dst, hidden_size), 0, src, src_dtype, hidden_size, fp8_scale);
  } else if (src_dtype == DType::kFp8) {
    dequantize_row(dst, dst_dtype, src, hidden_size);
  } else if (dst_dtype == src_dtype) {
    std::memcpy(dst, src, std::size_t{hidden_size} * proto::dtype_bytes(dst_dtype));
  } else if (dst_dtype == DType::kFp32) {
    bf16_to_fp32(static_cast<float*>(dst), static_cast<const std::uint16_t*>(src), hidden_size);
  } else {
    fp32_to_bf16(static_cast<std::uint16_t*>(dst), static_cast<const float*>(src), hidden_size);
  }
}

void sum_rows(const SumRowsArgs& args) {
  if (args.num_rows == 0) {
    if (args.dst_dtype == DType::kFp8) return clear_fp8_row(fp8_row(args.dst, args.hidden_size), args.hidden_size);
    std::memset(args.dst, 0, std::size_t{args.hidden_size} * proto::dtype_bytes(args.dst_dtype));
    return;
  }
  if (args.num_rows == 1 && args.weights == nullptr) {
    convert_row(args.dst, args.dst_dtype, args.rows[0], args.src_dtype, args.hidden_size, args.fp8_scale);
    return;
  }
  if (args.dst_dtype == DType::kFp8) {
    return sum_to_fp8(args, args.src_dtype == DType::kBf16 ? bf16_to_fp32_sum : fp32_to_fp32_sum);
  }
  if (args.src_dtype == DType::kFp8) return sum_of_fp8(args);
  bool bf16_in = args.src_dtype == DType::kBf16, bf16_out = args.dst_dtype == DType::kBf16;
  if (bf16_in && bf16_out) return sum_in_passes<std::uint16_t>(args, bf16_to_fp32_sum, bf16_to_bf16_sum);
  if (bf16_in) return sum_in_passes<float>(args, bf16_to_fp32_sum, bf16_to_fp32_sum);
  if (bf16_out) return sum_in_passes<std::uint16_t>(args, fp32_to_fp32_sum, fp32_to_bf16_sum);
  sum_in_passes<float>(args, fp32_to_fp32_sum, fp32_to_fp32_sum);
}

}  // namespace moe_efa::kernels::cpu
