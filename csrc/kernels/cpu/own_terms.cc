#include "kernels/cpu/own_terms.h"

#include <algorithm>

#include "kernels/cpu/rows.h"

namespace moe_efa::kernels::cpu {

OwnTerms::OwnTerms(const CombineArgs& combine, const proto::LayoutConfig& config, std::size_t ring, std::uint32_t chunk)
    : combine_(combine),
      config_(config),
      pulls_(combine.plan->pulls[ring][chunk]),
      y_stride_(std::uint64_t{config.hidden_size} * proto::dtype_bytes(combine.y_dtype)) {}

bool OwnTerms::next() {
  if (at_ == pulls_.size()) return false;
  row_ = pulls_[at_].row();
  count_ = 0;
  if (combine_.weight_grads != nullptr) std::fill_n(weight_grads_, config_.top_k, 0.0f);
  for (; at_ < pulls_.size() && pulls_[at_].row() == row_; ++at_, ++count_) {
    std::uint32_t out_row = pulls_[at_].out_row;
    rows_[count_] = static_cast<const std::byte*>(combine_.y) + out_row * y_stride_;
    if (combine_.weights != nullptr) weights_[count_] = combine_.weights[out_row];
    if (combine_.weight_grads != nullptr) weight_grads_[pulls_[at_].topk_pos()] = combine_.weight_grads[out_row];
  }
  return true;
}

void OwnTerms::sum_to(std::byte* dst) const {
  sum_rows({dst, proto::publish_dtype(combine_.wire_dtype), rows_, combine_.weights != nullptr ? weights_ : nullptr,
            count_, combine_.y_dtype, config_.hidden_size, config_.fp8_scale});
}

}  // namespace moe_efa::kernels::cpu
