#include "kernels/cpu/node_sums.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "common/check.h"
#include "kernels/cpu/rows.h"

namespace moe_efa::kernels::cpu {

NodeSums::NodeSums(const CombineArgs& combine, const proto::NodeView& view, std::uint32_t source_node,
                   std::uint32_t chunk, std::uint64_t seq)
    : combine_(combine),
      config_(view.layout.config()),
      facts_(combine.plan->rings[std::size_t{view.topology.local_rank()} * config_.num_nodes + source_node]),
      own_local_(view.topology.local_rank()),
      source_node_(source_node),
      chunk_(chunk),
      row_bytes_(proto::hidden_row_bytes(config_.hidden_size, proto::publish_dtype(combine.wire_dtype))),
      own_(combine, config_, std::size_t{own_local_} * config_.num_nodes + source_node, chunk),
      own_row_(row_bytes_) {
  for (std::uint32_t mate = 0; mate < config_.node_size; ++mate) {
    published_[mate] = view.slots(mate) + view.layout.publish_slot(own_local_, source_node, seq);
  }
}

void NodeSums::next(std::byte* dst, float* weight_grads) {
  const void* rows[kMaxNodeSize];
  std::uint32_t count = 0;
  bool grads = combine_.weight_grads != nullptr;
  if (grads) std::fill_n(weight_grads, config_.top_k, 0.0f);
  auto add_grads = [&](const float* part) {  // each position has one owner; the others hold zeros
    for (std::uint32_t k = 0; k < config_.top_k; ++k) weight_grads[k] += part[k];
  };
  std::uint64_t mask = combine_.plan->mask(source_node_, facts_.first_row(chunk_) + row_);
  for (; mask != 0; mask &= mask - 1) {
    auto mate = static_cast<std::uint32_t>(std::countr_zero(mask));
    if (mate == own_local_) {
      MOE_EFA_CHECK(own_.next() && own_.row() == row_, "the masks of a plan differ from its pulls");
      own_.sum_to(own_row_.data());
      rows[count++] = own_row_.data();
      if (grads) add_grads(own_.weight_grads());
      continue;
    }
    rows[count++] = published_[mate] + row_ * row_bytes_;
    if (grads) {
      float part[proto::kMaxTopK];
      std::memcpy(
          part,
          published_[mate] + facts_.rows_in(chunk_) * row_bytes_ + std::size_t{row_} * config_.top_k * sizeof(float),
          config_.top_k * sizeof(float));
      add_grads(part);
    }
  }
  sum_rows({dst, combine_.wire_dtype, rows, nullptr, count, proto::publish_dtype(combine_.wire_dtype),
            config_.hidden_size, config_.fp8_scale});
  ++row_;
}

}  // namespace moe_efa::kernels::cpu
