// The body of plan, for any Block (block.h). A warp has a range of tokens and looks at as many of them at a time as fit
// its lanes, one lane for each (token, position); lanes that chose alike find each other by match_any.
#pragma once

#include "kernels/cuda/plan.h"

namespace moe_efa::kernels::cuda {

// What a warp has seen so far, or what all before it have: [num_experts] rows | [nodes] rows | [nodes] entries.
struct PlanCounters {
  std::uint32_t* experts;
  std::uint32_t* rows;
  std::uint32_t* entries;
};

// Where a node's arrays begin in those of all nodes.
struct PlanOffsets {
  const std::uint32_t* rows;
  const std::uint32_t* entries;
};

// For one warp: tokens [begin, end) are counted, and where `kAssign` their rows and entries written.
template <bool kAssign, class Block>
MOE_EFA_DEVICE void plan_tokens(Block& block, const PlanArgs& args, std::uint32_t begin, std::uint32_t end,
                                const PlanCounters& counters, const PlanOffsets& offsets) {
  constexpr std::uint32_t kNone = ~0u;
  std::uint32_t top_k = args.config.top_k, experts_per_node = args.config.experts_per_rank * args.config.node_size;
  std::int64_t num_experts = std::int64_t{experts_per_node} * args.config.num_nodes;
  std::uint32_t lane = lane_of(block), step = kWarpSize / top_k, sub = lane / top_k, k = lane % top_k;
  std::uint32_t below = (1u << lane) - 1;
  std::uint32_t before_token = sub * top_k < kWarpSize ? (1u << sub * top_k) - 1 : ~0u;
  std::uint32_t of_token = (top_k == kWarpSize ? ~0u : (1u << top_k) - 1) << (sub < step ? sub * top_k : 0);
  MOE_EFA_NO_UNROLL
  for (std::uint32_t first = begin; first < end; first += step) {
    std::uint32_t token = first + sub;
    std::size_t slot = std::size_t{token} * top_k + k;
    std::int64_t id = sub < step && token < end ? args.topk_idx[slot] : -1;
    if (id < -1 || id >= num_experts) {
      if (kAssign) {
        Fault fault{};
        fault.what = What::kExpertId;
        fault.chunk = slot;
        fault.expected = static_cast<std::uint64_t>(num_experts);
        fault.got = static_cast<std::uint64_t>(id);
        report(block, args.watch, fault);
      }
      id = -1;
    }
    std::uint32_t expert = id < 0 ? kNone : static_cast<std::uint32_t>(id);
    std::uint32_t node = id < 0 ? kNone : expert / experts_per_node;
    std::uint32_t same_expert = block.match_any(expert), same_node = block.match_any(node);
    bool leader = id >= 0 && (same_node & of_token & below) == 0;  // of its token among those for the node
    std::uint32_t leaders = block.ballot(leader) & same_node;
    if constexpr (kAssign) {
      std::uint32_t place = 0;  // in (expert, position) order among the token's entries for the node
      MOE_EFA_NO_UNROLL
      for (std::uint32_t other_k = 0; other_k < top_k; ++other_k) {
        std::uint32_t other = block.shuffle(expert, sub < step ? sub * top_k + other_k : lane);
        bool earlier = other < expert || (other == expert && other_k < k);
        place += other != kNone && other / experts_per_node == node && earlier ? 1 : 0;
      }
      if (id >= 0) {
        // Lower lanes are earlier tokens, or earlier positions of the same.
        std::uint32_t index = counters.experts[expert] + count_bits(same_expert & below);
        std::uint32_t row = counters.rows[node] + count_bits(leaders & before_token);
        std::uint32_t entry = counters.entries[node] + count_bits(same_node & before_token);
        proto::RowEntry& to = args.entries[offsets.entries[node] + entry + place];
        to.index = index;
        to.expert = static_cast<std::uint16_t>(expert - node * experts_per_node);
        to.topk_pos = static_cast<std::uint16_t>(k);
        to.weight = args.topk_weights[slot];
        if (leader) {
          args.row_token[offsets.rows[node] + row] = token;
          args.entry_begin[offsets.rows[node] + node + row + 1] = entry + count_bits(same_node & of_token);
        }
      }
      block.sync_warp();  // all have read the counters
    }
    if (id >= 0 && (same_expert & below) == 0) counters.experts[expert] += count_bits(same_expert);
    if (id >= 0 && (same_node & below) == 0) {
      counters.rows[node] += count_bits(leaders);
      counters.entries[node] += count_bits(same_node);
    }
    block.sync_warp();
  }
}

// `words`: plan_shared_words(config, warps of the block).
template <class Block>
MOE_EFA_DEVICE void plan_body(Block& block, const PlanArgs& args, Tickets& shared, std::uint32_t* words) {
  if (args.recorded) {
    if (block.thread() == 0) shared.go = !faulted(block, args.watch);
    block.sync();
    if (shared.go == 0) return;
  }
  std::uint32_t nodes = args.config.num_nodes, columns = plan_columns(args.config);
  std::uint32_t num_experts = columns - 2 * nodes, warps = num_warps(block);
  std::uint32_t all_warps = block.num_blocks() * warps, first_warp = block.block() * warps;
  std::uint32_t *totals = words + warps * columns, *row_offsets = totals + 2 * nodes,
                *entry_offsets = row_offsets + nodes;
  std::uint32_t* own = words + warp_of(block) * columns;
  PlanCounters counters{own, own + num_experts, own + num_experts + nodes};
  std::uint32_t step = kWarpSize / args.config.top_k;
  std::uint32_t tokens = common::round_up(common::ceil_div(args.num_tokens, all_warps), step);
  std::uint32_t begin = (first_warp + warp_of(block)) * tokens, end = begin + tokens;
  end = end < args.num_tokens ? end : args.num_tokens;

  for (std::uint32_t i = lane_of(block); i < columns; i += kWarpSize) own[i] = 0;
  block.sync_warp();
  plan_tokens<false>(block, args, begin, end, counters, {});
  std::uint32_t* column = args.columns + std::size_t{first_warp + warp_of(block)} * columns;
  for (std::uint32_t i = lane_of(block); i < columns; i += kWarpSize) column[i] = own[i];
  if (!sync_grid(block, args.watch, block.num_blocks(), shared)) return;

  // What lower warps have counted is where each warp begins.
  for (std::uint32_t i = block.thread(); i < columns; i += block.num_threads()) {
    std::uint32_t sum = 0;
    for (std::uint32_t warp = 0; warp < all_warps; ++warp) {
      if (warp - first_warp < warps) words[(warp - first_warp) * columns + i] = sum;
      sum += args.columns[std::size_t{warp} * columns + i];
    }
    if (i >= num_experts) {
      totals[i - num_experts] = sum;
    } else if (block.block() == 0) {
      args.expert_counts[i] = sum;
    }
  }
  block.sync();
  for (std::uint32_t node = block.thread(); node < nodes; node += block.num_threads()) {
    std::uint32_t rows = 0, entries = 0;
    for (std::uint32_t lower = 0; lower < node; ++lower) {
      rows += totals[lower];
      entries += totals[nodes + lower];
    }
    row_offsets[node] = rows;
    entry_offsets[node] = entries;
    if (block.block() != 0) continue;
    SendView send{};
    if (totals[node] > 0) {
      std::uint32_t per_chunk = proto::rows_per_chunk(totals[node], args.num_nics, args.config.chunk_rows);
      send.facts.rows = totals[node];
      send.facts.rows_per_chunk = per_chunk;
      send.facts.num_chunks = common::ceil_div(totals[node], per_chunk);
    }
    send.row_token = args.row_token + rows;
    send.entry_begin = args.entry_begin + rows + node;
    send.entries = args.entries + entries;
    args.send[node] = send;
    args.entry_begin[rows + node] = 0;
  }
  block.sync();
  plan_tokens<true>(block, args, begin, end, counters, {row_offsets, entry_offsets});
}

}  // namespace moe_efa::kernels::cuda
