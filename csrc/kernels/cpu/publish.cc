#include "kernels/cpu/publish.h"

#include <cstring>

#include "kernels/cpu/rows.h"

namespace moe_efa::kernels::cpu {

void publish_chunk(const PublishArgs& args, const proto::NodeView& view) {
  const CombineArgs& combine = *args.combine;
  const proto::LayoutConfig& config = view.layout.config();
  std::size_t ring = std::size_t{args.source_local} * config.num_nodes + args.source_node;
  const std::vector<PullEntry>& pulls = combine.plan->pulls[ring][args.chunk];
  proto::DType publish_dtype = proto::publish_dtype(combine.wire_dtype);
  std::uint64_t row_bytes = proto::hidden_row_bytes(config.hidden_size, publish_dtype);
  std::uint64_t y_stride = std::uint64_t{config.hidden_size} * proto::dtype_bytes(combine.y_dtype);
  const auto* y = static_cast<const std::byte*>(combine.y);
  std::byte* grads = args.slot + combine.plan->rings[ring].rows_in(args.chunk) * row_bytes;

  const void* rows[proto::kMaxTopK];
  float weights[proto::kMaxTopK];
  for (std::size_t begin = 0; begin < pulls.size();) {
    std::uint32_t row = pulls[begin].row();
    std::uint32_t count = 0;
    float weight_grads[proto::kMaxTopK] = {};
    for (; begin < pulls.size() && pulls[begin].row() == row; ++begin, ++count) {
      std::uint32_t out_row = pulls[begin].out_row;
      rows[count] = y + out_row * y_stride;
      if (combine.weights != nullptr) weights[count] = combine.weights[out_row];
      if (combine.weight_grads != nullptr) weight_grads[pulls[begin].topk_pos()] = combine.weight_grads[out_row];
    }
    sum_rows({args.slot + row * row_bytes, publish_dtype, rows, combine.weights != nullptr ? weights : nullptr, count,
              combine.y_dtype, config.hidden_size, config.fp8_scale});
    if (combine.weight_grads != nullptr) {
      std::memcpy(grads + std::size_t{row} * config.top_k * sizeof(float), weight_grads, config.top_k * sizeof(float));
    }
  }
}

}  // namespace moe_efa::kernels::cpu
