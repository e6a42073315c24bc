// reduce: the final sum of a token over nodes in ascending order, in fp32, rounded once to the output.
#pragma once

#include <cstdint>

#include "kernels/launch.h"

namespace moe_efa::kernels::cpu {

struct ReduceArgs {
  const CombineArgs* combine = nullptr;
  const std::uint64_t* first_seq = nullptr;  // [num_nodes]: ring position of the epoch's first chunk
  std::uint32_t token_begin = 0;
  std::uint32_t token_end = 0;
};

// Every chunk that holds a row of these tokens has arrived.
void reduce_tokens(const ReduceArgs& args, const proto::NodeView& view);

}  // namespace moe_efa::kernels::cpu
