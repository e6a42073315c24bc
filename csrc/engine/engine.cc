#include "engine/engine.h"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <string>
#include <utility>

#include "common/mutant.h"

namespace moe_efa::engine {

using common::Mutant;
using common::mutant;
using proto::Imm;
using proto::ImmKind;
using proto::kNumPhases;
using proto::Phase;

namespace {

constexpr std::uint32_t index(Phase phase) { return static_cast<std::uint32_t>(phase); }

// Write ids: kind 2 | phase 1 | node 10 | nic 5 | sequence 46.
constexpr int kIdNicShift = 46, kIdNodeShift = 51, kIdPhaseShift = 61, kIdKindShift = 62;
constexpr std::uint64_t kIdSeqMask = (1ull << kIdNicShift) - 1;

}  // namespace

std::uint64_t max_inbound_events(const proto::LayoutConfig& layout) {
  // From each rail peer, per phase: S chunks, S credits, the overtaken ones, counts of two live epochs; and one hello,
  // as a hello goes to the NIC of the same number.
  std::uint64_t per_peer = kNumPhases * (2ull * layout.slots + kMaxCreditsInFlight + 2) + 1;
  return (layout.num_nodes - 1) * per_peer;
}

std::size_t max_descriptors(const proto::LayoutConfig& layout) {
  return (layout.num_nodes - 1) * std::size_t{kNumPhases} * (layout.slots + 2);
}

Engine::Engine(const EngineConfig& config)
    : topology_(config.topology),
      layout_(config.layout, config.topology.node()),
      region_(config.region),
      slots_(config.slots != nullptr ? config.slots : config.region),
      max_writes_per_nic_(config.max_writes_per_nic),
      credit_batch_(std::max(1u, config.layout.slots / 4)),
      largest_chunk_bytes_(std::max(layout_.slot_bytes(Phase::kDispatch), layout_.slot_bytes(Phase::kCombine))),
      hello_seen_(std::size_t{config.topology.num_nodes()} * config.num_nics, false),
      nics_(config.num_nics) {
  std::uint32_t nodes = topology_.num_nodes(), slots = config.layout.slots;
  MOE_EFA_CHECK(nodes <= proto::kMaxNodes, nodes << " nodes exceed the immediate's node field");
  MOE_EFA_CHECK(slots >= 1 && slots <= proto::kMaxSlots, slots << " slots per ring");
  MOE_EFA_CHECK(config.num_nics >= 1 && config.num_nics <= 32, config.num_nics << " NICs");
  stats_.nics.resize(config.num_nics);
  for (std::uint32_t node = 0; node < nodes; ++node) peer_layouts_.emplace_back(config.layout, node);
  for (std::uint32_t p = 0; p < kNumPhases; ++p) {
    send_[p].resize(nodes);
    receive_[p].resize(nodes);
    for (auto& ring : send_[p]) ring.done.assign(slots, 0);
    for (auto& ring : receive_[p]) ring.landed.assign(slots, 0);
    counts_seen_[p].assign(std::size_t{nodes} * 2, 0);
    inflight_bytes_[p].assign(std::size_t{nodes} * slots, 0);
  }
}

Engine::SendRing& Engine::send_ring(Phase phase, std::uint32_t node) { return send_[index(phase)][node]; }
Engine::ReceiveRing& Engine::receive_ring(Phase phase, std::uint32_t node) { return receive_[index(phase)][node]; }

std::uint64_t Engine::make_id(WriteKind kind, Phase phase, std::uint32_t node, std::uint32_t nic,
                              std::uint64_t seq) const {
  return static_cast<std::uint64_t>(kind) << kIdKindShift | std::uint64_t{index(phase)} << kIdPhaseShift |
         std::uint64_t{node} << kIdNodeShift | std::uint64_t{nic} << kIdNicShift | (seq & kIdSeqMask);
}

void Engine::on_failure(const common::Status& status) {
  if (failure_.ok()) failure_ = status;  // the first error wins (I6)
}

void Engine::protocol_error(std::uint32_t node, Phase phase, std::int64_t epoch, std::int64_t chunk,
                            const std::string& text) {
  int rank = node < topology_.num_nodes() ? static_cast<int>(topology_.rail_peer(node)) : -1;
  std::ostringstream message;
  message << "protocol error from rank " << rank << " in " << proto::phase_name(phase) << ", epoch " << epoch
          << ", chunk " << chunk << ": " << text;
  on_failure({common::StatusCode::kProtocol, rank, static_cast<int>(phase), epoch, chunk, message.str()});
}

// --- outgoing

void Engine::on_hello_wanted() {
  for (std::uint32_t node = 0; node < topology_.num_nodes(); ++node) {
    if (node == topology_.node()) continue;
    for (Nic& nic : nics_) nic.hellos.push_back(node);
    hellos_due_ += nics_.size();
  }
}

std::optional<MissingHello> Engine::missing_hello() const {
  auto nics = static_cast<std::uint32_t>(nics_.size());
  for (std::uint32_t i = 0; i < hello_seen_.size(); ++i) {
    if (i / nics != topology_.node() && !hello_seen_[i]) return MissingHello{i / nics, i % nics};
  }
  return std::nullopt;
}

void Engine::on_begun(Phase phase, std::uint64_t num_epochs) {
  begun_[index(phase)] = std::max(begun_[index(phase)], num_epochs);
}

void Engine::on_descriptor(const Descriptor& descriptor) {
  auto phase = static_cast<Phase>(descriptor.phase);
  SendRing& ring = send_ring(phase, descriptor.node);
  if (descriptor.flags & Descriptor::kCounts) {
    std::uint64_t epoch = ring.epochs.empty() ? retired_[index(phase)] : ring.epochs.back().epoch + 1;
    MOE_EFA_CHECK(static_cast<std::uint32_t>(epoch) == descriptor.epoch,
                  "counts of epoch " << descriptor.epoch << " posted as epoch " << epoch);
    std::uint64_t begin = ring.epochs.empty() ? ring.packed : ring.epochs.back().end_seq;
    ring.epochs.push_back({epoch, begin + descriptor.count, false});
    urgent_.push_back({WriteKind::kCounts, phase, descriptor.node, descriptor.bytes, epoch, epoch, false});
    return;
  }
  std::uint64_t seq = ring.packed++;
  MOE_EFA_CHECK(!ring.epochs.empty() && seq < ring.epochs.back().end_seq, "chunk beyond its announced epoch");
  bulk_.push_back({WriteKind::kChunk, phase, descriptor.node, descriptor.bytes, seq, ring.epochs.back().epoch,
                   (descriptor.flags & Descriptor::kLast) != 0});
}

int Engine::pick_nic() const {
  std::uint64_t shortest = ~0ull;
  for (const Nic& nic : nics_) {
    if (has_room(nic)) shortest = std::min(shortest, nic.queued_bytes);
  }
  int best = -1;
  for (std::size_t nic = 0; nic < nics_.size(); ++nic) {
    // Whoever completes a little sooner would get more and more; whoever is slow falls behind by more than a chunk.
    if (!has_room(nics_[nic]) || nics_[nic].queued_bytes > shortest + largest_chunk_bytes_) continue;
    auto load = [this](std::size_t i) { return std::pair(nics_[i].share, nics_[i].queued_bytes); };
    if (best < 0 || load(nic) < load(best)) best = static_cast<int>(nic);
  }
  return best;
}

// A NIC that stood still for long would otherwise get every write afterwards, while others have nothing to do.
void Engine::count_share(Nic& nic, std::uint64_t bytes) {
  nic.share += bytes;
  std::uint64_t most_behind = 4 * largest_chunk_bytes_;
  for (Nic& other : nics_) {
    if (other.share + most_behind < nic.share) other.share = nic.share - most_behind;
  }
}

Write Engine::make_write(const Pending& pending, std::uint32_t nic) {
  const proto::RegionLayout& remote = peer_layouts_[pending.node];
  std::uint32_t own_node = topology_.node();
  Write write;
  write.nic = nic;
  write.peer_node = pending.node;
  write.bytes = pending.bytes;
  write.id = make_id(pending.kind, pending.phase, pending.node, nic, pending.seq);
  switch (pending.kind) {
    case WriteKind::kChunk:
      write.local_offset = layout_.send_slot(pending.phase, pending.node, pending.seq);
      write.remote_offset = remote.ring_slot(pending.phase, own_node, pending.seq);
      write.imm =
          Imm::make(proto::chunk_kind(pending.phase), pending.last, pending.epoch, own_node, pending.seq).encode();
      break;
    case WriteKind::kCounts:
      write.local_offset = layout_.counts_send(pending.phase, pending.node, pending.epoch);
      write.remote_offset = remote.counts(pending.phase, own_node, pending.epoch);
      write.imm = Imm::make(proto::counts_kind(pending.phase), false, pending.epoch, own_node, 0).encode();
      break;
    case WriteKind::kCredit:
      // Immediate only, yet the address must lie inside the peer's registration.
      write.imm = Imm::make(proto::credit_kind(pending.phase), false, 0, own_node, pending.seq).encode();
      break;
    case WriteKind::kHello:
      write.imm = Imm::make(ImmKind::kHello, false, 0, own_node, nic).encode();
      break;
  }
  return write;
}

std::optional<Write> Engine::next_write() {
  if (failed()) return std::nullopt;
  for (std::uint32_t i = 0; hellos_due_ > 0 && i < nics_.size(); ++i) {
    if (nics_[i].hellos.empty() || !has_room(nics_[i])) continue;
    return make_write({WriteKind::kHello, Phase::kDispatch, nics_[i].hellos.front(), 0, 0, 0, false}, i);
  }
  int nic = pick_nic();
  if (nic < 0) return std::nullopt;
  if (!urgent_.empty()) return make_write(urgent_.front(), nic);
  if (!credits_due_.empty()) {
    auto [phase, node] = credits_due_.front();
    return make_write({WriteKind::kCredit, phase, node, 0, receive_ring(phase, node).released, 0, false}, nic);
  }
  if (bulk_.empty()) return std::nullopt;
  const Pending& chunk = bulk_.front();
  SendRing& ring = send_ring(chunk.phase, chunk.node);
  // Pack waits for send_free, so this holds unless pack is wrong (I2, I11).
  if (!mutant(Mutant::kReuseBeforeCredit) && !mutant(Mutant::kReuseBeforeCompletion)) {
    MOE_EFA_CHECK(chunk.seq < ring.free + layout_.config().slots, "chunk " << chunk.seq << " packed without a credit");
  }
  return make_write(chunk, nic);
}

void Engine::on_posted(const Write& write) {
  auto kind = static_cast<WriteKind>(write.id >> kIdKindShift);
  auto phase = static_cast<Phase>(write.id >> kIdPhaseShift & 1);
  Nic& nic = nics_[write.nic];
  ++nic.outstanding;
  ++outstanding_total_;
  ++stats_.writes;
  stats_.bytes += write.bytes;
  ++stats_.nics[write.nic].writes;
  stats_.nics[write.nic].bytes += write.bytes;
  count_share(nics_[write.nic], write.bytes);
  stats_.wire_bytes[index(phase)] += write.bytes;
  switch (kind) {
    case WriteKind::kCredit: {
      ReceiveRing& ring = receive_ring(phase, write.peer_node);
      credits_due_.pop_front();
      ring.credit_due = false;
      ring.credited = std::max(ring.credited, ring.released);
      ++ring.credits_inflight;
      consider_credit(phase, write.peer_node);
      break;
    }
    case WriteKind::kChunk: {
      std::uint64_t seq = bulk_.front().seq;
      inflight_bytes_[index(phase)][write.peer_node * layout_.config().slots + seq % layout_.config().slots] =
          write.bytes;
      nic.queued_bytes += write.bytes;
      bulk_.pop_front();
      break;
    }
    case WriteKind::kCounts:
      urgent_.pop_front();
      break;
    case WriteKind::kHello:
      nic.hellos.pop_front();
      --hellos_due_;
      break;
  }
}

void Engine::on_again(std::uint32_t nic) { nics_[nic].stalled = true; }

void Engine::resume_nics() {
  for (Nic& nic : nics_) nic.stalled = false;
}

int Engine::waiting_peer() const {
  for (const Nic& nic : nics_) {
    if (!nic.hellos.empty()) return static_cast<int>(topology_.rail_peer(nic.hellos.front()));
  }
  if (!urgent_.empty()) return static_cast<int>(topology_.rail_peer(urgent_.front().node));
  if (!credits_due_.empty()) return static_cast<int>(topology_.rail_peer(credits_due_.front().second));
  if (!bulk_.empty()) return static_cast<int>(topology_.rail_peer(bulk_.front().node));
  return -1;
}

void Engine::on_write_done(std::uint64_t id) {
  auto kind = static_cast<WriteKind>(id >> kIdKindShift);
  auto phase = static_cast<Phase>(id >> kIdPhaseShift & 1);
  auto node = static_cast<std::uint32_t>(id >> kIdNodeShift & (proto::kMaxNodes - 1));
  auto nic = static_cast<std::uint32_t>(id >> kIdNicShift & 31);
  std::uint64_t seq = id & kIdSeqMask;
  MOE_EFA_CHECK(node < topology_.num_nodes() && nic < nics_.size() && nics_[nic].outstanding > 0,
                "completion of an unknown write " << id);
  --nics_[nic].outstanding;
  --outstanding_total_;
  SendRing& ring = send_ring(phase, node);
  std::uint32_t slots = layout_.config().slots;
  if (kind == WriteKind::kChunk) {
    nics_[nic].queued_bytes -= inflight_bytes_[index(phase)][node * slots + seq % slots];
    if (mutant(Mutant::kBatchedOrderCompletion)) {
      ++ring.completed;
    } else {
      ring.done[seq % slots] = seq + 1;
      while (ring.done[ring.completed % slots] == ring.completed + 1) ++ring.completed;
    }
    update_send_ring(phase, node);
  } else if (kind == WriteKind::kCounts) {
    for (SentEpoch& sent : ring.epochs) {
      if ((sent.epoch & kIdSeqMask) == seq) sent.counts_done = true;
    }
    update_retired(phase);
  } else if (kind == WriteKind::kCredit) {
    --receive_ring(phase, node).credits_inflight;
    consider_credit(phase, node);
  }
}

void Engine::update_send_ring(Phase phase, std::uint32_t node) {
  SendRing& ring = send_ring(phase, node);
  std::uint64_t free = std::min(ring.credited, ring.completed);  // both, always (I11)
  if (mutant(Mutant::kReuseBeforeCompletion)) free = ring.credited;
  if (mutant(Mutant::kReuseBeforeCredit)) free = ring.completed;
  if (free > ring.free) {
    ring.free = free;
    actions_.push_back({Action::Kind::kSendFree, phase, node, free});
    update_retired(phase);
  }
}

void Engine::update_retired(Phase phase) {
  std::uint64_t& retired = retired_[index(phase)];
  for (;; ++retired) {
    for (std::uint32_t node = 0; node < topology_.num_nodes(); ++node) {
      if (node == topology_.node()) continue;
      SendRing& ring = send_ring(phase, node);
      if (ring.epochs.empty()) return;  // not begun towards this node
      const SentEpoch& oldest = ring.epochs.front();
      if (!oldest.counts_done || ring.free < oldest.end_seq) return;
    }
    for (std::uint32_t node = 0; node < topology_.num_nodes(); ++node) {
      if (node != topology_.node()) send_ring(phase, node).epochs.pop_front();
    }
    actions_.push_back({Action::Kind::kRetired, phase, 0, retired + 1});
  }
}

// --- incoming

bool Engine::epoch_is_live(Phase phase, std::uint64_t epoch) const {
  // A direct peer cannot finish an epoch that this rank has not begun, nor can this rank have finished one that the
  // peer has not: what lands belongs to the epoch last begun here or to the next (I4).
  std::uint64_t begun = begun_[index(phase)];
  return epoch == begun || epoch + 1 == begun;
}

void Engine::on_remote_imm(std::uint32_t bits, std::uint32_t bytes) {
  if (failed()) return;
  Imm imm = Imm::decode(bits);
  if (imm.source_node >= topology_.num_nodes() || imm.source_node == topology_.node()) {
    protocol_error(imm.source_node, Phase::kDispatch, -1, -1,
                   "immediate " + std::to_string(bits) + " names node " + std::to_string(imm.source_node) + " of " +
                       std::to_string(topology_.num_nodes()));
    return;
  }
  switch (imm.kind) {
    case ImmKind::kDispatchChunk:
      return on_chunk(Phase::kDispatch, imm, bytes);
    case ImmKind::kCombineChunk:
      return on_chunk(Phase::kCombine, imm, bytes);
    case ImmKind::kDispatchCounts:
      return on_counts(Phase::kDispatch, imm, bytes);
    case ImmKind::kCombineCounts:
      return on_counts(Phase::kCombine, imm, bytes);
    case ImmKind::kDispatchCredit:
      return on_credit(Phase::kDispatch, imm);
    case ImmKind::kCombineCredit:
      return on_credit(Phase::kCombine, imm);
    case ImmKind::kHello:
      return on_hello(imm);
    case ImmKind::kInvalid:
      break;
  }
  protocol_error(imm.source_node, Phase::kDispatch, -1, -1, "immediate of unknown kind " + std::to_string(bits));
}

void Engine::on_hello(const Imm& imm) {
  if (imm.value >= nics_.size()) {
    return protocol_error(
        imm.source_node, Phase::kDispatch, -1, -1,
        "hello of NIC " + std::to_string(imm.value) + ", each rank has " + std::to_string(nics_.size()));
  }
  std::size_t place = imm.source_node * nics_.size() + imm.value;
  if (hello_seen_[place]) {
    return protocol_error(imm.source_node, Phase::kDispatch, -1, -1,
                          "a second hello of NIC " + std::to_string(imm.value));
  }
  hello_seen_[place] = true;
  ++hellos_;
}

void Engine::on_chunk(Phase phase, const Imm& imm, std::uint32_t bytes) {
  std::uint32_t node = imm.source_node;
  ReceiveRing& ring = receive_ring(phase, node);
  const proto::LayoutConfig& config = layout_.config();
  std::uint64_t seq = proto::expand_value(imm.value, ring.released);
  auto reject = [&](std::int64_t epoch, const std::string& text) {
    protocol_error(node, phase, epoch, static_cast<std::int64_t>(seq), text);
  };
  // The window: what was credited plus S. A sender that writes outside it broke I2; a second arrival broke SRD.
  if (seq >= ring.credited + config.slots) return reject(-1, "outside the credit window");
  std::uint64_t& landed = ring.landed[seq % config.slots];
  if (landed == seq + 1) return reject(-1, "arrived twice");

  proto::ChunkHeader header;
  std::memcpy(&header, slots_ + layout_.ring_slot(phase, node, seq), sizeof(header));
  auto epoch = static_cast<std::int64_t>(header.epoch);
  bool replay = (header.flags & proto::kFlagReplay) != 0;
  bool grads = (header.flags & proto::kFlagWeightGrads) != 0;
  if (header.magic != proto::kChunkMagic || header.version != proto::kProtocolVersion) {
    return reject(-1, "not a chunk header of protocol version " + std::to_string(proto::kProtocolVersion));
  }
  if (header.phase != index(phase) || header.seq != seq || header.source_rank != topology_.rail_peer(node)) {
    return reject(epoch, "header (phase " + std::to_string(header.phase) + ", chunk " + std::to_string(header.seq) +
                             ", rank " + std::to_string(header.source_rank) + ") contradicts its immediate");
  }
  if (!mutant(Mutant::kStaleEpochAccepted)) {
    if (header.epoch % proto::kImmEpochModulus != imm.epoch) return reject(epoch, "epoch contradicts its immediate");
    if (!epoch_is_live(phase, header.epoch)) {
      return reject(epoch, "stale or future epoch; " + std::to_string(begun_[index(phase)]) + " begun here");
    }
  }
  if (header.dtype >= proto::kNumDTypes) return reject(epoch, "unknown dtype");
  if (header.rows == 0 || header.rows > config.chunk_rows ||
      header.num_entries > std::uint64_t{header.rows} * config.top_k) {
    return reject(epoch, "rows " + std::to_string(header.rows) + " or entries " + std::to_string(header.num_entries) +
                             " out of range");
  }
  if (((header.flags & proto::kFlagLast) != 0) != imm.last) return reject(epoch, "last mark contradicts its immediate");
  if (phase == Phase::kDispatch && header.required_capacity != 0) return reject(epoch, "overflow told by a dispatch");
  std::uint64_t row_bytes = proto::hidden_row_bytes(config.hidden_size, static_cast<proto::DType>(header.dtype));
  std::uint64_t expected = phase == Phase::kDispatch
                               ? proto::dispatch_chunk_bytes(replay, header.rows, header.num_entries, row_bytes)
                               : proto::combine_chunk_bytes(grads, header.rows, config.top_k, row_bytes);
  if (header.total_bytes != expected || expected > layout_.slot_bytes(phase) || (bytes != 0 && bytes != expected)) {
    return reject(epoch, "size " + std::to_string(header.total_bytes) + " where " + std::to_string(expected) +
                             " follows from its header and " + std::to_string(bytes) + " arrived");
  }
  landed = seq + 1;
  ++ring.arrived;
  actions_.push_back({Action::Kind::kChunkArrived, phase, node, seq});
  if (mutant(Mutant::kChunkTrustedEarly) && seq > ring.released && ring.landed[(seq - 1) % config.slots] < seq) {
    actions_.push_back({Action::Kind::kChunkArrived, phase, node, seq - 1});
  }
  if (mutant(Mutant::kCreditOnArrival)) {
    ring.released = std::max(ring.released, seq + 1);
    consider_credit(phase, node);
  }
}

void Engine::on_counts(Phase phase, const Imm& imm, std::uint32_t bytes) {
  std::uint32_t node = imm.source_node;
  // Of the two live epochs, the one with these low bits.
  std::uint64_t begun = begun_[index(phase)];
  std::uint64_t epoch = begun;
  if (epoch % proto::kImmEpochModulus != imm.epoch) {
    if (begun == 0 || (begun - 1) % proto::kImmEpochModulus != imm.epoch) {
      return protocol_error(node, phase, -1, -1,
                            "counts of a stale or future epoch (" + std::to_string(imm.epoch) + " mod 16, " +
                                std::to_string(begun) + " begun here)");
    }
    epoch = begun - 1;
  }
  std::uint64_t& seen = counts_seen_[index(phase)][node * 2 + epoch % 2];
  auto signed_epoch = static_cast<std::int64_t>(epoch);
  if (seen == epoch + 1) return protocol_error(node, phase, signed_epoch, -1, "counts arrived twice");
  proto::CountsRecord record;
  std::memcpy(&record, region_ + layout_.counts(phase, node, epoch), sizeof(record));
  if (record.magic != proto::kCountsMagic || record.version != proto::kProtocolVersion ||
      record.phase != index(phase) || record.epoch != epoch || record.source_rank != topology_.rail_peer(node)) {
    return protocol_error(node, phase, signed_epoch, -1, "counts record contradicts its immediate");
  }
  std::uint64_t least = sizeof(proto::CountsRecord);
  if (bytes != 0 && (bytes < least || bytes > layout_.counts_bytes())) {
    return protocol_error(node, phase, signed_epoch, -1, "counts record of " + std::to_string(bytes) + " bytes");
  }
  if (record.dtype >= proto::kNumDTypes || record.rows_per_chunk > layout_.config().chunk_rows ||
      (record.rows > 0) != (record.rows_per_chunk > 0) ||
      (record.rows > 0 ? common::ceil_div(record.rows, record.rows_per_chunk) : 0) != record.num_chunks) {
    return protocol_error(node, phase, signed_epoch, -1, "counts record with impossible rows or chunks");
  }
  seen = epoch + 1;
  actions_.push_back({Action::Kind::kCountsArrived, phase, node, epoch});
}

void Engine::on_credit(Phase phase, const Imm& imm) {
  SendRing& ring = send_ring(phase, imm.source_node);
  // Credits are cumulative and may overtake each other; one that lies behind changes nothing.
  std::uint64_t ahead = (imm.value - ring.credited) & (proto::kImmValueModulus - 1);
  if (ahead >= proto::kImmValueModulus / 2) return;
  if (ring.credited + ahead > ring.packed) {
    return protocol_error(imm.source_node, phase, -1, static_cast<std::int64_t>(ring.credited + ahead),
                          "credit for chunks that were never sent");
  }
  ring.credited += ahead;
  update_send_ring(phase, imm.source_node);
}

void Engine::on_released(Phase phase, std::uint32_t node, std::uint64_t num_chunks) {
  ReceiveRing& ring = receive_ring(phase, node);
  if (num_chunks <= ring.released) return;
  MOE_EFA_CHECK(mutant(Mutant::kReleaseBeforeRead) || num_chunks <= ring.arrived,
                "readers released " << num_chunks << " chunks of " << ring.arrived);
  ring.released = num_chunks;
  consider_credit(phase, node);
}

void Engine::consider_credit(Phase phase, std::uint32_t node) {
  ReceiveRing& ring = receive_ring(phase, node);
  std::uint64_t owed = ring.released - ring.credited;
  // A credit that a later one overtook stays under way while the peer sends on: without this limit such stragglers
  // would add up beyond any completion queue (I12). The completion of one of them comes back here.
  if (owed == 0 || ring.credit_due || ring.credits_inflight >= kMaxCreditsInFlight) return;
  // A batch, or whatever is left when nothing more is in the ring: no credit waits for traffic that may never come.
  bool drained = ring.released == ring.arrived && !mutant(Mutant::kLastCreditKept);
  if (owed < credit_batch_ && !drained) return;
  ring.credit_due = true;
  credits_due_.emplace_back(phase, node);
}

}  // namespace moe_efa::engine
