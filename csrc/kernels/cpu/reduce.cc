#include "kernels/cpu/reduce.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/mutant.h"
#include "kernels/cpu/rows.h"

namespace moe_efa::kernels::cpu {

using common::Mutant;
using common::mutant;

void reduce_tokens(const ReduceArgs& args, const proto::NodeView& view) {
  const CombineArgs& combine = *args.combine;
  const proto::LayoutConfig& config = view.layout.config();
  bool grads = combine.weight_grads != nullptr;
  std::uint64_t row_bytes = proto::hidden_row_bytes(config.hidden_size, combine.wire_dtype);
  std::uint64_t out_stride = std::uint64_t{config.hidden_size} * proto::dtype_bytes(combine.y_dtype);
  auto* out = static_cast<std::byte*>(combine.out);

  // A cursor per node: rows of a node are in token order, so the tokens merge them.
  std::vector<std::uint32_t> cursor(config.num_nodes);
  for (std::uint32_t node = 0; node < config.num_nodes; ++node) {
    const auto& tokens = combine.plan->send[node].row_token;
    cursor[node] =
        static_cast<std::uint32_t>(std::lower_bound(tokens.begin(), tokens.end(), args.token_begin) - tokens.begin());
  }
  std::vector<const void*> rows(config.num_nodes);
  for (std::uint32_t token = args.token_begin; token < args.token_end; ++token) {
    std::uint32_t count = 0;
    float sum[proto::kMaxTopK] = {};
    for (std::uint32_t i = 0; i < config.num_nodes; ++i) {
      std::uint32_t node = mutant(Mutant::kReduceInArrivalOrder) ? (view.topology.node() + i) % config.num_nodes : i;
      const SendPlan& send = combine.plan->send[node];
      std::uint32_t row = cursor[node];
      if (row == send.row_token.size() || send.row_token[row] != token) continue;
      ++cursor[node];
      std::uint32_t chunk = row / send.facts.rows_per_chunk, within = row - send.facts.first_row(chunk);
      const std::byte* hidden = view.own_slots() +
                                view.layout.ring_slot(proto::Phase::kCombine, node, args.first_seq[node] + chunk) +
                                sizeof(proto::ChunkHeader);
      rows[count++] = hidden + within * row_bytes;
      if (grads) {
        float part[proto::kMaxTopK];
        std::memcpy(part,
                    hidden + send.facts.rows_in(chunk) * row_bytes + std::size_t{within} * config.top_k * sizeof(float),
                    config.top_k * sizeof(float));
        for (std::uint32_t k = 0; k < config.top_k; ++k) sum[k] += part[k];
      }
    }
    sum_rows({out + token * out_stride, combine.y_dtype, rows.data(), nullptr, count, combine.wire_dtype,
              config.hidden_size, config.fp8_scale});
    if (grads) {
      std::memcpy(combine.topk_weight_grads + std::size_t{token} * config.top_k, sum, config.top_k * sizeof(float));
    }
  }
}

}  // namespace moe_efa::kernels::cpu
