#include "kernels/cpu/forward.h"

#include <bit>
#include <cstring>

#include "kernels/cpu/rows.h"

namespace moe_efa::kernels::cpu {

std::uint32_t forward_chunk(const ForwardArgs& args, const proto::NodeView& view) {
  const CombineArgs& combine = *args.combine;
  const proto::LayoutConfig& config = view.layout.config();
  std::uint32_t local = view.topology.local_rank();
  const RingFacts& facts = combine.plan->rings[std::size_t{local} * config.num_nodes + args.source_node];
  std::uint32_t first = facts.first_row(args.chunk), num_rows = facts.rows_in(args.chunk);
  bool grads = combine.weight_grads != nullptr;
  std::uint64_t row_bytes = proto::hidden_row_bytes(config.hidden_size, combine.wire_dtype);
  proto::DType publish_dtype = proto::publish_dtype(combine.wire_dtype);
  std::uint64_t published_row_bytes = proto::hidden_row_bytes(config.hidden_size, publish_dtype);

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
  header.first_row = first;
  header.total_bytes = static_cast<std::uint32_t>(proto::combine_chunk_bytes(grads, num_rows, config.top_k, row_bytes));
  std::memcpy(args.slot, &header, sizeof(header));

  const std::byte* published[kMaxNodeSize];
  for (std::uint32_t mate = 0; mate < config.node_size; ++mate) {
    published[mate] = view.region(mate) + view.layout.publish_slot(local, args.source_node, args.seq);
  }
  std::byte* hidden = args.slot + sizeof(header);
  std::byte* out_grads = hidden + num_rows * row_bytes;
  for (std::uint32_t row = 0; row < num_rows; ++row) {
    const void* rows[kMaxNodeSize];
    std::uint32_t count = 0;
    float sum[proto::kMaxTopK] = {};
    for (std::uint64_t mask = combine.plan->mask(args.source_node, first + row); mask != 0; mask &= mask - 1) {
      const std::byte* base = published[std::countr_zero(mask)];
      rows[count++] = base + row * published_row_bytes;
      if (grads) {  // each position has one owner; the others hold zeros
        float part[proto::kMaxTopK];
        std::memcpy(part, base + num_rows * published_row_bytes + std::size_t{row} * config.top_k * sizeof(float),
                    config.top_k * sizeof(float));
        for (std::uint32_t k = 0; k < config.top_k; ++k) sum[k] += part[k];
      }
    }
    sum_rows({hidden + row * row_bytes, combine.wire_dtype, rows, nullptr, count, publish_dtype, config.hidden_size,
              config.fp8_scale});
    if (grads)
      std::memcpy(out_grads + std::size_t{row} * config.top_k * sizeof(float), sum, config.top_k * sizeof(float));
  }
  return header.total_bytes;
}

}  // namespace moe_efa::kernels::cpu
