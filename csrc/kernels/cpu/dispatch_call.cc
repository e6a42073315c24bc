#include "kernels/cpu/dispatch_call.h"

#include <algorithm>
#include <cstring>
#include <sstream>

#include "common/atomic.h"
#include "common/mutant.h"
#include "common/status.h"
#include "kernels/cpu/pack.h"
#include "kernels/cpu/pull.h"

namespace moe_efa::kernels::cpu {

using common::load_acquire;
using common::Mutant;
using common::mutant;
using common::store_release;
using proto::Phase;

namespace {

constexpr auto kPhase = Phase::kDispatch;

}  // namespace

DispatchCall::DispatchCall(const CallContext& context, const DispatchArgs& args)
    : context_(context), args_(args), replay_(args.plan->complete) {
  const proto::LayoutConfig& config = context_.view.layout.config();
  std::size_t num_rings = std::size_t{config.node_size} * config.num_nodes;
  next_chunk_.assign(config.num_nodes, 0);
  rings_.resize(num_rings);
  RankState& state = context_.state;
  own_ = next_dispatch(state, args_);
  announced_.emplace(context_, own_, *args_.plan);
  first_seq_ = state.dispatch_sent;
  for (std::uint32_t node = 0; node < config.num_nodes; ++node) {
    state.dispatch_sent[node] += args_.plan->send[node].facts.num_chunks;
  }
}

std::size_t DispatchCall::ring_index(std::uint32_t local, std::uint32_t node) const {
  return std::size_t{local} * context_.view.topology.num_nodes() + node;
}

bool DispatchCall::step() {
  if (done_) return false;
  if (!begun_) return begin();
  bool moved = step_pack();
  moved |= step_counts();
  moved |= step_pull();
  if (packed_ && output_set_ &&
      std::all_of(rings_.begin(), rings_.end(), [](const Ring& ring) { return ring.head == ring.facts.num_chunks; })) {
    finish();
    return true;
  }
  return moved;
}

bool DispatchCall::begin() {
  if (!may_begin(context_, own_)) return false;
  std::vector<const RingFacts*> facts;
  std::vector<const std::vector<std::uint32_t>*> counts;
  for (const SendPlan& send : args_.plan->send) {
    facts.push_back(&send.facts);
    counts.push_back(&send.expert_counts);
  }
  announce(context_, own_, facts.data(), first_seq_.data(), replay_ ? nullptr : counts.data());
  begun_ = true;
  return true;
}

bool DispatchCall::slot_is_free(std::uint32_t node, std::uint64_t seq) const {
  const proto::NodeView& view = context_.view;
  if (node != view.topology.node()) {
    return seq < load_acquire(view.own_word(view.layout.send_free(kPhase, node))) + view.layout.config().slots;
  }
  std::uint64_t least = ~0ull;
  for (std::uint32_t reader = 0; reader < view.topology.node_size; ++reader) {
    least = std::min(least, load_acquire(view.own_word(view.layout.released(kPhase, node, reader))));
  }
  return seq < least + view.layout.config().own_slots;
}

bool DispatchCall::step_pack() {
  if (packed_) return false;
  const proto::NodeView& view = context_.view;
  std::uint32_t nodes = view.topology.num_nodes(), own_node = view.topology.node();
  struct Item {
    std::uint32_t node, chunk;
    std::uint64_t seq;
    std::uint32_t bytes;
  };
  // One chunk per destination and turn, the next node first: every NIC and peer has work early.
  std::vector<Item> items;
  std::size_t per_node = common::ceil_div<std::size_t>(context_.executor.width(), nodes);
  for (std::uint32_t i = 1; i <= nodes; ++i) {
    std::uint32_t node = (own_node + i) % nodes;
    for (std::size_t n = 0; n < per_node && next_chunk_[node] < args_.plan->send[node].facts.num_chunks; ++n) {
      std::uint64_t seq = first_seq_[node] + next_chunk_[node];
      if (!slot_is_free(node, seq)) break;
      items.push_back({node, next_chunk_[node]++, seq, 0});
    }
  }
  context_.executor.run(items.size(), [&](std::size_t i) {
    Item& item = items[i];
    std::uint64_t offset = item.node == own_node ? view.layout.ring_slot(kPhase, own_node, item.seq)
                                                 : view.layout.send_slot(kPhase, item.node, item.seq);
    item.bytes = pack_chunk({&args_, item.node, item.chunk, item.seq, own_.epoch, view.own_slots() + offset}, view);
  });
  bool published = false;
  for (const Item& item : items) {
    if (item.node == own_node) {
      published = true;
      // Publishes the chunk to the mates; the own ring needs no driver.
      store_release(view.own_word(view.layout.arrived(kPhase, own_node, item.seq)), item.seq + 1);
    } else {
      const RingFacts& facts = args_.plan->send[item.node].facts;
      context_.descriptors->push({static_cast<std::uint16_t>(item.node), static_cast<std::uint8_t>(kPhase),
                                  item.chunk + 1 == facts.num_chunks ? engine::Descriptor::kLast : std::uint8_t{0},
                                  facts.rows_in(item.chunk), item.bytes, static_cast<std::uint32_t>(own_.epoch)});
    }
  }
  if (published) context_.ring_all();
  packed_ = true;
  for (std::uint32_t node = 0; node < nodes; ++node) {
    packed_ = packed_ && next_chunk_[node] == args_.plan->send[node].facts.num_chunks;
  }
  return !items.empty() || packed_;
}

bool DispatchCall::step_counts() {
  if (sizes_known_) return false;
  bool moved = announced_->step(context_, own_, *args_.plan);
  if (!announced_->complete()) return moved;
  sizes_known_ = true;
  for (std::size_t i = 0; i < rings_.size(); ++i) {
    const AnnouncedRing& announced = announced_->rings()[i];
    rings_[i].first_seq = announced.first_seq;
    rings_[i].facts = announced.facts;
    rings_[i].wire_dtype = announced.wire_dtype;
    rings_[i].pulled.assign(announced.facts.num_chunks, false);
  }
  if (!replay_) make_room();
  return true;
}

// For what pulls will fill in.
void DispatchCall::make_room() {
  const proto::Topology& topology = context_.view.topology;
  Plan& plan = *args_.plan;
  announced_->size_plan(context_, own_, plan);
  plan.pulls.resize(rings_.size());
  for (std::size_t i = 0; i < rings_.size(); ++i) plan.pulls[i].resize(plan.rings[i].num_chunks);
  const RingFacts* forwarded = &plan.rings[ring_index(topology.local_rank(), 0)];  // [node]
  const StaticSizes* sizes = announced_->static_sizes();
  bool lost = sizes != nullptr && sizes->any_lost();
  plan.masks.resize(topology.num_nodes());
  if (lost) plan.chunk_overflow.resize(topology.num_nodes());
  for (std::uint32_t node = 0; node < topology.num_nodes(); ++node) {
    plan.masks[node].assign(std::size_t{forwarded[node].rows} * plan.mask_bytes, 0);
    if (lost) plan.chunk_overflow[node].assign(forwarded[node].num_chunks, 0);
  }
}

void DispatchCall::set_output(const DispatchOutput& output) {
  const proto::LayoutConfig& config = context_.view.layout.config();
  const Plan& plan = *args_.plan;
  output_ = output;
  output_set_ = true;
  std::uint64_t stride = std::uint64_t{config.hidden_size} * proto::dtype_bytes(args_.out_dtype);
  auto clear = [&](std::int64_t begin, std::int64_t end) {
    if (begin == end) return;
    std::memset(static_cast<std::byte*>(output.x) + begin * stride, 0, (end - begin) * stride);
    if (args_.out_dtype == proto::DType::kFp8) {
      std::uint32_t blocks = proto::fp8_blocks(config.hidden_size);
      std::fill(output.scales + begin * blocks, output.scales + end * blocks, 1.0f);
    }
    if (!replay_) std::memset(output.weights + begin, 0, (end - begin) * sizeof(float));
  };
  for (std::uint32_t expert = 0; expert < config.experts_per_rank; ++expert) {
    clear(plan.offsets[expert] + plan.tokens_per_expert[expert], plan.offsets[expert + 1]);
  }
  clear(plan.offsets.back(), plan.rows());
}

bool DispatchCall::step_pull() {
  if (!output_set_) return false;
  const proto::NodeView& view = context_.view;
  std::uint32_t nodes = view.topology.num_nodes(), mates = view.topology.node_size;
  struct Item {
    std::uint32_t local, node, chunk;
  };
  std::vector<Item> items;
  std::size_t most = std::max<std::size_t>(4, context_.executor.width());  // releases follow soon
  for (std::uint32_t i = 0; i < mates && items.size() < most; ++i) {
    std::uint32_t local = (view.topology.local_rank() + i) % mates;
    for (std::uint32_t node = 0; node < nodes && items.size() < most; ++node) {
      const Ring& ring = rings_[ring_index(local, node)];
      std::uint32_t end = std::min(ring.facts.num_chunks, ring.head + view.layout.ring_slots(node));
      if (mutant(Mutant::kReleaseBeforeRead) && ring.head < end) {
        store_release(view.word(local, view.layout.released(kPhase, node, view.topology.local_rank())),
                      ring.first_seq + ring.head + 1);
      }
      for (std::uint32_t chunk = ring.head; chunk < end && items.size() < most; ++chunk) {
        std::uint64_t seq = ring.first_seq + chunk;
        // Pairs with the release in pack (own ring) or in the pump (I1).
        if (!ring.pulled[chunk] && load_acquire(view.word(local, view.layout.arrived(kPhase, node, seq))) == seq + 1) {
          items.push_back({local, node, chunk});
        }
      }
    }
  }
  if (items.empty()) return false;
  auto release = [&](const Item& item) {
    Ring& ring = rings_[ring_index(item.local, item.node)];
    ring.pulled[item.chunk] = true;
    while (ring.head < ring.facts.num_chunks && ring.pulled[ring.head]) ++ring.head;
    // Gives the slots below back: this rank has read all it needs of them (I2).
    store_release(view.word(item.local, view.layout.released(kPhase, item.node, view.topology.local_rank())),
                  ring.first_seq + ring.head);
  };
  context_.executor.run(items.size(), [&](std::size_t i) {
    const Item& item = items[i];
    const Ring& ring = rings_[ring_index(item.local, item.node)];
    std::uint64_t seq = ring.first_seq + item.chunk;
    std::size_t source =
        std::size_t{view.topology.rank_of(item.node, item.local)} * view.layout.config().experts_per_rank;
    pull_chunk({args_.plan.get(), &output_, args_.out_dtype, ring.wire_dtype, item.local, item.node, item.chunk, seq,
                own_.epoch, replay_, view.slots(item.local) + view.layout.ring_slot(kPhase, item.node, seq),
                announced_->expert_counts().data() + source, announced_->expert_base().data() + source,
                announced_->static_sizes()},
               view);
  });
  for (const Item& item : items) release(item);
  for (std::uint32_t local = 0; local < mates; ++local) {
    if (std::any_of(items.begin(), items.end(), [&](const Item& item) { return item.local == local; })) {
      context_.ring(local);
    }
  }
  return true;
}

void DispatchCall::finish() {
  done_ = true;
  if (replay_) return;
  Plan& plan = *args_.plan;
  std::size_t pulled = 0;
  for (auto& ring : plan.pulls) {
    for (auto& chunk : ring) {
      pulled += chunk.size();
      chunk.shrink_to_fit();
    }
  }
  std::int64_t announced = 0;
  for (std::int64_t count : plan.tokens_per_expert) announced += count;
  if (static_cast<std::int64_t>(pulled) != announced) {
    throw common::StatusError(
        {common::StatusCode::kProtocol, -1, static_cast<int>(kPhase), static_cast<std::int64_t>(own_.epoch), -1,
         "received " + std::to_string(pulled) + " rows where " + std::to_string(announced) + " were announced"});
  }
  for (SendPlan& send : plan.send) {
    send.entries = {};
    send.entry_begin = {};
    send.expert_counts = {};
  }
  plan.complete = true;
}

Waiting DispatchCall::waiting() const {
  const proto::NodeView& view = context_.view;
  if (!begun_) return {-1, -1, "for its own earlier writes to complete"};
  if (int absent = absent_rank(context_, own_); absent >= 0) return {absent, -1, "to enter the call", true};
  if (!sizes_known_) return {-1, -1, "for counts"};
  for (std::uint32_t local = 0; local < view.topology.node_size; ++local) {
    for (std::uint32_t node = 0; node < view.topology.num_nodes(); ++node) {
      const Ring& ring = rings_[ring_index(local, node)];
      if (view.topology.rank_of(node, local) == view.topology.rank) continue;  // it waits for a credit: see below
      if (output_set_ && ring.head < ring.facts.num_chunks) {
        return {static_cast<int>(view.topology.rank_of(node, local)),
                static_cast<std::int64_t>(ring.first_seq + ring.head), "for a chunk"};
      }
    }
  }
  for (std::uint32_t node = 0; node < view.topology.num_nodes(); ++node) {
    if (next_chunk_[node] == args_.plan->send[node].facts.num_chunks) continue;
    std::uint32_t slowest = view.topology.local_rank();
    if (node == view.topology.node()) {
      for (std::uint32_t reader = 0; reader < view.topology.node_size; ++reader) {
        if (load_acquire(view.own_word(view.layout.released(kPhase, node, reader))) <
            load_acquire(view.own_word(view.layout.released(kPhase, node, slowest)))) {
          slowest = reader;
        }
      }
    }
    return {static_cast<int>(view.topology.rank_of(node, slowest)),
            static_cast<std::int64_t>(first_seq_[node] + next_chunk_[node]), "for a credit"};
  }
  return {};
}

}  // namespace moe_efa::kernels::cpu
