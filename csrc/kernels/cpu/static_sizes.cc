#include "kernels/cpu/static_sizes.h"

#include <algorithm>

#include "common/math.h"

namespace moe_efa::kernels::cpu {

StaticSizes::StaticSizes(const proto::NodeView& view)
    : topology_(view.topology),
      experts_per_rank_(view.layout.config().experts_per_rank),
      experts_per_node_(experts_per_rank_ * topology_.node_size),
      outputs_(topology_.node_size),
      counts_(std::size_t{topology_.num_ranks} * experts_per_node_),
      bases_(std::size_t{topology_.num_nodes()} * experts_per_node_) {}

void StaticSizes::set_output(std::uint32_t mate, std::uint32_t capacity, std::uint32_t expert_alignment) {
  outputs_[mate] = {expert_alignment, capacity - capacity % expert_alignment, 0};
}

void StaticSizes::set_counts(std::uint32_t source_rank, const std::uint32_t* counts) {
  std::copy_n(counts, experts_per_node_, counts_.begin() + std::size_t{source_rank} * experts_per_node_);
}

void StaticSizes::finish() {
  for (std::uint32_t expert = 0; expert < experts_per_node_; ++expert) {
    Output& output = outputs_[expert / experts_per_rank_];
    std::int64_t row = output.required;
    for (std::uint32_t source = 0; source < topology_.num_ranks; ++source) {
      if (source % topology_.node_size == topology_.local_rank()) {
        bases_[std::size_t{source / topology_.node_size} * experts_per_node_ + expert] = row;
      }
      row += counts_[std::size_t{source} * experts_per_node_ + expert];
    }
    output.required += common::round_up<std::int64_t>(row - output.required, output.alignment);
  }
  counts_ = {};
}

bool StaticSizes::any_lost() const {
  return std::any_of(outputs_.begin(), outputs_.end(),
                     [](const Output& output) { return output.required > output.usable; });
}

std::uint32_t StaticSizes::room(std::uint32_t source_node, std::uint32_t expert) const {
  std::int64_t first = bases_[std::size_t{source_node} * experts_per_node_ + expert];
  return static_cast<std::uint32_t>(std::max<std::int64_t>(0, outputs_[expert / experts_per_rank_].usable - first));
}

std::uint64_t StaticSizes::overflow(std::uint32_t source_node, std::uint32_t expert, std::uint32_t index) const {
  return index < room(source_node, expert) ? 0 : required(expert / experts_per_rank_);
}

}  // namespace moe_efa::kernels::cpu
