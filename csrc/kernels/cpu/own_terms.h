// OwnTerms: walks the rows of one chunk of a source that this rank has experts for, in row order, and adds each row's
// terms in (expert, top-k position) order: the first of the three sums of a combine.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/launch.h"

namespace moe_efa::kernels::cpu {

class OwnTerms {
 public:
  OwnTerms(const CombineArgs& combine, const proto::LayoutConfig& config, std::size_t ring, std::uint32_t chunk);

  // Moves to the next row with a term; false when there is none.
  bool next();
  std::uint32_t row() const { return row_; }  // within the chunk
  // The weighted sum, rounded to the dtype of publishing.
  void sum_to(std::byte* dst) const;
  // [top_k]: gradients of the weights at the positions of own experts, zeros elsewhere.
  const float* weight_grads() const { return weight_grads_; }

 private:
  const CombineArgs& combine_;
  const proto::LayoutConfig& config_;
  const std::vector<PullEntry>& pulls_;
  std::uint64_t y_stride_;
  std::size_t at_ = 0;
  std::uint32_t row_ = 0, count_ = 0;
  const void* rows_[proto::kMaxTopK];
  float weights_[proto::kMaxTopK];
  float weight_grads_[proto::kMaxTopK];
};

}  // namespace moe_efa::kernels::cpu
