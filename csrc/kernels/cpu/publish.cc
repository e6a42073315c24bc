#include "kernels/cpu/publish.h"

#include <cstring>

#include "kernels/cpu/own_terms.h"

namespace moe_efa::kernels::cpu {

void publish_chunk(const PublishArgs& args, const proto::NodeView& view) {
  const CombineArgs& combine = *args.combine;
  const proto::LayoutConfig& config = view.layout.config();
  std::size_t ring = std::size_t{args.source_local} * config.num_nodes + args.source_node;
  std::uint64_t row_bytes = proto::hidden_row_bytes(config.hidden_size, proto::publish_dtype(combine.wire_dtype));
  std::byte* grads = args.slot + combine.plan->rings[ring].rows_in(args.chunk) * row_bytes;
  for (OwnTerms terms(combine, config, ring, args.chunk); terms.next();) {
    terms.sum_to(args.slot + terms.row() * row_bytes);
    if (combine.weight_grads != nullptr) {
      std::memcpy(grads + std::size_t{terms.row()} * config.top_k * sizeof(float), terms.weight_grads(),
                  config.top_k * sizeof(float));
    }
  }
}

}  // namespace moe_efa::kernels::cpu
