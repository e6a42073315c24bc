// forward: one combine chunk for a source on this rank's rail: per row, the sum over the ranks of this node, rounded to
// the combine dtype, into a send slot or the own ring; where there is one node only, straight into the output.
#pragma once

#include <cstdint>

#include "kernels/launch.h"

namespace moe_efa::kernels::cpu {

struct ForwardArgs {
  const CombineArgs* combine = nullptr;
  std::uint32_t source_node = 0;
  std::uint32_t chunk = 0;
  std::uint64_t seq = 0;
  std::uint64_t epoch = 0;
  std::byte* slot = nullptr;
};

// Returns the bytes of the chunk.
std::uint32_t forward_chunk(const ForwardArgs& args, const proto::NodeView& view);

// The only node: its sums are the results (one term, one more rounding where y has another dtype). No slot is used.
void forward_to_output(const ForwardArgs& args, const proto::NodeView& view);

}  // namespace moe_efa::kernels::cpu
