// The body of pack, for any Block (block.h).
#pragma once

#include "kernels/cuda/columns.h"
#include "kernels/cuda/pack.h"

namespace moe_efa::kernels::cuda {

template <class Block>
MOE_EFA_DEVICE std::uint64_t load_word(Block& block, std::byte* region, std::uint64_t offset) {
  return block.load_acquire(reinterpret_cast<const std::uint64_t*>(region + offset));
}

// A piece of work: up to kPackRows rows of a chunk.
struct PackPart {
  std::uint32_t node, chunk, begin, end;  // rows of the chunk
};

// For one thread: the slot's readers are done with what was in it (I2, I11).
template <class Block>
MOE_EFA_DEVICE bool wait_for_slot(Block& block, const PackArgs& args, std::uint32_t node, std::uint64_t seq) {
  const proto::NodeView& view = args.view;
  Fault about{};
  about.what = What::kCredit;
  about.epoch = args.call->epoch;
  about.chunk = seq;
  about.peer = view.topology.rail_peer(node);
  std::uint32_t slots = view.layout.ring_slots(node);
  if (seq < slots) return true;
  std::uint64_t least = seq - slots + 1;
  if (node != view.topology.node()) {
    std::uint64_t word = view.layout.send_free(proto::Phase::kDispatch, node);
    return wait_at_least(block, args.watch, least, about,
                         [&] { return load_word(block, view.own_kernel_words(), word); });
  }
  for (std::uint32_t reader = 0; reader < view.topology.node_size; ++reader) {
    std::uint64_t word = view.layout.released(proto::Phase::kDispatch, node, reader);
    about.peer = view.topology.rank_of(node, reader);
    if (!wait_at_least(block, args.watch, least, about, [&] { return load_word(block, view.own(), word); }))
      return false;
  }
  return true;
}

template <class Block>
MOE_EFA_DEVICE void pack_rows(Block& block, const PackArgs& args, const PackPart& part, std::byte* slot,
                              std::uint64_t seq) {
  const proto::LayoutConfig& config = args.view.layout.config();
  const SendView& send = args.plan.send[part.node];
  const RingFacts& facts = send.facts;
  std::uint32_t first = facts.first_row(part.chunk), rows = facts.rows_in(part.chunk);
  std::uint32_t first_entry = args.replay ? 0 : send.entry_begin[first];
  std::uint32_t num_entries = args.replay ? 0 : send.entry_begin[first + rows] - first_entry;
  std::uint64_t row_bytes = proto::hidden_row_bytes(config.hidden_size, args.wire_dtype);

  if (part.begin == 0 && block.thread() == 0) {
    proto::ChunkHeader header{};
    header.magic = proto::kChunkMagic;
    header.version = proto::kProtocolVersion;
    header.phase = static_cast<std::uint8_t>(proto::Phase::kDispatch);
    header.flags = static_cast<std::uint8_t>((args.replay ? proto::kFlagReplay : 0) |
                                             (part.chunk + 1 == facts.num_chunks ? proto::kFlagLast : 0));
    header.source_rank = args.view.topology.rank;
    header.dtype = static_cast<std::uint32_t>(args.wire_dtype);
    header.epoch = args.call->epoch;
    header.seq = seq;
    header.plan_id = args.call->plan_id;
    header.rows = rows;
    header.first_row = first;
    header.num_entries = num_entries;
    header.total_bytes =
        static_cast<std::uint32_t>(proto::dispatch_chunk_bytes(args.replay, rows, num_entries, row_bytes));
    *reinterpret_cast<proto::ChunkHeader*>(slot) = header;
  }
  if (!args.replay) {
    auto* meta = reinterpret_cast<proto::RowMeta*>(slot + sizeof(proto::ChunkHeader));
    for (std::uint32_t row = part.begin + block.thread(); row < part.end; row += block.num_threads()) {
      std::uint32_t at = first + row;
      meta[row] = {send.row_token[at], send.entry_begin[at + 1] - send.entry_begin[at]};
    }
    // Entries as words: neighbours store neighbours.
    constexpr std::uint32_t kWords = sizeof(proto::RowEntry) / 4;
    auto* to = reinterpret_cast<std::uint32_t*>(meta + rows);
    const auto* from = reinterpret_cast<const std::uint32_t*>(send.entries + first_entry);
    std::uint32_t begin = (send.entry_begin[first + part.begin] - first_entry) * kWords;
    std::uint32_t end = (send.entry_begin[first + part.end] - first_entry) * kWords;
    for (std::uint32_t i = begin + block.thread(); i < end; i += block.num_threads()) to[i] = from[i];
  }
  std::byte* hidden = slot + proto::chunk_hidden_offset(args.replay, rows, num_entries);
  const auto* x = static_cast<const std::byte*>(args.x);
  std::uint64_t x_stride = std::uint64_t{config.hidden_size} * proto::dtype_bytes(args.x_dtype);
  for (std::uint32_t row = part.begin + warp_of(block); row < part.end; row += num_warps(block)) {
    convert_row<Memory::kQuiet>(block, hidden + row * row_bytes, args.wire_dtype,
                                x + send.row_token[first + row] * x_stride, args.x_dtype, config.hidden_size,
                                config.fp8_scale);
  }
}

// For one thread of the part that finishes a chunk: whoever acts on it may now.
template <class Block>
MOE_EFA_DEVICE void publish_chunk(Block& block, const PackArgs& args, std::uint32_t node, std::uint32_t chunk,
                                  std::uint64_t seq) {
  const proto::NodeView& view = args.view;
  if (node == view.topology.node()) {
    // Publishes the chunk to the mates, who read it out of this region (I1).
    std::uint64_t arrived = view.layout.arrived(proto::Phase::kDispatch, node, seq);
    block.store_release(reinterpret_cast<std::uint64_t*>(view.own_kernel_words() + arrived), seq + 1);
    return;
  }
  const RingFacts& facts = args.plan.send[node].facts;
  ChunkReady* ready = args.ready + std::size_t{node} * view.layout.config().slots + seq % view.layout.config().slots;
  std::uint32_t first = facts.first_row(chunk), rows = facts.rows_in(chunk);
  const std::uint32_t* begin = args.plan.send[node].entry_begin;
  std::uint32_t num_entries = args.replay ? 0 : begin[first + rows] - begin[first];
  ready->rows = rows;
  ready->bytes = static_cast<std::uint32_t>(proto::dispatch_chunk_bytes(
      args.replay, rows, num_entries, proto::hidden_row_bytes(view.layout.config().hidden_size, args.wire_dtype)));
  // Publishes the chunk to the driver, and through it to the NIC: the one release for all its rows, which are ordered
  // before it by the arrivals of their blocks.
  block.store_release(&ready->seq_plus_1, seq + 1);
}

template <class Block>
MOE_EFA_DEVICE void pack_body(Block& block, const PackArgs& args, std::uint32_t num_blocks, Tickets& shared) {
  const proto::NodeView& view = args.view;
  std::uint32_t nodes = view.topology.num_nodes(), own_node = view.topology.node();
  // One chunk per destination and turn, the next node first: every NIC and peer has work early.
  std::uint32_t parts = common::ceil_div(args.plan.send_chunk_rows, kPackRows);
  std::uint32_t end = args.chunk_end < args.plan.send_chunks ? args.chunk_end : args.plan.send_chunks;
  std::uint32_t count = args.chunk_begin < end ? (end - args.chunk_begin) * nodes * parts : 0;
  std::uint32_t ticket;
  while (take_ticket(block, args.watch, shared, count, &ticket)) {
    std::uint32_t turn = ticket / parts;
    PackPart part;
    part.node = (own_node + 1 + turn % nodes) % nodes;
    part.chunk = args.chunk_begin + turn / nodes;
    part.begin = ticket % parts * kPackRows;
    const RingFacts& facts = args.plan.send[part.node].facts;
    if (part.chunk >= facts.num_chunks || part.begin >= facts.rows_in(part.chunk)) continue;
    std::uint32_t rows = facts.rows_in(part.chunk);
    part.end = part.begin + kPackRows < rows ? part.begin + kPackRows : rows;
    std::uint64_t seq = args.first_seq[part.node] + part.chunk;
    if (block.thread() == 0) shared.go = wait_for_slot(block, args, part.node, seq);
    block.sync();
    if (shared.go == 0) break;
    std::uint64_t offset = part.node == own_node ? view.layout.ring_slot(proto::Phase::kDispatch, own_node, seq)
                                                 : view.layout.send_slot(proto::Phase::kDispatch, part.node, seq);
    pack_rows(block, args, part, view.own_slots() + offset, seq);
    block.sync();
    if (block.thread() == 0) {
      std::uint32_t* arrivals = args.arrivals + std::size_t{part.node} * args.plan.send_chunks + part.chunk;
      if (arrive(block, arrivals, common::ceil_div(rows, kPackRows))) {
        publish_chunk(block, args, part.node, part.chunk, seq);
      }
    }
  }
  if (block.thread() == 0) leave_grid(block, args.watch, num_blocks);
}

}  // namespace moe_efa::kernels::cuda
