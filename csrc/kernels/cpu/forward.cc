#include "kernels/cpu/forward.h"

#include <cstring>
#include <vector>

#include "common/mutant.h"
#include "kernels/cpu/node_sums.h"
#include "kernels/cpu/rows.h"

namespace moe_efa::kernels::cpu {

using common::Mutant;
using common::mutant;

namespace {

const RingFacts& ring_facts(const ForwardArgs& args, const proto::NodeView& view) {
  return args.combine->plan
      ->rings[std::size_t{view.topology.local_rank()} * view.topology.num_nodes() + args.source_node];
}

}  // namespace

std::uint32_t forward_chunk(const ForwardArgs& args, const proto::NodeView& view) {
  const CombineArgs& combine = *args.combine;
  const proto::LayoutConfig& config = view.layout.config();
  const RingFacts& facts = ring_facts(args, view);
  std::uint32_t num_rows = facts.rows_in(args.chunk);
  bool grads = combine.weight_grads != nullptr;
  std::uint64_t row_bytes = proto::hidden_row_bytes(config.hidden_size, combine.wire_dtype);

  proto::ChunkHeader header{};
  header.magic = proto::kChunkMagic;
  header.version = proto::kProtocolVersion;
  header.phase = static_cast<std::uint8_t>(proto::Phase::kCombine);
  header.flags = static_cast<std::uint8_t>((grads ? proto::kFlagWeightGrads : 0) |
                                           (args.chunk + 1 == facts.num_chunks ? proto::kFlagLast : 0));
  header.source_rank = view.topology.rank;
  header.dtype = static_cast<std::uint32_t>(combine.wire_dtype);
  header.epoch = args.epoch;
  header.seq = args.seq;
  header.plan_id = combine.plan->plan_id;
  header.rows = num_rows;
  header.first_row = facts.first_row(args.chunk);
  header.total_bytes = static_cast<std::uint32_t>(proto::combine_chunk_bytes(grads, num_rows, config.top_k, row_bytes));
  if (!mutant(Mutant::kOverflowUntold)) {
    header.required_capacity = combine.plan->overflow_of(args.source_node, args.chunk);
  }
  std::memcpy(args.slot, &header, sizeof(header));

  std::byte* hidden = args.slot + sizeof(header);
  std::byte* out_grads = hidden + num_rows * row_bytes;
  NodeSums sums(combine, view, args.source_node, args.chunk, args.seq);
  for (std::uint32_t row = 0; row < num_rows; ++row) {
    float row_grads[proto::kMaxTopK];
    sums.next(hidden + row * row_bytes, row_grads);
    if (grads) {
      std::memcpy(out_grads + std::size_t{row} * config.top_k * sizeof(float), row_grads, config.top_k * sizeof(float));
    }
  }
  return header.total_bytes;
}

void forward_to_output(const ForwardArgs& args, const proto::NodeView& view) {
  const CombineArgs& combine = *args.combine;
  const proto::LayoutConfig& config = view.layout.config();
  const RingFacts& facts = ring_facts(args, view);
  std::uint64_t out_stride = std::uint64_t{config.hidden_size} * proto::dtype_bytes(combine.y_dtype);
  bool converts = combine.wire_dtype != combine.y_dtype;
  std::vector<std::byte> node_sum(converts ? proto::hidden_row_bytes(config.hidden_size, combine.wire_dtype) : 0);
  NodeSums sums(combine, view, args.source_node, args.chunk, args.seq);
  for (std::uint32_t row = 0; row < facts.rows_in(args.chunk); ++row) {
    std::uint32_t token = combine.plan->send[args.source_node].row_token[facts.first_row(args.chunk) + row];
    std::byte* out = static_cast<std::byte*>(combine.out) + token * out_stride;
    float* out_grads =
        combine.weight_grads == nullptr ? nullptr : combine.topk_weight_grads + std::size_t{token} * config.top_k;
    sums.next(converts ? node_sum.data() : out, out_grads);
    if (converts) {
      convert_row(out, combine.y_dtype, node_sum.data(), combine.wire_dtype, config.hidden_size, config.fp8_scale);
    }
  }
}

}  // namespace moe_efa::kernels::cpu
