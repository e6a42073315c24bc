// The body of combine, for any Block (block.h).
#pragma once

#include "kernels/cuda/columns.h"
#include "kernels/cuda/combine.h"
#include "kernels/cuda/pack_body.h"

namespace moe_efa::kernels::cuda {

inline constexpr auto kCombine = proto::Phase::kCombine;

// A role has words of its own, and the fault of all.
MOE_EFA_DEVICE inline Watch watch_of(const CombineArgs& args, std::uint32_t role) {
  Watch watch = args.watch;
  watch.grid = args.grids + role;
  return watch;
}

MOE_EFA_DEVICE inline Fault fault_of(const CombineArgs& args, What what, std::uint32_t peer, std::uint64_t seq,
                                     std::uint64_t expected = 0, std::uint64_t got = 0) {
  Fault fault{};
  fault.what = what;
  fault.phase = static_cast<std::uint32_t>(kCombine);
  fault.peer = peer;
  fault.epoch = args.call->epoch;
  fault.chunk = seq;
  fault.expected = expected;
  fault.got = got;
  return fault;
}

// sum = ((w0*r0) + (w1*r1)) + ...: the fixed-order sum that publish, forward and reduce share (cpu/rows.h). No terms
// give zeros. `read(k, &columns)` reads term k.
template <class Read>
MOE_EFA_DEVICE void sum_columns(const Term* terms, std::uint32_t count, bool weighted, Columns* sum, Read read) {
  MOE_EFA_UNROLL
  for (std::uint32_t i = 0; i < kColumns; ++i) sum->value[i] = 0.0f;
  MOE_EFA_NO_UNROLL
  for (std::uint32_t k = 0; k < count; ++k) {
    Columns columns;
    read(k, &columns);
    float weight = weighted ? terms[k].weight : 1.0f;  // which changes no bit
    MOE_EFA_UNROLL
    for (std::uint32_t i = 0; i < kColumns; ++i) {
      float product = multiply(weight, columns.value[i]);
      sum->value[i] = k == 0 ? product : add(sum->value[i], product);
    }
  }
}

// This rank's terms of one row: pulls [begin, end) of a chunk, in (expert, top-k position) order.
struct OwnRow {
  const PullEntry* pulls;
  std::uint32_t count;
};

// For one warp.
template <class Block>
MOE_EFA_DEVICE void gather_own(Block& block, const CombineArgs& args, const OwnRow& own, Term* terms) {
  std::uint64_t stride = std::uint64_t{args.view.layout.config().hidden_size} * proto::dtype_bytes(args.y_dtype);
  for (std::uint32_t k = lane_of(block); k < own.count; k += kWarpSize) {
    std::uint32_t row = own.pulls[k].out_row;
    terms[k] = {static_cast<const std::byte*>(args.y) + row * stride,
                args.weights != nullptr ? args.weights[row] : 1.0f};
  }
  block.sync_warp();
}

template <class Block>
MOE_EFA_DEVICE void sum_own(Block& block, const CombineArgs& args, const Term* terms, std::uint32_t count,
                            std::uint32_t column, Columns* sum) {
  std::uint32_t hidden_size = args.view.layout.config().hidden_size;
  sum_columns(terms, count, args.weights != nullptr, sum, [&](std::uint32_t k, Columns* columns) {
    AnySource<Memory::kQuiet>{terms[k].row, args.y_dtype, hidden_size}.read(block, column, columns);
  });
}

// The gradient of the weight at top-k position k that this rank has to give.
MOE_EFA_DEVICE inline float own_grad(const CombineArgs& args, const OwnRow& own, std::uint32_t k) {
  float grad = 0.0f;
  MOE_EFA_NO_UNROLL
  for (std::uint32_t i = 0; i < own.count; ++i) {
    if (own.pulls[i].topk_pos() == k) grad = args.weight_grads[own.pulls[i].out_row];
  }
  return grad;
}

// Ends a block's part in a role; the last block leaves its counters at zero.
template <class Block>
MOE_EFA_DEVICE void leave_role(Block& block, const Watch& watch, std::uint32_t num_blocks, std::uint32_t* next,
                               std::uint32_t count) {
  if (block.thread() != 0 || !leave_grid(block, watch, num_blocks)) return;
  for (std::uint32_t i = 0; i < count; ++i) next[i] = 0;
}

// publish: rows of one chunk of a source on a mate's rail, for that mate.
template <class Block>
MOE_EFA_DEVICE void publish_rows(Block& block, const CombineArgs& args, std::uint32_t index, std::uint32_t chunk,
                                 std::byte* slot, CombineShared& shared) {
  const proto::LayoutConfig& config = args.view.layout.config();
  const RingView& ring = args.plan.rings[index];
  proto::DType dtype = proto::publish_dtype(args.wire_dtype);
  std::uint64_t row_bytes = proto::hidden_row_bytes(config.hidden_size, dtype);
  auto* grads = reinterpret_cast<float*>(slot + ring.facts.rows_in(chunk) * row_bytes);
  const PullEntry* pulls = args.plan.pulls + args.plan.pull_begin[ring.first_chunk + chunk];
  std::uint32_t count = args.plan.pull_count[ring.first_chunk + chunk];
  Term* terms = shared.own[warp_of(block)];
  for (std::uint32_t i = warp_of(block); i < count; i += num_warps(block)) {
    std::uint32_t row = pulls[i].row(), end = i + 1;
    if (i > 0 && pulls[i - 1].row() == row) continue;  // with the first of its row
    while (end < count && pulls[end].row() == row) ++end;
    OwnRow own{pulls + i, end - i};
    gather_own(block, args, own, terms);
    if (own.count == 1 && args.weights == nullptr && dtype == args.y_dtype) {
      copy_bytes<Memory::kQuiet>(block, slot + row * row_bytes, terms[0].row,
                                 std::uint64_t{config.hidden_size} * proto::dtype_bytes(dtype));
    } else {
      AnySink sink{slot + row * row_bytes, dtype, config.hidden_size, config.fp8_scale};
      for (std::uint32_t begin = 0; begin < config.hidden_size; begin += kStep) {
        std::uint32_t column = begin + lane_of(block) * kColumns;
        Columns sum;
        sum_own(block, args, terms, own.count, column, &sum);
        sink.write(block, column, sum);
      }
    }
    for (std::uint32_t k = lane_of(block); args.weight_grads != nullptr && k < config.top_k; k += kWarpSize) {
      grads[std::size_t{row} * config.top_k + k] = own_grad(args, own, k);
    }
    block.sync_warp();  // the terms have been read
  }
}

template <class Block>
MOE_EFA_DEVICE void publish_body(Block& block, const CombineArgs& args, std::uint32_t num_blocks,
                                 CombineShared& shared) {
  const proto::NodeView& view = args.view;
  const proto::RegionLayout& layout = view.layout;
  std::uint32_t nodes = view.topology.num_nodes(), own_local = view.topology.local_rank();
  Watch watch = watch_of(args, 0);
  for (;;) {
    block.sync();
    if (block.thread() == 0) {
      shared.tickets.go = claim_chunk(
          block, watch, args.next, args.plan.num_rings,
          // What this rank forwards itself is added up there.
          [&](std::uint32_t i) { return i / nodes == own_local ? 0u : args.plan.rings[i].facts.num_chunks; },
          [&](std::uint32_t i, std::uint32_t chunk) {
            std::uint64_t consumed = load_word(block, view.kernel_words(i / nodes), layout.consumed(i % nodes));
            return args.publish_seq[i] + chunk < consumed + layout.config().publish_slots;
          },
          [&](std::uint32_t i, std::uint32_t chunk) {
            return fault_of(args, What::kConsumed, view.topology.rank_of(view.topology.node(), i / nodes),
                            args.publish_seq[i] + chunk,
                            args.publish_seq[i] + chunk + 1 - layout.config().publish_slots,
                            load_word(block, view.kernel_words(i / nodes), layout.consumed(i % nodes)));
          },
          &shared.ring, &shared.chunk);
    }
    block.sync();
    if (shared.tickets.go == 0) break;
    std::uint32_t index = shared.ring, chunk = shared.chunk, local = index / nodes, node = index % nodes;
    std::uint64_t seq = args.publish_seq[index] + chunk;
    publish_rows(block, args, index, chunk, view.own_slots() + layout.publish_slot(local, node, seq), shared);
    block.sync();
    if (block.thread() == 0) {
      const RingView& ring = args.plan.rings[index];
      arrive_in_order(
          block, args.ring_arrivals + ring.first_chunk, chunk, ring.facts.num_chunks, [](std::uint32_t) { return 1u; },
          [&](std::uint32_t done) {
            // Publishes the slot to the forwarder.
            std::uint64_t published = layout.published(local, node);
            block.store_release(reinterpret_cast<std::uint64_t*>(view.own_kernel_words() + published),
                                args.publish_seq[index] + done + 1);
          });
    }
  }
  leave_role(block, watch, num_blocks, args.next, args.plan.num_rings);
}

// forward: chunks towards a node whose slots may be filled again.
template <class Block>
MOE_EFA_DEVICE std::uint64_t slots_freed(Block& block, const proto::NodeView& view, std::uint32_t node) {
  if (node != view.topology.node()) {
    return load_word(block, view.own_kernel_words(), view.layout.send_free(kCombine, node));
  }
  return load_word(block, view.own(), view.layout.released(kCombine, node, view.topology.local_rank()));
}

// forward: is everything there for this chunk, and a slot to put it into?
template <class Block>
MOE_EFA_DEVICE bool may_forward(Block& block, const CombineArgs& args, std::uint32_t node, std::uint64_t seq) {
  const proto::NodeView& view = args.view;
  const proto::RegionLayout& layout = view.layout;
  std::uint32_t local = view.topology.local_rank();
  for (std::uint32_t mate = 0; mate < view.topology.node_size; ++mate) {
    if (mate != local && load_word(block, view.kernel_words(mate), layout.published(local, node)) <= seq) return false;
  }
  if (view.topology.num_nodes() == 1) return true;
  return seq < slots_freed(block, view, node) + layout.ring_slots(node);
}

template <class Block>
MOE_EFA_DEVICE Fault forward_fault(Block& block, const CombineArgs& args, std::uint32_t node, std::uint64_t seq) {
  const proto::NodeView& view = args.view;
  std::uint32_t local = view.topology.local_rank();
  for (std::uint32_t mate = 0; mate < view.topology.node_size; ++mate) {
    if (mate == local) continue;
    std::uint64_t published = load_word(block, view.kernel_words(mate), view.layout.published(local, node));
    if (published > seq) continue;
    return fault_of(args, What::kPublished, view.topology.rank_of(view.topology.node(), mate), seq, seq + 1, published);
  }
  return fault_of(args, What::kCredit, view.topology.rail_peer(node), seq, seq + 1 - view.layout.ring_slots(node),
                  slots_freed(block, view, node));
}

// The pulls of one row of a chunk, which are in row order.
MOE_EFA_DEVICE inline OwnRow find_own(const PullEntry* pulls, std::uint32_t count, std::uint32_t row) {
  std::uint32_t low = 0, high = count;
  while (low < high) {
    std::uint32_t middle = (low + high) / 2;
    if (pulls[middle].row() < row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  OwnRow own{pulls + low, 0};
  while (low + own.count < count && own.pulls[own.count].row() == row) ++own.count;
  return own;
}

// Rows of one chunk: sums over the ranks of this node in rank order; the own term is added up on the spot.
template <class Block>
MOE_EFA_DEVICE void forward_rows(Block& block, const CombineArgs& args, std::uint32_t node, std::uint32_t chunk,
                                 std::uint64_t seq, std::byte* slot, CombineShared& shared) {
  const proto::NodeView& view = args.view;
  const proto::LayoutConfig& config = view.layout.config();
  std::uint32_t local = view.topology.local_rank(), lane = lane_of(block);
  const RingView& ring = args.plan.rings[local * config.num_nodes + node];
  std::uint32_t num_rows = ring.facts.rows_in(chunk), first_row = ring.facts.first_row(chunk);
  bool grads = args.weight_grads != nullptr, home = slot == nullptr;
  proto::DType publish = proto::publish_dtype(args.wire_dtype);
  std::uint64_t publish_bytes = proto::hidden_row_bytes(config.hidden_size, publish);
  std::uint64_t row_bytes = proto::hidden_row_bytes(config.hidden_size, args.wire_dtype);
  std::uint64_t out_stride = std::uint64_t{config.hidden_size} * proto::dtype_bytes(args.y_dtype);
  std::uint64_t published_at = view.layout.publish_slot(local, node, seq);
  const PullEntry* pulls = args.plan.pulls + args.plan.pull_begin[ring.first_chunk + chunk];
  std::uint32_t num_pulls = args.plan.pull_count[ring.first_chunk + chunk];
  Term *own_terms = shared.own[warp_of(block)], *terms = shared.terms[warp_of(block)];
  for (std::uint32_t row = warp_of(block); row < num_rows; row += num_warps(block)) {
    std::uint64_t mask = mask_of(args.plan, node, first_row + row);
    OwnRow own{pulls, 0};
    if ((mask >> local & 1) != 0) own = find_own(pulls, num_pulls, row);
    gather_own(block, args, own, own_terms);
    std::uint32_t count =
        count_bits(static_cast<std::uint32_t>(mask)) + count_bits(static_cast<std::uint32_t>(mask >> 32));
    for (std::uint32_t mate = lane; mate < config.node_size; mate += kWarpSize) {
      if ((mask >> mate & 1) == 0) continue;
      std::uint64_t below = mask & ((std::uint64_t{1} << mate) - 1);
      std::uint32_t at =
          count_bits(static_cast<std::uint32_t>(below)) + count_bits(static_cast<std::uint32_t>(below >> 32));
      const std::byte* published = view.slots(mate) + published_at + row * publish_bytes;
      terms[at] = {mate == local ? nullptr : published, 1.0f};
    }
    block.sync_warp();

    std::uint32_t token = home ? args.plan.send[node].row_token[first_row + row] : 0;
    void* to = home ? static_cast<std::byte*>(args.out) + token * out_stride
                    : slot + sizeof(proto::ChunkHeader) + row * row_bytes;
    AnySink sink{to, home ? args.y_dtype : args.wire_dtype, config.hidden_size, config.fp8_scale};
    if (count == 1 && terms[0].row != nullptr && publish == sink.dtype && publish == args.wire_dtype) {
      copy_bytes<Memory::kFresh>(block, to, terms[0].row,
                                 std::uint64_t{config.hidden_size} * proto::dtype_bytes(publish));
    } else {
      for (std::uint32_t begin = 0; begin < config.hidden_size; begin += kStep) {
        std::uint32_t column = begin + lane * kColumns;
        Columns sum;
        sum_columns(terms, count, false, &sum, [&](std::uint32_t k, Columns* columns) {
          if (terms[k].row == nullptr) {
            sum_own(block, args, own_terms, own.count, column, columns);
            round_to(block, publish, config.fp8_scale, columns);
          } else {
            AnySource<Memory::kFresh>{terms[k].row, publish, config.hidden_size}.read(block, column, columns);
          }
        });
        if (home) round_to(block, args.wire_dtype, config.fp8_scale, &sum);
        sink.write(block, column, sum);
      }
    }
    auto* to_grads = home ? args.topk_weight_grads + std::size_t{token} * config.top_k
                          : reinterpret_cast<float*>(slot + sizeof(proto::ChunkHeader) + num_rows * row_bytes) +
                                std::size_t{row} * config.top_k;
    for (std::uint32_t k = lane; grads && k < config.top_k; k += kWarpSize) {
      float total = 0.0f;  // each position has one owner; the others hold zeros
      for (std::uint64_t left = mask; left != 0; left &= left - 1) {
        std::uint32_t mate = lowest_bit(left);
        const auto* part = reinterpret_cast<const float*>(view.slots(mate) + published_at + num_rows * publish_bytes) +
                           std::size_t{row} * config.top_k;
        total = add(total, mate == local ? own_grad(args, own, k) : part[k]);
      }
      to_grads[k] = total;
    }
    block.sync_warp();  // the terms have been read
  }
}

// What the user reads, where the result of a token of this rank lacks rows.
template <class Block>
MOE_EFA_DEVICE void raise_overflow(Block& block, const CombineArgs& args, std::uint64_t required) {
  if (required > 0) block.raise(args.plan.overflow, required);
}

template <class Block>
MOE_EFA_DEVICE void forward_body(Block& block, const CombineArgs& args, std::uint32_t num_blocks,
                                 CombineShared& shared) {
  const proto::NodeView& view = args.view;
  const proto::RegionLayout& layout = view.layout;
  const proto::LayoutConfig& config = layout.config();
  std::uint32_t nodes = view.topology.num_nodes(), own_node = view.topology.node();
  std::uint32_t first_ring = view.topology.local_rank() * nodes;
  const RingView* rings = args.plan.rings + first_ring;
  const std::uint64_t* first_seq = args.publish_seq + first_ring;
  std::uint32_t* next = args.next + args.plan.num_rings;
  bool grads = args.weight_grads != nullptr;
  Watch watch = watch_of(args, 1);
  std::uint64_t row_bytes = proto::hidden_row_bytes(config.hidden_size, args.wire_dtype);
  for (;;) {
    block.sync();
    if (block.thread() == 0) {
      shared.tickets.go = claim_chunk(
          block, watch, next, nodes, [&](std::uint32_t node) { return rings[node].facts.num_chunks; },
          [&](std::uint32_t node, std::uint32_t chunk) {
            return may_forward(block, args, node, first_seq[node] + chunk);
          },
          [&](std::uint32_t node, std::uint32_t chunk) {
            return forward_fault(block, args, node, first_seq[node] + chunk);
          },
          &shared.ring, &shared.chunk);
    }
    block.sync();
    if (shared.tickets.go == 0) break;
    std::uint32_t node = shared.ring, chunk = shared.chunk;
    const RingFacts& facts = rings[node].facts;
    std::uint64_t seq = first_seq[node] + chunk;
    std::byte* slot = nullptr;  // the only node: its sums are the results
    if (nodes > 1) {
      slot = view.own_slots() +
             (node == own_node ? layout.ring_slot(kCombine, node, seq) : layout.send_slot(kCombine, node, seq));
    }
    if (slot != nullptr && block.thread() == 0) {
      proto::ChunkHeader header{};
      header.magic = proto::kChunkMagic;
      header.version = proto::kProtocolVersion;
      header.phase = static_cast<std::uint8_t>(kCombine);
      header.flags = static_cast<std::uint8_t>((grads ? proto::kFlagWeightGrads : 0) |
                                               (chunk + 1 == facts.num_chunks ? proto::kFlagLast : 0));
      header.source_rank = view.topology.rank;
      header.dtype = static_cast<std::uint32_t>(args.wire_dtype);
      header.epoch = args.call->epoch;
      header.seq = seq;
      header.plan_id = args.call->plan_id;
      header.rows = facts.rows_in(chunk);
      header.first_row = facts.first_row(chunk);
      header.required_capacity = overflow_of(args.plan, node, chunk);
      header.total_bytes =
          static_cast<std::uint32_t>(proto::combine_chunk_bytes(grads, facts.rows_in(chunk), config.top_k, row_bytes));
      *reinterpret_cast<proto::ChunkHeader*>(slot) = header;
    }
    forward_rows(block, args, node, chunk, seq, slot, shared);
    block.sync();
    if (block.thread() == 0) {
      // The result is where it belongs, and what it lacks is known here.
      if (nodes == 1) raise_overflow(block, args, overflow_of(args.plan, 0, chunk));
      arrive_in_order(
          block, args.ring_arrivals + rings[node].first_chunk, chunk, facts.num_chunks,
          [](std::uint32_t) { return 1u; },
          [&](std::uint32_t done) {
            std::uint64_t at = first_seq[node] + done;
            if (nodes > 1 && node == own_node) {
              // Publishes the chunk to this rank's own reduce.
              std::uint64_t arrived = layout.arrived(kCombine, node, at);
              block.store_release(reinterpret_cast<std::uint64_t*>(view.own_kernel_words() + arrived), at + 1);
            } else if (nodes > 1) {
              ChunkReady* ready = args.ready + std::size_t{node} * config.slots + at % config.slots;
              ready->rows = facts.rows_in(done);
              ready->bytes = static_cast<std::uint32_t>(
                  proto::combine_chunk_bytes(grads, facts.rows_in(done), config.top_k, row_bytes));
              block.store_release(&ready->seq_plus_1, at + 1);  // publishes the chunk to the driver
            }
            // Gives the publish slots back to the mates.
            std::uint64_t consumed = layout.consumed(node);
            block.store_release(reinterpret_cast<std::uint64_t*>(view.own_kernel_words() + consumed), at + 1);
          });
    }
  }
  leave_role(block, watch, num_blocks, next, nodes);
}

// The row of a token among the rows, in token order, that were sent to a node; `rows` where there is none.
MOE_EFA_DEVICE inline std::uint32_t find_token(const SendView& send, std::uint32_t token) {
  std::uint32_t low = 0, high = send.facts.rows;
  while (low < high) {
    std::uint32_t middle = (low + high) / 2;
    if (send.row_token[middle] < token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < send.facts.rows && send.row_token[low] == token ? low : send.facts.rows;
}

// For one lane: the chunk with this row has come back from a node, and is what the plan says.
template <class Block>
MOE_EFA_DEVICE bool await_chunk(Block& block, const CombineArgs& args, const Watch& watch, std::uint32_t node,
                                std::uint32_t chunk) {
  const proto::NodeView& view = args.view;
  const RingFacts& facts = args.plan.send[node].facts;
  std::uint64_t seq = args.receive_seq[node] + chunk;
  std::uint64_t arrived = view.layout.arrived(kCombine, node, seq);
  std::uint32_t peer = view.topology.rail_peer(node);
  // Pairs with the release in forward (own node) or of the driver that saw the chunk land (I1).
  if (!wait_at_least(block, watch, seq + 1, fault_of(args, What::kChunk, peer, seq),
                     [&] { return load_word(block, view.own_kernel_words(), arrived); })) {
    return false;
  }
  const auto& header =
      *reinterpret_cast<const proto::ChunkHeader*>(view.own_slots() + view.layout.ring_slot(kCombine, node, seq));
  ExpectedHeader expected{};
  expected.phase = kCombine;
  expected.flags = static_cast<std::uint8_t>((args.weight_grads != nullptr ? proto::kFlagWeightGrads : 0) |
                                             (chunk + 1 == facts.num_chunks ? proto::kFlagLast : 0));
  expected.source_rank = peer;
  expected.epoch = args.call->epoch;
  expected.seq = seq;
  expected.plan_id = args.call->plan_id;
  expected.rows = facts.rows_in(chunk);
  expected.first_row = facts.first_row(chunk);
  expected.dtype = args.wire_dtype;
  expected.may_overflow = args.plan.overflow != nullptr;
  HeaderMismatch wrong = check_header(header, expected, view.layout.config());
  if (wrong.part != HeaderPart::kAll) {
    report(block, watch, fault_of(args, what_of(wrong.part), peer, seq, wrong.expected, wrong.got));
    return false;
  }
  raise_overflow(block, args, header.required_capacity);
  return true;
}

// For one warp: a token's result, once all that belongs to it is here. False after a fault.
template <class Block>
MOE_EFA_DEVICE bool reduce_token(Block& block, const CombineArgs& args, const Watch& watch, std::uint32_t token,
                                 Term* terms) {
  const proto::NodeView& view = args.view;
  const proto::LayoutConfig& config = view.layout.config();
  std::uint32_t lane = lane_of(block), nodes = config.num_nodes, count = 0;
  std::uint64_t row_bytes = proto::hidden_row_bytes(config.hidden_size, args.wire_dtype);
  for (std::uint32_t begin = 0; begin < nodes; begin += kWarpSize) {
    std::uint32_t node = begin + lane, row = 0;
    bool has = false, good = true;
    if (node < nodes) {
      const SendView& send = args.plan.send[node];
      row = find_token(send, token);
      has = row < send.facts.rows;
      if (has && nodes > 1) good = await_chunk(block, args, watch, node, row / send.facts.rows_per_chunk);
    }
    block.sync_warp();  // what one lane has acquired, all may read
    if (block.ballot(!good) != 0) return false;
    std::uint32_t all = block.ballot(has);
    if (nodes == 1 && all != 0) return true;  // forward has written it
    if (has) {
      const SendView& send = args.plan.send[node];
      std::uint32_t chunk = row / send.facts.rows_per_chunk;
      const std::byte* slot = view.own_slots() + view.layout.ring_slot(kCombine, node, args.receive_seq[node] + chunk);
      std::uint64_t at = sizeof(proto::ChunkHeader) + (row - send.facts.first_row(chunk)) * row_bytes;
      terms[count + count_bits(all & ((1u << lane) - 1))] = {slot + at, 1.0f};
    }
    count += count_bits(all);
  }
  block.sync_warp();
  std::byte* to =
      static_cast<std::byte*>(args.out) + std::uint64_t{token} * config.hidden_size * proto::dtype_bytes(args.y_dtype);
  if (count == 1 && args.wire_dtype == args.y_dtype) {
    copy_bytes<Memory::kFresh>(block, to, terms[0].row,
                               std::uint64_t{config.hidden_size} * proto::dtype_bytes(args.y_dtype));
  } else {
    AnySink sink{to, args.y_dtype, config.hidden_size, config.fp8_scale};
    for (std::uint32_t begin = 0; begin < config.hidden_size; begin += kStep) {
      std::uint32_t column = begin + lane * kColumns;
      Columns sum;
      sum_columns(terms, count, false, &sum, [&](std::uint32_t k, Columns* columns) {
        AnySource<Memory::kFresh>{terms[k].row, args.wire_dtype, config.hidden_size}.read(block, column, columns);
      });
      sink.write(block, column, sum);
    }
  }
  if (args.weight_grads == nullptr) {
    block.sync_warp();
    return true;
  }
  float totals[2] = {0.0f, 0.0f};  // of positions lane and lane + 32
  static_assert(proto::kMaxTopK == 2 * kWarpSize);
  MOE_EFA_NO_UNROLL
  for (std::uint32_t node = 0; node < nodes; ++node) {
    const SendView& send = args.plan.send[node];
    std::uint32_t row = find_token(send, token);
    if (row == send.facts.rows) continue;
    std::uint32_t chunk = row / send.facts.rows_per_chunk;
    const std::byte* slot = view.own_slots() + view.layout.ring_slot(kCombine, node, args.receive_seq[node] + chunk);
    const auto* part =
        reinterpret_cast<const float*>(slot + sizeof(proto::ChunkHeader) + send.facts.rows_in(chunk) * row_bytes) +
        std::size_t{row - send.facts.first_row(chunk)} * config.top_k;
    MOE_EFA_UNROLL
    for (std::uint32_t i = 0; i < 2; ++i) {
      std::uint32_t k = lane + i * kWarpSize;
      if (k < config.top_k) totals[i] = add(totals[i], part[k]);
    }
  }
  MOE_EFA_UNROLL
  for (std::uint32_t i = 0; i < 2; ++i) {
    std::uint32_t k = lane + i * kWarpSize;
    if (k < config.top_k) args.topk_weight_grads[std::size_t{token} * config.top_k + k] = totals[i];
  }
  block.sync_warp();  // all has been read
  return true;
}

// For one warp, when a token's rows have been read: chunks of which that was the last go back to their forwarders (I2).
template <class Block>
MOE_EFA_DEVICE void release_rows(Block& block, const CombineArgs& args, std::uint32_t token) {
  const proto::NodeView& view = args.view;
  std::uint32_t nodes = view.topology.num_nodes();
  if (nodes == 1) return;
  for (std::uint32_t node = lane_of(block); node < nodes; node += kWarpSize) {
    const RingFacts& facts = args.plan.send[node].facts;
    std::uint32_t row = find_token(args.plan.send[node], token);
    if (row == facts.rows) continue;
    arrive_in_order(
        block, args.send_arrivals + std::size_t{node} * args.plan.send_chunks, row / facts.rows_per_chunk,
        facts.num_chunks, [&](std::uint32_t chunk) { return facts.rows_in(chunk); },
        [&](std::uint32_t chunk) {
          std::uint64_t word = view.layout.released(kCombine, node, view.topology.local_rank());
          block.store_release(reinterpret_cast<std::uint64_t*>(view.own() + word), args.receive_seq[node] + chunk + 1);
        });
  }
}

template <class Block>
MOE_EFA_DEVICE void reduce_body(Block& block, const CombineArgs& args, std::uint32_t num_blocks,
                                CombineShared& shared) {
  Watch watch = watch_of(args, 2);
  // A warp takes a token: in token order, so that what is waited for is what forwarders send next.
  std::uint32_t warps = num_warps(block), tiles = common::ceil_div(args.plan.num_tokens, warps), ticket;
  while (take_ticket(block, watch, shared.tickets, tiles, &ticket)) {
    std::uint32_t token = ticket * warps + warp_of(block);
    if (token >= args.plan.num_tokens) continue;
    if (reduce_token(block, args, watch, token, shared.terms[warp_of(block)])) release_rows(block, args, token);
  }
  if (block.thread() == 0) leave_grid(block, watch, num_blocks);
}

template <class Block>
MOE_EFA_DEVICE void combine_body(Block& block, const CombineArgs& args, const CombineBlocks& blocks,
                                 CombineShared& shared) {
  if (block.block() < blocks.publish) {
    publish_body(block, args, blocks.publish, shared);
  } else if (block.block() < blocks.publish + blocks.forward) {
    forward_body(block, args, blocks.forward, shared);
  } else {
    reduce_body(block, args, blocks.reduce, shared);
  }
}

}  // namespace moe_efa::kernels::cuda
