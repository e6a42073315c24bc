#include "kernels/cpu/plan.h"

#include <sstream>

#include "common/status.h"

namespace moe_efa::kernels::cpu {

namespace {

struct Choice {
  std::uint32_t expert;
  std::uint16_t topk_pos;
};

}  // namespace

std::shared_ptr<Plan> build_send_plan(const PlanArgs& args, const proto::NodeView& view) {
  const proto::LayoutConfig& config = view.layout.config();
  std::uint32_t experts_per_node = config.experts_per_rank * config.node_size;
  std::int64_t num_experts = std::int64_t{experts_per_node} * config.num_nodes;
  auto plan = std::make_shared<Plan>();
  plan->num_tokens = args.num_tokens;
  plan->expert_alignment = args.expert_alignment;
  plan->capacity = args.capacity;
  if (plan->is_static()) plan->overflow = std::make_shared<std::int64_t>(0);
  plan->send.resize(config.num_nodes);
  for (SendPlan& send : plan->send) {
    send.entry_begin.push_back(0);
    send.expert_counts.assign(experts_per_node, 0);
  }
  Choice choices[proto::kMaxTopK];
  for (std::uint32_t token = 0; token < args.num_tokens; ++token) {
    std::uint32_t count = 0;
    for (std::uint32_t k = 0; k < config.top_k; ++k) {
      std::int64_t expert = args.topk_idx[std::size_t{token} * config.top_k + k];
      if (expert == -1) continue;
      if (expert < -1 || expert >= num_experts) {
        std::ostringstream text;
        text << "topk_idx[" << token << ", " << k << "] is " << expert << ", outside [-1, " << num_experts << ")";
        throw common::StatusError({common::StatusCode::kInvalid, -1, -1, -1, -1, text.str()});
      }
      // Insertion keeps (expert, top-k position) order.
      std::uint32_t at = count++;
      for (; at > 0 && choices[at - 1].expert > expert; --at) choices[at] = choices[at - 1];
      choices[at] = {static_cast<std::uint32_t>(expert), static_cast<std::uint16_t>(k)};
    }
    for (std::uint32_t i = 0; i < count;) {
      std::uint32_t node = choices[i].expert / experts_per_node;
      SendPlan& send = plan->send[node];
      for (; i < count && choices[i].expert / experts_per_node == node; ++i) {
        std::uint32_t expert = choices[i].expert - node * experts_per_node;
        send.entries.push_back({send.expert_counts[expert]++, static_cast<std::uint16_t>(expert), choices[i].topk_pos,
                                args.topk_weights[std::size_t{token} * config.top_k + choices[i].topk_pos]});
      }
      send.row_token.push_back(token);
      send.entry_begin.push_back(static_cast<std::uint32_t>(send.entries.size()));
    }
  }
  for (SendPlan& send : plan->send) {
    auto rows = static_cast<std::uint32_t>(send.row_token.size());
    if (rows == 0) continue;
    std::uint32_t per_chunk = proto::rows_per_chunk(rows, args.num_nics, config.chunk_rows);
    send.facts = {rows, per_chunk, common::ceil_div(rows, per_chunk)};
  }
  return plan;
}

}  // namespace moe_efa::kernels::cpu
