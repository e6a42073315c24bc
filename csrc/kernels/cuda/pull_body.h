// The body of pull, for any Block (block.h).
#pragma once

#include "kernels/cuda/columns.h"
#include "kernels/cuda/pack_body.h"
#include "kernels/cuda/pull.h"

namespace moe_efa::kernels::cuda {

// Sum of the values of lower lanes.
template <class Block>
MOE_EFA_DEVICE std::uint32_t scan_exclusive(Block& block, std::uint32_t value) {
  std::uint32_t sum = value, lane = lane_of(block);
  MOE_EFA_UNROLL
  for (std::uint32_t distance = 1; distance < kWarpSize; distance *= 2) {
    std::uint32_t lower = block.shuffle(sum, lane >= distance ? lane - distance : lane);
    if (lane >= distance) sum += lower;
  }
  return sum - value;
}

inline constexpr std::uint32_t kRowsAtOnce = 64;  // that a block clears

// Where a chunk comes from.
struct PullPart {
  std::uint32_t local, node, ring, chunk;
  std::uint64_t seq;
  const std::byte* slot;
};

template <class Block>
MOE_EFA_DEVICE Fault fault_of(Block&, const PullArgs& args, const PullPart& part, What what, std::uint64_t expected = 0,
                              std::uint64_t got = 0) {
  Fault fault{};
  fault.what = what;
  fault.phase = static_cast<std::uint32_t>(proto::Phase::kDispatch);
  fault.peer = args.view.topology.rank_of(part.node, part.local);
  fault.epoch = args.call->epoch;
  fault.chunk = part.seq;
  fault.expected = expected;
  fault.got = got;
  return fault;
}

// For one thread: the chunk's header against what was announced and the plan.
template <class Block>
MOE_EFA_DEVICE bool check_header(Block& block, const PullArgs& args, const PullPart& part,
                                 const proto::ChunkHeader& header) {
  const RingFacts& facts = args.plan.rings[part.ring].facts;
  ExpectedHeader expected{};
  expected.phase = proto::Phase::kDispatch;
  expected.flags = static_cast<std::uint8_t>((args.replay ? proto::kFlagReplay : 0) |
                                             (part.chunk + 1 == facts.num_chunks ? proto::kFlagLast : 0));
  expected.source_rank = args.view.topology.rank_of(part.node, part.local);
  expected.epoch = args.call->epoch;
  expected.seq = part.seq;
  expected.plan_id = args.call->plan_id;
  expected.rows = facts.rows_in(part.chunk);
  expected.first_row = facts.first_row(part.chunk);
  expected.dtype = args.rings[part.ring].wire_dtype;
  HeaderMismatch wrong = kernels::check_header(header, expected, args.view.layout.config());
  if (wrong.part == HeaderPart::kAll) return true;
  report(block, args.watch, fault_of(block, args, part, what_of(wrong.part), wrong.expected, wrong.got));
  return false;
}

// For one warp, all lanes: reads the metadata of a fresh chunk. The first round checks and counts, so that the chunk's
// pulls can be given a place; the second writes them. False after a fault.
template <class Block>
MOE_EFA_DEVICE bool read_metadata(Block& block, const PullArgs& args, const PullPart& part, PullShared& shared) {
  const proto::LayoutConfig& config = args.view.layout.config();
  const RingView& ring = args.plan.rings[part.ring];
  std::uint32_t lane = lane_of(block), rows = shared.header.rows, num_entries = shared.header.num_entries;
  const auto* meta = reinterpret_cast<const proto::RowMeta*>(part.slot + sizeof(proto::ChunkHeader));
  const auto* entries = reinterpret_cast<const proto::RowEntry*>(meta + rows);
  std::uint32_t source = args.view.topology.rank_of(part.node, part.local);
  const std::uint32_t* counts = args.expert_counts + std::size_t{source} * config.experts_per_rank;
  const std::int64_t* base = args.expert_base + std::size_t{source} * config.experts_per_rank;
  std::uint32_t own_local = args.view.topology.local_rank(), first_expert = own_local * config.experts_per_rank;
  // Of whom mates keep rows: what this rank forwards.
  bool own_rail = part.local == own_local;
  const std::uint32_t* room = own_rail && args.room != nullptr
                                  ? args.room + std::size_t{part.node} * config.experts_per_rank * config.node_size
                                  : nullptr;
  std::uint64_t* overflow = own_rail && args.plan.chunk_overflow != nullptr
                                ? args.plan.chunk_overflow + std::size_t{part.node} * args.plan.ring_chunks + part.chunk
                                : nullptr;
  if (overflow != nullptr && lane == 0) *overflow = 0;
  block.sync_warp();
  std::uint32_t begin = 0;
  MOE_EFA_NO_UNROLL
  for (std::uint32_t round = 0; round < 2; ++round) {
    std::uint32_t at = 0, own = 0;  // entries of rows so far, and those for own experts
    MOE_EFA_NO_UNROLL
    for (std::uint32_t tile = 0; tile < rows; tile += kWarpSize) {
      std::uint32_t row = tile + lane;
      std::uint32_t count = row < rows ? meta[row].num_entries : 0;
      // Sums of counts that are not too large cannot wrap.
      bool bad = row < rows && (count == 0 || count > config.top_k);
      std::uint32_t first = at + scan_exclusive(block, bad ? 0 : count);
      bad = bad || first + count > num_entries;
      What what = bad ? What::kRowEntries : What::kNothing;
      std::uint64_t expected = num_entries, got = count, mask = 0;
      std::uint32_t own_count = 0;
      MOE_EFA_NO_UNROLL
      for (std::uint32_t i = first; !bad && i < first + count; ++i) {
        proto::RowEntry entry = entries[i];
        if (entry.expert >= config.experts_per_rank * config.node_size || entry.topk_pos >= config.top_k) {
          bad = true;
          what = What::kEntry;
          expected = config.experts_per_rank * config.node_size;
          got = entry.expert;
          break;
        }
        std::uint32_t mate = entry.expert / config.experts_per_rank;
        if (room == nullptr || entry.index < room[entry.expert]) {
          mask |= std::uint64_t{1} << mate;
        } else if (round == 1) {
          block.raise(overflow, args.required[mate]);
        }
        std::uint32_t expert = entry.expert - first_expert;  // wraps for experts of lower mates
        if (expert >= config.experts_per_rank) continue;
        if (entry.index >= counts[expert]) {
          bad = true;
          what = What::kIndex;
          expected = counts[expert];
          got = entry.index;
          break;
        }
        if (base[expert] + entry.index < args.usable_rows) ++own_count;
      }
      std::uint32_t refused = block.ballot(bad);
      if (refused != 0) {
        if (lane == lowest_bit(refused)) report(block, args.watch, fault_of(block, args, part, what, expected, got));
        return false;
      }
      std::uint32_t before = own + scan_exclusive(block, own_count);
      if (round == 1 && row < rows) {
        PullEntry* to = args.plan.pulls + begin + before;
        MOE_EFA_NO_UNROLL
        for (std::uint32_t i = first; i < first + count; ++i) {
          proto::RowEntry entry = entries[i];
          std::uint32_t expert = entry.expert - first_expert;
          if (expert >= config.experts_per_rank) continue;
          std::int64_t place = base[expert] + entry.index;
          if (place >= args.usable_rows) continue;
          auto out_row = static_cast<std::uint32_t>(place);
          *to++ = {row << PullEntry::kTopKBits | entry.topk_pos, out_row};
          args.weights[out_row] = entry.weight;
        }
        if (own_rail) {
          std::uint8_t* bytes = args.plan.masks + args.plan.first_mask[part.node] +
                                std::size_t{shared.header.first_row + row} * args.plan.mask_bytes;
          for (std::uint32_t i = 0; i < args.plan.mask_bytes; ++i) bytes[i] = static_cast<std::uint8_t>(mask >> 8 * i);
        }
      }
      std::uint32_t last = kWarpSize - 1;
      at = block.shuffle(first + count, last);
      own = block.shuffle(before + own_count, last);
    }
    if (round == 1) break;
    if (at != num_entries) {
      if (lane == 0) report(block, args.watch, fault_of(block, args, part, What::kLeftOver, num_entries, at));
      return false;
    }
    std::uint32_t taken = lane == 0 ? block.add(args.pulled + part.ring, own) : 0;
    taken = block.shuffle(taken, 0);
    if (taken + own > ring.num_pulls) {
      if (lane == 0) {
        report(block, args.watch, fault_of(block, args, part, What::kPulls, ring.num_pulls, taken + own));
      }
      return false;
    }
    begin = ring.first_pull + taken;
    if (lane == 0) {
      args.plan.pull_begin[ring.first_chunk + part.chunk] = begin;
      args.plan.pull_count[ring.first_chunk + part.chunk] = own;
    }
  }
  return true;
}

// One row of the chunk to the rows of the output that want it: read once, written for each.
template <class Block, class Source, class Sink>
MOE_EFA_DEVICE void spread_columns(Block& block, const Source& source, Sink sink, const PullEntry* pulls,
                                   std::uint32_t count, std::uint32_t hidden_size) {
  auto* out = sink.row;
  for (std::uint32_t column = lane_of(block) * kColumns; column < hidden_size; column += kStep) {
    Columns columns;
    source.read(block, column, &columns);
    MOE_EFA_NO_UNROLL
    for (std::uint32_t i = 0; i < count; ++i) {
      sink.row = out + std::uint64_t{pulls[i].out_row} * hidden_size;
      sink.write(block, column, columns);
    }
  }
}

template <class Block>
MOE_EFA_DEVICE void spread_bytes(Block& block, const void* row, void* out, std::uint64_t bytes, const PullEntry* pulls,
                                 std::uint32_t count) {
  const auto* src = static_cast<const std::uint8_t*>(row);
  auto* dst = static_cast<std::uint8_t*>(out);
  std::uint64_t whole = is_aligned(src) && is_aligned(dst) && bytes % sizeof(Vec16) == 0 ? bytes / sizeof(Vec16) : 0;
  for (std::uint64_t i = lane_of(block); i < whole; i += kWarpSize) {
    Vec16 vec = block.load_fresh(reinterpret_cast<const Vec16*>(src) + i);
    MOE_EFA_NO_UNROLL
    for (std::uint32_t k = 0; k < count; ++k) {
      block.store(reinterpret_cast<Vec16*>(dst + pulls[k].out_row * bytes) + i, vec);
    }
  }
  MOE_EFA_NO_UNROLL
  for (std::uint64_t i = whole * sizeof(Vec16) + lane_of(block); i < bytes; i += kWarpSize) {
    for (std::uint32_t k = 0; k < count; ++k) dst[pulls[k].out_row * bytes + i] = src[i];
  }
}

template <class Block>
MOE_EFA_DEVICE void pull_row(Block& block, const PullArgs& args, const std::byte* row, proto::DType wire_dtype,
                             const PullEntry* pulls, std::uint32_t count) {
  using proto::DType;
  std::uint32_t hidden_size = args.view.layout.config().hidden_size;
  if (args.out_dtype == wire_dtype) {  // FP8: handed through
    spread_bytes(block, row, args.x, std::uint64_t{hidden_size} * proto::dtype_bytes(wire_dtype), pulls, count);
    if (wire_dtype == DType::kFp8) {
      spread_bytes(block, row + proto::fp8_scales_offset(hidden_size), args.scales,
                   std::uint64_t{proto::fp8_blocks(hidden_size)} * sizeof(float), pulls, count);
    }
    return;
  }
  bool wide = is_aligned(row);
  bool wide_out =
      is_aligned(args.x) && std::uint64_t{hidden_size} * proto::dtype_bytes(args.out_dtype) % sizeof(Vec16) == 0;
  Fp8Source<Memory::kFresh> fp8{reinterpret_cast<const std::uint8_t*>(row), hidden_size, wide};
  if (args.out_dtype == DType::kBf16) {
    Bf16Sink sink{static_cast<std::uint16_t*>(args.x), hidden_size, wide_out};
    if (wire_dtype == DType::kFp8) return spread_columns(block, fp8, sink, pulls, count, hidden_size);
    Fp32Source<Memory::kFresh> fp32{reinterpret_cast<const float*>(row), hidden_size, wide};
    return spread_columns(block, fp32, sink, pulls, count, hidden_size);
  }
  Fp32Sink sink{static_cast<float*>(args.x), hidden_size, wide_out};
  if (wire_dtype == DType::kFp8) return spread_columns(block, fp8, sink, pulls, count, hidden_size);
  Bf16Source<Memory::kFresh> bf16{reinterpret_cast<const std::uint16_t*>(row), hidden_size, wide};
  spread_columns(block, bf16, sink, pulls, count, hidden_size);
}

// Rows [begin, end) of the output become padding.
template <class Block>
MOE_EFA_DEVICE void clear_rows(Block& block, const PullArgs& args, std::uint64_t begin, std::uint64_t end) {
  std::uint32_t hidden_size = args.view.layout.config().hidden_size;
  std::uint64_t stride = std::uint64_t{hidden_size} * proto::dtype_bytes(args.out_dtype);
  auto* out = static_cast<std::uint8_t*>(args.x);
  bool wide = is_aligned(out) && stride % sizeof(Vec16) == 0;
  std::uint64_t step = wide ? sizeof(Vec16) : 1;
  for (std::uint64_t i = begin * stride + block.thread() * step; i < end * stride; i += block.num_threads() * step) {
    if (wide) {
      block.store(reinterpret_cast<Vec16*>(out + i), Vec16{{0, 0, 0, 0}});
    } else {
      out[i] = 0;
    }
  }
  std::uint64_t blocks = proto::fp8_blocks(hidden_size);
  for (std::uint64_t i = begin * blocks + block.thread(); args.out_dtype == proto::DType::kFp8 && i < end * blocks;
       i += block.num_threads()) {
    args.scales[i] = 1.0f;
  }
  for (std::uint64_t i = begin + block.thread(); !args.replay && i < end; i += block.num_threads()) {
    args.weights[i] = 0.0f;
  }
}

// Piece `index` of what is padding: the rows between an expert's own and the next expert's, then those behind all
// experts, kRowsAtOnce at a time.
template <class Block>
MOE_EFA_DEVICE void clear_padding(Block& block, const PullArgs& args, std::uint32_t index) {
  std::uint32_t experts = args.view.layout.config().experts_per_rank;
  if (index < experts) {
    return clear_rows(block, args, args.offsets[index] + args.tokens_per_expert[index], args.offsets[index + 1]);
  }
  std::int64_t begin = args.offsets[experts] + std::int64_t{index - experts} * kRowsAtOnce, end = begin + kRowsAtOnce;
  clear_rows(block, args, begin, end < args.num_rows ? end : args.num_rows);
}

template <class Block>
MOE_EFA_DEVICE bool pull_chunk(Block& block, const PullArgs& args, PullPart part, PullShared& shared) {
  const proto::NodeView& view = args.view;
  std::uint32_t hidden_size = view.layout.config().hidden_size;
  const RingView& ring = args.plan.rings[part.ring];
  part.seq = args.rings[part.ring].first_seq + part.chunk;
  part.slot = view.slots(part.local) + view.layout.ring_slot(proto::Phase::kDispatch, part.node, part.seq);
  if (warp_of(block) == 0) {
    bool good = false;
    if (lane_of(block) == 0) {
      std::uint64_t arrived = view.layout.arrived(proto::Phase::kDispatch, part.node, part.seq);
      // Pairs with the release in pack (own node) or of the driver that saw the chunk land (I1).
      good = wait_at_least(block, args.watch, part.seq + 1, fault_of(block, args, part, What::kChunk),
                           [&] { return load_word(block, view.kernel_words(part.local), arrived); });
      if (good) {
        shared.header = *reinterpret_cast<const proto::ChunkHeader*>(part.slot);
        good = check_header(block, args, part, shared.header);
      }
    }
    block.sync_warp();
    good = block.ballot(good) != 0;
    if (good && !args.replay) good = read_metadata(block, args, part, shared);
    if (lane_of(block) == 0) {
      shared.tickets.go = good;
      if (good) {
        shared.begin = args.plan.pull_begin[ring.first_chunk + part.chunk];
        shared.count = args.plan.pull_count[ring.first_chunk + part.chunk];
      }
    }
  }
  block.sync();
  if (shared.tickets.go == 0) return false;

  proto::DType wire_dtype = args.rings[part.ring].wire_dtype;
  std::uint64_t row_bytes = proto::hidden_row_bytes(hidden_size, wire_dtype);
  const std::byte* hidden =
      part.slot + proto::chunk_hidden_offset(args.replay, shared.header.rows, shared.header.num_entries);
  const PullEntry* pulls = args.plan.pulls + shared.begin;
  for (std::uint32_t i = warp_of(block); i < shared.count; i += num_warps(block)) {
    std::uint32_t row = pulls[i].row(), end = i + 1;
    if (i > 0 && pulls[i - 1].row() == row) continue;  // with the first of its row
    while (end < shared.count && pulls[end].row() == row) ++end;
    pull_row(block, args, hidden + row * row_bytes, wire_dtype, pulls + i, end - i);
  }
  block.sync();
  if (block.thread() == 0) {
    arrive_in_order(
        block, args.arrivals + ring.first_chunk, part.chunk, ring.facts.num_chunks, [](std::uint32_t) { return 1u; },
        [&](std::uint32_t chunk) {
          if (chunk + 1 == ring.facts.num_chunks && !args.replay) {
            std::uint32_t pulled = block.add_acq_rel(args.pulled + part.ring, 0);
            args.pulled[part.ring] = 0;
            if (pulled != ring.num_pulls) {
              report(block, args.watch, fault_of(block, args, part, What::kPulls, ring.num_pulls, pulled));
              return;
            }
          }
          // Gives the slot back: this rank has read all it needs of it (I2).
          std::uint64_t word = view.layout.released(proto::Phase::kDispatch, part.node, view.topology.local_rank());
          block.store_release(reinterpret_cast<std::uint64_t*>(view.region(part.local) + word),
                              args.rings[part.ring].first_seq + chunk + 1);
        });
  }
  return true;
}

template <class Block>
MOE_EFA_DEVICE void pull_body(Block& block, const PullArgs& args, std::uint32_t num_blocks, PullShared& shared) {
  const proto::NodeView& view = args.view;
  std::uint32_t nodes = view.topology.num_nodes(), mates = view.topology.node_size;
  std::uint32_t chunks = args.plan.ring_chunks * args.plan.num_rings;
  std::uint32_t experts = view.layout.config().experts_per_rank;
  auto behind = static_cast<std::uint32_t>(args.num_rows - args.offsets[experts]);
  std::uint32_t count = chunks + experts + common::ceil_div(behind, kRowsAtOnce);
  std::uint32_t ticket;
  while (take_ticket(block, args.watch, shared.tickets, count, &ticket)) {
    if (ticket >= chunks) {
      clear_padding(block, args, ticket - chunks);
      continue;
    }
    // By chunk, then ring, the own one first: what is waited for needs only chunks of lower numbers to move, anywhere.
    std::uint32_t turn = ticket % args.plan.num_rings;
    PullPart part{};
    part.local = (view.topology.local_rank() + turn / nodes) % mates;
    part.node = (view.topology.node() + turn % nodes) % nodes;
    part.ring = part.local * nodes + part.node;
    part.chunk = ticket / args.plan.num_rings;
    if (part.chunk >= args.plan.rings[part.ring].facts.num_chunks) continue;
    if (!pull_chunk(block, args, part, shared)) break;
  }
  if (block.thread() == 0) leave_grid(block, args.watch, num_blocks);
}

}  // namespace moe_efa::kernels::cuda
