// NodeSums: per row of one chunk of a source on this rank's rail, the sum over the ranks of this node in rank order.
// What the mates have published is read from their regions; the own term is added up on the spot and never stored.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/own_terms.h"
#include "kernels/launch.h"

namespace moe_efa::kernels::cpu {

class NodeSums {
 public:
  NodeSums(const CombineArgs& combine, const proto::NodeView& view, std::uint32_t source_node, std::uint32_t chunk,
           std::uint64_t seq);

  // The next row of the chunk, from row 0 on: its sum, rounded to the combine dtype, into `dst`, and the gradients of
  // its weights into `weight_grads` [top_k], where they travel.
  void next(std::byte* dst, float* weight_grads);

 private:
  const CombineArgs& combine_;
  const proto::LayoutConfig& config_;
  const RingFacts& facts_;
  std::uint32_t own_local_, source_node_, chunk_;
  std::uint64_t row_bytes_;
  const std::byte* published_[kMaxNodeSize];
  OwnTerms own_;
  std::vector<std::byte> own_row_;
  std::uint32_t row_ = 0;
};

}  // namespace moe_efa::kernels::cpu
