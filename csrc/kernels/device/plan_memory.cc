#include "kernels/device/plan_memory.h"

#include <algorithm>

namespace moe_efa::kernels::device {

namespace {

// Offsets in the second block.
struct PullOffsets {
  std::size_t pull_begin, pull_count, pulls, masks, chunk_overflow, end;
};

std::size_t num_pulls(const Plan& plan) {
  std::size_t rows = 0;
  for (std::int64_t count : plan.tokens_per_expert) rows += static_cast<std::size_t>(count);
  return rows;
}

PullOffsets offsets_of(const Plan& plan, const proto::LayoutConfig& config, std::uint32_t local_rank) {
  std::size_t chunks = 0, most_chunks = 0, masks = 0;
  for (const RingFacts& ring : plan.rings) {
    chunks += ring.num_chunks;
    most_chunks = std::max<std::size_t>(most_chunks, ring.num_chunks);
  }
  for (std::uint32_t node = 0; node < config.num_nodes; ++node) {
    masks += std::size_t{plan.rings[local_rank * config.num_nodes + node].rows} * plan.mask_bytes;
  }
  PullOffsets offsets{};
  std::size_t end = table_bytes(config);
  auto take = [&end](std::size_t bytes) {
    std::size_t at = end;
    end += aligned(bytes);
    return at;
  };
  offsets.pull_begin = take(chunks * 4);
  offsets.pull_count = take(chunks * 4);
  offsets.pulls = take(num_pulls(plan) * sizeof(PullEntry));
  offsets.masks = take(masks);
  offsets.chunk_overflow = take(plan.is_static() ? config.num_nodes * most_chunks * 8 : 0);
  offsets.end = end;
  return offsets;
}

}  // namespace

std::size_t send_bytes(const proto::LayoutConfig& config, std::uint32_t num_tokens) {
  return aligned(config.num_nodes * sizeof(cuda::SendView)) + aligned(cuda::plan_rows(config, num_tokens) * 4);
}

SendMemory place_send(const proto::LayoutConfig& config, std::byte* memory) {
  return {reinterpret_cast<cuda::SendView*>(memory),
          reinterpret_cast<std::uint32_t*>(memory + aligned(config.num_nodes * sizeof(cuda::SendView)))};
}

std::size_t table_bytes(const proto::LayoutConfig& config) {
  std::size_t rings = std::size_t{config.node_size} * config.num_nodes;
  return aligned(rings * sizeof(cuda::RingView)) + aligned(config.num_nodes * 4) + aligned(8);
}

std::size_t pull_bytes(const Plan& plan, const proto::LayoutConfig& config, std::uint32_t local_rank) {
  return offsets_of(plan, config, local_rank).end;
}

std::size_t most_pull_bytes(const proto::LayoutConfig& config, std::int64_t capacity, std::uint32_t max_tokens,
                            std::uint32_t most_chunks) {
  std::size_t nodes = config.num_nodes, chunks = nodes * config.node_size * most_chunks;
  return table_bytes(config) + 2 * aligned(chunks * 4) +
         aligned(static_cast<std::size_t>(capacity) * sizeof(PullEntry)) +
         aligned(nodes * max_tokens * common::ceil_div(config.node_size, 8u)) + aligned(nodes * most_chunks * 8);
}

void place_pulls(const Plan& plan, const proto::LayoutConfig& config, std::uint32_t local_rank,
                 const std::uint32_t* pulls, std::byte* memory, Upload& tables, cuda::PlanView* view) {
  PullOffsets offsets = offsets_of(plan, config, local_rank);
  view->num_tokens = plan.num_tokens;
  view->num_nodes = config.num_nodes;
  view->num_rings = static_cast<std::uint32_t>(plan.rings.size());
  view->mask_bytes = plan.mask_bytes;
  view->num_chunks = view->ring_chunks = 0;
  std::uint64_t* overflow_placed;
  std::uint64_t* overflow = tables.add<std::uint64_t>(1, &overflow_placed);
  *overflow = plan.is_static() ? static_cast<std::uint64_t>(*plan.overflow) : 0;  // of this rank's experts
  view->overflow = plan.is_static() ? overflow_placed : nullptr;
  cuda::RingView* rings_placed;
  cuda::RingView* rings = tables.add<cuda::RingView>(plan.rings.size(), &rings_placed);
  std::uint32_t first_pull = 0;
  for (std::size_t i = 0; i < plan.rings.size(); ++i) {
    rings[i] = {plan.rings[i], view->num_chunks, first_pull, pulls[i]};
    view->num_chunks += plan.rings[i].num_chunks;
    view->ring_chunks = std::max(view->ring_chunks, plan.rings[i].num_chunks);
    first_pull += pulls[i];
  }
  std::uint32_t *masks_placed, first_mask = 0;
  std::uint32_t* masks = tables.add<std::uint32_t>(config.num_nodes, &masks_placed);
  for (std::uint32_t node = 0; node < config.num_nodes; ++node) {
    masks[node] = first_mask;
    first_mask += plan.rings[local_rank * config.num_nodes + node].rows * plan.mask_bytes;
  }
  view->rings = rings_placed;
  view->first_mask = masks_placed;
  view->pull_begin = reinterpret_cast<std::uint32_t*>(memory + offsets.pull_begin);
  view->pull_count = reinterpret_cast<std::uint32_t*>(memory + offsets.pull_count);
  view->pulls = reinterpret_cast<PullEntry*>(memory + offsets.pulls);
  view->masks = reinterpret_cast<std::uint8_t*>(memory + offsets.masks);
  view->chunk_overflow = plan.is_static() ? reinterpret_cast<std::uint64_t*>(memory + offsets.chunk_overflow) : nullptr;
}

}  // namespace moe_efa::kernels::device
