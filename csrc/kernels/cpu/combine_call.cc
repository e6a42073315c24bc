#include "kernels/cpu/combine_call.h"

#include <algorithm>
#include <cstring>
#include <sstream>

#include "common/atomic.h"
#include "common/mutant.h"
#include "common/status.h"
#include "kernels/cpu/forward.h"
#include "kernels/cpu/publish.h"
#include "kernels/cpu/reduce.h"
#include "kernels/header_check.h"

namespace moe_efa::kernels::cpu {

using common::load_acquire;
using common::Mutant;
using common::mutant;
using common::store_release;
using proto::Phase;

namespace {

constexpr auto kPhase = Phase::kCombine;
constexpr std::uint32_t kTokensPerItem = 64;

}  // namespace

CombineCall::CombineCall(const CallContext& context, const CombineArgs& args) : context_(context), args_(args) {
  const proto::LayoutConfig& config = context_.view.layout.config();
  RankState& state = context_.state;
  std::size_t num_rings = std::size_t{config.node_size} * config.num_nodes;
  announced_.assign(config.node_size + config.num_nodes, false);
  published_.assign(num_rings, 0);
  forwarded_.assign(config.num_nodes, 0);
  received_.assign(config.num_nodes, 0);
  own_ = next_combine(state, args_);
  publish_base_ = state.combine_seen;
  receive_base_ = state.combine_received;
  for (std::size_t i = 0; i < num_rings; ++i) state.combine_seen[i] += args_.plan->rings[i].num_chunks;
  // What this rank forwards itself is added up there.
  std::uint32_t local = context_.view.topology.local_rank();
  for (std::uint32_t node = 0; node < config.num_nodes; ++node) {
    published_[ring_index(local, node)] = ring_facts(local, node).num_chunks;
  }
  for (std::uint32_t node = 0; node < config.num_nodes; ++node) {
    state.combine_received[node] += args_.plan->send[node].facts.num_chunks;
  }
}

std::size_t CombineCall::ring_index(std::uint32_t local, std::uint32_t node) const {
  return std::size_t{local} * context_.view.topology.num_nodes() + node;
}

const RingFacts& CombineCall::ring_facts(std::uint32_t local, std::uint32_t node) const {
  return args_.plan->rings[ring_index(local, node)];
}

bool CombineCall::step() {
  if (done_) return false;
  if (!begun_) return begin();
  bool moved = step_announcements();
  moved |= step_publish();
  moved |= step_forward();
  moved |= step_reduce();
  if (!all_announced_ || tokens_done_ < args_.plan->num_tokens) return moved;
  for (std::size_t i = 0; i < published_.size(); ++i) {
    if (published_[i] < args_.plan->rings[i].num_chunks) return moved;
  }
  for (std::uint32_t node = 0; node < context_.view.topology.num_nodes(); ++node) {
    if (forwarded_[node] < ring_facts(context_.view.topology.local_rank(), node).num_chunks) return moved;
  }
  if (overflow_ > 0) args_.plan->raise_overflow(overflow_);
  done_ = true;
  return true;
}

bool CombineCall::begin() {
  if (!may_begin(context_, own_)) return false;
  const proto::NodeView& view = context_.view;
  // What this rank will forward to each of its rail peers.
  std::vector<const RingFacts*> facts;
  std::vector<std::uint64_t> first_seq;
  for (std::uint32_t node = 0; node < view.topology.num_nodes(); ++node) {
    facts.push_back(&ring_facts(view.topology.local_rank(), node));
    first_seq.push_back(publish_base_[ring_index(view.topology.local_rank(), node)]);
  }
  announce(context_, own_, facts.data(), first_seq.data(), nullptr);
  if (view.topology.num_nodes() == 1) clear_unsent();
  begun_ = true;
  return true;
}

// Where forward writes the results, nobody else writes those of tokens that selected nothing.
void CombineCall::clear_unsent() {
  const proto::LayoutConfig& config = context_.view.layout.config();
  const std::vector<std::uint32_t>& sent = args_.plan->send[0].row_token;
  std::uint64_t stride = std::uint64_t{config.hidden_size} * proto::dtype_bytes(args_.y_dtype);
  std::size_t row = 0;
  for (std::uint32_t token = 0; token < args_.plan->num_tokens; ++token) {
    if (row < sent.size() && sent[row] == token) {
      ++row;
      continue;
    }
    std::memset(static_cast<std::byte*>(args_.out) + token * stride, 0, stride);
    if (args_.weight_grads != nullptr) {
      std::memset(args_.topk_weight_grads + std::size_t{token} * config.top_k, 0, config.top_k * sizeof(float));
    }
  }
}

bool CombineCall::step_announcements() {
  if (all_announced_) return false;
  const proto::NodeView& view = context_.view;
  std::uint32_t mates = view.topology.node_size, nodes = view.topology.num_nodes();
  bool moved = false, all = true;
  auto read = [&](std::size_t at, std::uint32_t board, std::uint32_t node) {
    if (announced_[at]) return;
    proto::CountsRecord record;
    if (!read_announcement(context_, own_, board, node, &record)) {
      all = false;
      return;
    }
    announced_[at] = moved = true;
    if (board != view.topology.local_rank()) return;
    RingFacts facts{record.rows, record.rows_per_chunk, record.num_chunks};
    if (facts != args_.plan->send[node].facts || record.first_seq != receive_base_[node]) {
      auto rank = static_cast<int>(view.topology.rank_of(node, board));
      throw common::StatusError({common::StatusCode::kProtocol, rank, static_cast<int>(kPhase),
                                 static_cast<std::int64_t>(own_.epoch), -1,
                                 "rank " + std::to_string(rank) + " returns other rows than were sent to its node"});
    }
  };
  // Only those with whom this rank exchanges anything: its mates and its rail peers.
  for (std::uint32_t mate = 0; mate < mates; ++mate) read(mate, mate, view.topology.node());
  for (std::uint32_t node = 0; node < nodes; ++node) read(mates + node, view.topology.local_rank(), node);
  all_announced_ = all;
  if (!all && !moved) check_other_phase(context_, own_);
  return moved;
}

bool CombineCall::step_publish() {
  const proto::NodeView& view = context_.view;
  std::uint32_t nodes = view.topology.num_nodes(), mates = view.topology.node_size;
  struct Item {
    std::uint32_t local, node, chunk;
  };
  std::vector<Item> items;
  std::size_t most = std::max<std::size_t>(mates * nodes, context_.executor.width());
  for (std::uint32_t i = 1; i < mates; ++i) {
    std::uint32_t local = (view.topology.local_rank() + i) % mates;
    for (std::uint32_t n = 1; n <= nodes; ++n) {
      std::uint32_t node = (view.topology.node() + n) % nodes;
      std::uint32_t& next = published_[ring_index(local, node)];
      std::uint64_t consumed = load_acquire(view.word(local, view.layout.consumed(node)));
      for (std::uint32_t burst = 0; burst < 2 && next < ring_facts(local, node).num_chunks; ++burst) {
        std::uint64_t seq = publish_base_[ring_index(local, node)] + next;
        if (seq >= consumed + view.layout.config().publish_slots && !mutant(Mutant::kPublishWithoutConsumed)) break;
        if (items.size() >= most) break;
        items.push_back({local, node, next++});
      }
    }
  }
  if (items.empty()) return false;
  context_.executor.run(items.size(), [&](std::size_t i) {
    const Item& item = items[i];
    std::uint64_t seq = publish_base_[ring_index(item.local, item.node)] + item.chunk;
    publish_chunk({&args_, item.local, item.node, item.chunk,
                   view.own_slots() + view.layout.publish_slot(item.local, item.node, seq)},
                  view);
  });
  for (const Item& item : items) {
    // Publishes the slot to the forwarder.
    store_release(view.own_word(view.layout.published(item.local, item.node)),
                  publish_base_[ring_index(item.local, item.node)] + item.chunk + 1);
  }
  for (std::uint32_t local = 0; local < mates; ++local) {
    if (std::any_of(items.begin(), items.end(), [&](const Item& item) { return item.local == local; })) {
      context_.ring(local);
    }
  }
  return true;
}

bool CombineCall::slot_is_free(std::uint32_t node, std::uint64_t seq) const {
  const proto::NodeView& view = context_.view;
  if (node != view.topology.node()) {
    return seq < load_acquire(view.own_word(view.layout.send_free(kPhase, node))) + view.layout.config().slots;
  }
  return seq < load_acquire(view.own_word(view.layout.released(kPhase, node, view.topology.local_rank()))) +
                   view.layout.config().own_slots;
}

bool CombineCall::step_forward() {
  const proto::NodeView& view = context_.view;
  std::uint32_t nodes = view.topology.num_nodes(), local = view.topology.local_rank(), own_node = view.topology.node();
  struct Item {
    std::uint32_t node, chunk;
    std::uint64_t seq;
    std::uint32_t bytes;
  };
  std::vector<Item> items;
  for (std::uint32_t n = 1; n <= nodes; ++n) {
    std::uint32_t node = (own_node + n) % nodes;
    const RingFacts& facts = ring_facts(local, node);
    std::uint64_t ready = ~0ull;
    for (std::uint32_t mate = 0; mate < view.topology.node_size; ++mate) {
      if (mate == local) continue;
      ready = std::min(ready, load_acquire(view.word(mate, view.layout.published(local, node))));
    }
    for (std::uint32_t burst = 0; burst < 2 && forwarded_[node] < facts.num_chunks; ++burst) {
      std::uint64_t seq = publish_base_[ring_index(local, node)] + forwarded_[node];
      if (seq >= ready || (nodes > 1 && !slot_is_free(node, seq))) break;
      items.push_back({node, forwarded_[node]++, seq, 0});
    }
  }
  if (items.empty()) return false;
  if (mutant(Mutant::kForwardInReadinessOrder)) {
    for (std::size_t i = 0; i + 1 < items.size(); ++i) {
      if (items[i].node == items[i + 1].node) std::swap(items[i].chunk, items[i + 1].chunk);
    }
  }
  context_.executor.run(items.size(), [&](std::size_t i) {
    Item& item = items[i];
    if (nodes == 1) {
      forward_to_output({&args_, item.node, item.chunk, item.seq, own_.epoch, nullptr}, view);
      return;
    }
    std::uint64_t offset = item.node == own_node ? view.layout.ring_slot(kPhase, own_node, item.seq)
                                                 : view.layout.send_slot(kPhase, item.node, item.seq);
    item.bytes = forward_chunk({&args_, item.node, item.chunk, item.seq, own_.epoch, view.own_slots() + offset}, view);
  });
  for (const Item& item : items) {
    if (nodes == 1) {
      // The result is where it belongs, and what it lacks is known here.
      overflow_ = std::max(overflow_, args_.plan->overflow_of(0, item.chunk));
    } else if (item.node == own_node) {
      // Publishes the chunk to this rank's own reduce.
      store_release(view.own_word(view.layout.arrived(kPhase, own_node, item.seq)), item.seq + 1);
    } else {
      const RingFacts& facts = ring_facts(local, item.node);
      context_.descriptors->push({static_cast<std::uint16_t>(item.node), static_cast<std::uint8_t>(kPhase),
                                  item.chunk + 1 == facts.num_chunks ? engine::Descriptor::kLast : std::uint8_t{0},
                                  facts.rows_in(item.chunk), item.bytes, static_cast<std::uint32_t>(own_.epoch)});
    }
    // Gives the publish slots back to the mates.
    store_release(view.own_word(view.layout.consumed(item.node)), item.seq + 1);
  }
  context_.ring_all();
  return true;
}

void CombineCall::check_chunk(std::uint32_t node, std::uint32_t chunk) {
  const proto::NodeView& view = context_.view;
  const RingFacts& facts = args_.plan->send[node].facts;
  std::uint64_t seq = receive_base_[node] + chunk;
  proto::ChunkHeader header;
  std::memcpy(&header, view.own_slots() + view.layout.ring_slot(kPhase, node, seq), sizeof(header));
  std::uint32_t rank = view.topology.rail_peer(node);
  ExpectedHeader expected{};
  expected.phase = kPhase;
  expected.flags =
      static_cast<std::uint8_t>(own_.flags | (chunk + 1 == facts.num_chunks ? proto::kFlagLast : std::uint8_t{0}));
  expected.source_rank = rank;
  expected.epoch = own_.epoch;
  expected.seq = seq;
  expected.plan_id = own_.plan_id;
  expected.rows = facts.rows_in(chunk);
  expected.first_row = facts.first_row(chunk);
  expected.dtype = own_.dtype;
  expected.may_overflow = args_.plan->is_static();
  HeaderMismatch wrong = check_header(header, expected, view.layout.config());
  if (wrong.part == HeaderPart::kAll || mutant(Mutant::kHeaderUnchecked)) {
    overflow_ = std::max(overflow_, header.required_capacity);
    return;
  }
  std::ostringstream text;
  text << "chunk " << seq << " of rank " << rank << " in combine, epoch " << own_.epoch
       << ": header differs from the plan: " << header_text(wrong.part);
  throw common::StatusError({common::StatusCode::kProtocol, static_cast<int>(rank), static_cast<int>(kPhase),
                             static_cast<std::int64_t>(own_.epoch), static_cast<std::int64_t>(seq), text.str()});
}

bool CombineCall::step_reduce() {
  const Plan& plan = *args_.plan;
  if (tokens_done_ == plan.num_tokens) return false;
  const proto::NodeView& view = context_.view;
  if (view.topology.num_nodes() == 1) {  // forward wrote the results
    received_[0] = forwarded_[0];
    if (forwarded_[0] == plan.send[0].facts.num_chunks) tokens_done_ = plan.num_tokens;
    return false;
  }
  std::uint32_t nodes = view.topology.num_nodes();
  std::uint32_t limit = plan.num_tokens;  // tokens below have all their rows
  for (std::uint32_t node = 0; node < nodes; ++node) {
    const SendPlan& send = plan.send[node];
    while (received_[node] < send.facts.num_chunks) {
      std::uint64_t seq = receive_base_[node] + received_[node];
      // Pairs with the release in forward (own ring) or in the pump (I1).
      if (load_acquire(view.own_word(view.layout.arrived(kPhase, node, seq))) != seq + 1) break;
      check_chunk(node, received_[node]++);
    }
    if (received_[node] < send.facts.num_chunks) {
      limit = std::min(limit, send.row_token[send.facts.first_row(received_[node])]);
    }
  }
  if (limit <= tokens_done_) return false;
  std::uint32_t items = common::ceil_div(limit - tokens_done_, kTokensPerItem);
  context_.executor.run(items, [&](std::size_t i) {
    std::uint32_t begin = tokens_done_ + static_cast<std::uint32_t>(i) * kTokensPerItem;
    reduce_tokens({&args_, receive_base_.data(), begin, std::min(begin + kTokensPerItem, limit)}, view);
  });
  tokens_done_ = limit;
  for (std::uint32_t node = 0; node < nodes; ++node) {
    const SendPlan& send = plan.send[node];
    if (send.facts.num_chunks == 0) continue;
    auto rows = static_cast<std::uint32_t>(std::lower_bound(send.row_token.begin(), send.row_token.end(), limit) -
                                           send.row_token.begin());
    std::uint32_t chunks = rows == send.facts.rows ? send.facts.num_chunks : rows / send.facts.rows_per_chunk;
    // Gives the slots below back to the forwarder (I2).
    store_release(view.own_word(view.layout.released(kPhase, node, view.topology.local_rank())),
                  receive_base_[node] + chunks);
  }
  return true;
}

Waiting CombineCall::waiting() const {
  const proto::NodeView& view = context_.view;
  std::uint32_t local = view.topology.local_rank();
  if (!begun_) return {-1, -1, "for its own earlier writes to complete"};
  if (int absent = absent_rank(context_, own_); absent >= 0) return {absent, -1, "to enter the call", true};
  for (std::uint32_t node = 0; node < view.topology.num_nodes(); ++node) {
    if (forwarded_[node] == ring_facts(local, node).num_chunks) continue;
    std::uint64_t seq = publish_base_[ring_index(local, node)] + forwarded_[node];
    for (std::uint32_t mate = 0; mate < view.topology.node_size; ++mate) {
      if (mate != local && load_acquire(view.word(mate, view.layout.published(local, node))) <= seq) {
        return {static_cast<int>(view.topology.rank_of(view.topology.node(), mate)), static_cast<std::int64_t>(seq),
                "to publish a chunk"};
      }
    }
    return {static_cast<int>(view.topology.rail_peer(node)), static_cast<std::int64_t>(seq), "for a credit"};
  }
  for (std::uint32_t node = 0; node < view.topology.num_nodes(); ++node) {
    if (received_[node] < args_.plan->send[node].facts.num_chunks) {
      return {static_cast<int>(view.topology.rail_peer(node)),
              static_cast<std::int64_t>(receive_base_[node] + received_[node]), "for a chunk"};
    }
  }
  for (std::uint32_t mate = 0; mate < view.topology.node_size; ++mate) {
    for (std::uint32_t node = 0; node < view.topology.num_nodes(); ++node) {
      if (published_[ring_index(mate, node)] < ring_facts(mate, node).num_chunks) {
        return {static_cast<int>(view.topology.rank_of(view.topology.node(), mate)),
                static_cast<std::int64_t>(publish_base_[ring_index(mate, node)] + published_[ring_index(mate, node)]),
                "to forward a chunk"};
      }
    }
  }
  return {};
}

}  // namespace moe_efa::kernels::cpu
