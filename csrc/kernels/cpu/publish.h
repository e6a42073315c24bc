// publish: an expert rank's contribution to one chunk of a source: per row, the sum over its own experts in
// (expert, top-k position) order, rounded to the publish dtype, and the gradients of the weights.
#pragma once

#include <cstdint>

#include "kernels/launch.h"

namespace moe_efa::kernels::cpu {

struct PublishArgs {
  const CombineArgs* combine = nullptr;
  std::uint32_t source_local = 0;
  std::uint32_t source_node = 0;
  std::uint32_t chunk = 0;
  std::byte* slot = nullptr;  // hidden[rows] | float weight_grad[rows][top_k]
};

void publish_chunk(const PublishArgs& args, const proto::NodeView& view);

}  // namespace moe_efa::kernels::cpu
