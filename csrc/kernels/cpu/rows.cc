#include "kernels/cpu/rows.h"

#include <cstring>

#include "kernels/row_math.h"

// One source, several instruction sets: the loader picks. Sanitizers run before the resolver may, so not with them.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define MOE_EFA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MOE_EFA_CLONES
#endif

namespace moe_efa::kernels::cpu {

using proto::DType;

namespace {

constexpr std::uint32_t kBlock = 512;  // columns summed at a time: the accumulator stays in the first-level cache

MOE_EFA_CLONES void bf16_to_fp32(float* __restrict dst, const std::uint16_t* __restrict src, std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; ++i) dst[i] = bf16_to_float(src[i]);
}

MOE_EFA_CLONES void fp32_to_bf16(std::uint16_t* __restrict dst, const float* __restrict src, std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; ++i) dst[i] = float_to_bf16(src[i]);
}

MOE_EFA_CLONES void add_bf16(float* __restrict sum, const std::uint16_t* __restrict row, std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; ++i) sum[i] += bf16_to_float(row[i]);
}

MOE_EFA_CLONES void add_fp32(float* __restrict sum, const float* __restrict row, std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; ++i) sum[i] += row[i];
}

MOE_EFA_CLONES void scale_bf16(float* __restrict sum, const std::uint16_t* __restrict row, float weight,
                               std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; ++i) sum[i] = weight * bf16_to_float(row[i]);
}

MOE_EFA_CLONES void scale_fp32(float* __restrict sum, const float* __restrict row, float weight, std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; ++i) sum[i] = weight * row[i];
}

MOE_EFA_CLONES void add_scaled_bf16(float* __restrict sum, const std::uint16_t* __restrict row, float weight,
                                    std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; ++i) {
    float product = weight * bf16_to_float(row[i]);
    sum[i] += product;
  }
}

MOE_EFA_CLONES void add_scaled_fp32(float* __restrict sum, const float* __restrict row, float weight,
                                    std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; ++i) {
    float product = weight * row[i];
    sum[i] += product;
  }
}

}  // namespace

void convert_row(void* dst, DType dst_dtype, const void* src, DType src_dtype, std::uint32_t hidden_size) {
  if (dst_dtype == src_dtype) {
    std::memcpy(dst, src, std::size_t{hidden_size} * proto::dtype_bytes(dst_dtype));
  } else if (dst_dtype == DType::kFp32) {
    bf16_to_fp32(static_cast<float*>(dst), static_cast<const std::uint16_t*>(src), hidden_size);
  } else {
    fp32_to_bf16(static_cast<std::uint16_t*>(dst), static_cast<const float*>(src), hidden_size);
  }
}

void sum_rows(const SumRowsArgs& args) {
  if (args.num_rows == 0) {
    std::memset(args.dst, 0, std::size_t{args.hidden_size} * proto::dtype_bytes(args.dst_dtype));
    return;
  }
  if (args.num_rows == 1 && args.weights == nullptr) {
    convert_row(args.dst, args.dst_dtype, args.rows[0], args.src_dtype, args.hidden_size);
    return;
  }
  alignas(64) float sum[kBlock];
  for (std::uint32_t begin = 0; begin < args.hidden_size; begin += kBlock) {
    std::uint32_t count = args.hidden_size - begin < kBlock ? args.hidden_size - begin : kBlock;
    for (std::uint32_t i = 0; i < args.num_rows; ++i) {
      if (args.src_dtype == DType::kBf16) {
        const auto* row = static_cast<const std::uint16_t*>(args.rows[i]) + begin;
        if (args.weights == nullptr) {
          i == 0 ? bf16_to_fp32(sum, row, count) : add_bf16(sum, row, count);
        } else {
          i == 0 ? scale_bf16(sum, row, args.weights[i], count) : add_scaled_bf16(sum, row, args.weights[i], count);
        }
      } else {
        const auto* row = static_cast<const float*>(args.rows[i]) + begin;
        if (args.weights == nullptr) {
          i == 0 ? static_cast<void>(std::memcpy(sum, row, count * sizeof(float))) : add_fp32(sum, row, count);
        } else {
          i == 0 ? scale_fp32(sum, row, args.weights[i], count) : add_scaled_fp32(sum, row, args.weights[i], count);
        }
      }
    }
    if (args.dst_dtype == DType::kBf16) {
      fp32_to_bf16(static_cast<std::uint16_t*>(args.dst) + begin, sum, count);
    } else {
      std::memcpy(static_cast<float*>(args.dst) + begin, sum, count * sizeof(float));
    }
  }
}

}  // namespace moe_efa::kernels::cpu
