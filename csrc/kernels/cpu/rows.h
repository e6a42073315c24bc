// Row loops of the CPU kernels: copy with conversion, and the one fixed-order sum that publish, forward and reduce
// share. Compiled for several instruction sets, chosen at load time.
#pragma once

#include <cstdint>

#include "proto/chunk.h"

namespace moe_efa::kernels::cpu {

// dst[i] = src[i], rounded to dst_dtype. FP8 rows are rows of the wire, with their scales; one of the two may be FP8.
void convert_row(void* dst, proto::DType dst_dtype, const void* src, proto::DType src_dtype, std::uint32_t hidden_size,
                 proto::Fp8Scale fp8_scale);

struct SumRowsArgs {
  void* dst;
  proto::DType dst_dtype;
  const void* const* rows;  // [num_rows], summed in this order
  const float* weights;     // [num_rows], or null for a plain sum, as it has to be for FP8 rows
  std::uint32_t num_rows;
  proto::DType src_dtype;
  std::uint32_t hidden_size;
  proto::Fp8Scale fp8_scale;  // of an FP8 dst
};

// dst = round(((w0*r0) + (w1*r1)) + ...), each product and sum rounded to fp32. No rows give zeros.
void sum_rows(const SumRowsArgs& args);

}  // namespace moe_efa::kernels::cpu
