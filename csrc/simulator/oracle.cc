#include "simulator/oracle.h"

#include <algorithm>
#include <cstring>
#include <sstream>

namespace moe_efa::simulator {

using proto::Imm;
using proto::ImmKind;
using proto::Phase;

namespace {

constexpr Phase kPhases[] = {Phase::kDispatch, Phase::kCombine};
constexpr int kPoison = 0xEE;

std::size_t index(Phase phase) { return static_cast<std::size_t>(phase); }

std::uint64_t checksum_of(const std::byte* bytes, std::uint64_t count) {
  std::uint64_t hash = 0xcbf29ce484222325ull;  // FNV-1a
  for (std::uint64_t i = 0; i < count; ++i) {
    hash = (hash ^ static_cast<std::uint64_t>(bytes[i])) * 0x100000001b3ull;
  }
  return hash;
}

template <typename... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace

Oracle::Oracle(const Workload& world, const Profile& profile, std::vector<proto::RegionMemory> regions, Trace& trace)
    : world_(world),
      regions_(std::move(regions)),
      trace_(trace),
      asleep_(world.num_ranks, false),
      forge_(profile.forge_epoch),
      forge_at_(Rng(world.seed, Stream::kFault, 2).below(world.script.size() > 40 ? 500 : 20)) {
  for (std::uint32_t node = 0; node < world.num_nodes(); ++node) layouts_.emplace_back(world.layout, node);
  for (Phase phase : kPhases) {
    chunks_[index(phase)].resize(std::size_t{world.num_ranks} * world.num_nodes());
    counts_[index(phase)].resize(std::size_t{world.num_ranks} * world.num_nodes());
  }
  shadow_.assign(world.num_ranks, std::vector<std::uint64_t>(layouts_[0].flag_bytes() / 8, 0));
}

std::uint64_t Oracle::word(std::uint32_t rank, std::uint64_t offset) const {
  std::uint64_t value;
  const proto::RegionMemory& memory = regions_[rank];
  const std::byte* base = layouts_[0].only_kernels_read(offset) ? memory.kernel_word_base() : memory.region;
  std::memcpy(&value, base + offset, sizeof(value));
  return value;
}

Oracle::Records& Oracle::chunks(std::uint32_t source, Phase phase, std::uint32_t target_node) {
  return chunks_[index(phase)][source * world_.num_nodes() + target_node];
}

Oracle::Records& Oracle::counts(std::uint32_t source, Phase phase, std::uint32_t target_node) {
  return counts_[index(phase)][source * world_.num_nodes() + target_node];
}

std::uint64_t Oracle::released(std::uint32_t target, Phase phase, std::uint32_t source_node) const {
  const proto::RegionLayout& layout = layouts_[node(target)];
  if (phase == Phase::kCombine) return word(target, layout.released(phase, source_node, local(target)));
  std::uint64_t least = ~0ull;
  for (std::uint32_t reader = 0; reader < world_.node_size; ++reader) {
    least = std::min(least, word(target, layout.released(phase, source_node, reader)));
  }
  return least;
}

void Oracle::poison(std::uint32_t rank, std::uint64_t offset, std::uint64_t bytes) {
  std::memset(regions_[rank].at(offset), kPoison, bytes);
}

std::uint64_t Oracle::grown(std::uint32_t rank, std::uint64_t offset, std::uint64_t value, const char* name) {
  std::uint64_t& seen = shadow_[rank][offset / 8];
  if (value < seen) fail(join("word ", name, " of rank ", rank, " went back from ", seen, " to ", value));
  return std::exchange(seen, value);
}

// --- the network

void Oracle::posted(const SimWrite& write) {
  Imm imm = Imm::decode(write.request.imm);
  if (writes_.size() != write.number) fail("writes out of step");
  writes_.emplace_back(nullptr, 0);
  if (imm.source_node != node(write.source_rank)) fail("an immediate names another source node");
  switch (imm.kind) {
    case ImmKind::kDispatchChunk:
    case ImmKind::kCombineChunk:
      chunk_posted(write, imm.kind == ImmKind::kDispatchChunk ? Phase::kDispatch : Phase::kCombine, imm);
      break;
    case ImmKind::kDispatchCounts:
    case ImmKind::kCombineCounts:
      counts_posted(write, imm.kind == ImmKind::kDispatchCounts ? Phase::kDispatch : Phase::kCombine);
      break;
    case ImmKind::kDispatchCredit:
    case ImmKind::kCombineCredit: {
      Phase phase = imm.kind == ImmKind::kDispatchCredit ? Phase::kDispatch : Phase::kCombine;
      std::uint64_t free = released(write.source_rank, phase, node(write.target_rank));
      std::uint64_t behind = (free - imm.value) & (proto::kImmValueModulus - 1);
      trace_.add(write.source_rank, "posts credit to rank, up to", write.target_rank,
                 static_cast<std::int64_t>(free - behind));
      if (behind >= proto::kImmValueModulus / 2) {
        fail(join("I2: rank ", write.source_rank, " grants rank ", write.target_rank, " a ", proto::phase_name(phase),
                  " credit of ", imm.value, " when readers have released ", free));
      }
      break;
    }
    default:
      break;
  }
}

void Oracle::chunk_posted(const SimWrite& write, Phase phase, const Imm& imm) {
  std::uint32_t source = write.source_rank, target = write.target_rank, to = node(target);
  Records& ring = chunks(source, phase, to);
  std::uint64_t seq = ring.size(), slots = world_.layout.slots;
  proto::ChunkHeader header;
  std::memcpy(&header, regions_[source].at(write.request.local_offset), sizeof(header));
  trace_.add(source,
             phase == Phase::kDispatch ? "posts dispatch chunk to rank, seq, epoch"
                                       : "posts combine chunk to rank, seq, epoch",
             target, static_cast<std::int64_t>(seq), static_cast<std::int64_t>(header.epoch));
  auto where = [&] {
    return join(proto::phase_name(phase), " chunk ", seq, " of rank ", source, " for rank ", target, ", epoch ",
                header.epoch);
  };
  if (imm.value != seq % proto::kImmValueModulus ||
      write.request.remote_offset != layouts_[to].ring_slot(phase, node(source), seq) ||
      write.request.local_offset != layouts_[node(source)].send_slot(phase, to, seq)) {
    fail(join(where(), ": posted out of order or to another slot"));
  }
  if (seq >= slots) {
    if (released(target, phase, node(source)) < seq - slots + 1) {
      fail(join("I2: ", where(), " overwrites a slot whose readers are not done: released ",
                released(target, phase, node(source))));
    }
    if (!ring[seq - slots].completed) {
      fail(join("I11: ", where(), " is in a slot whose last write has not completed here"));
    }
  }
  std::uint64_t announced = counts(source, phase, to).size();
  if (header.epoch >= announced || header.epoch + 2 < announced) {
    fail(join("I4: ", where(), " where the last epoch announced is ", announced - 1));
  }
  if (word(target, layouts_[to].begun(phase)) < header.epoch) fail(join("I4: ", where(), " runs ahead of its target"));
  if (forge_ && chunks_posted_++ == forge_at_) {
    forged_write_ = static_cast<std::int64_t>(write.number);
    forged_target_ = target;
    forged_source_ = source;
  }
  writes_[write.number] = {&ring, seq};
  ring.push_back({write.number, header.epoch,
                  checksum_of(regions_[source].at(write.request.local_offset), write.request.bytes),
                  write.request.bytes});
}

void Oracle::counts_posted(const SimWrite& write, Phase phase) {
  std::uint32_t source = write.source_rank, target = write.target_rank, to = node(target);
  Records& sent = counts(source, phase, to);
  std::uint64_t epoch = sent.size();
  trace_.add(source,
             phase == Phase::kDispatch ? "posts dispatch counts to rank, epoch" : "posts combine counts to rank, epoch",
             target, static_cast<std::int64_t>(epoch));
  if (epoch >= 2) {
    if (!sent[epoch - 2].completed) {
      fail(join("I11: counts of rank ", source, ", epoch ", epoch, " reuse their buffer"));
    }
    const Records& ring = chunks(source, phase, to);
    std::uint64_t end = ring.size();
    while (end > 0 && ring[end - 1].epoch + 2 > epoch) --end;
    if (released(target, phase, node(source)) < end) {
      fail(join("I4: rank ", source, " starts ", proto::phase_name(phase), " epoch ", epoch, " while rank ", target,
                " still reads epoch ", ring[end - 1].epoch));
    }
  }
  writes_[write.number] = {&sent, epoch};
  sent.push_back({write.number, epoch,
                  checksum_of(regions_[source].at(write.request.local_offset), write.request.bytes),
                  write.request.bytes});
}

Oracle::Record* Oracle::record_of(const SimWrite& write) {
  auto [records, at] = writes_[write.number];
  return records == nullptr ? nullptr : &(*records)[at];
}

void Oracle::piece_placed(const SimWrite& write, std::uint64_t offset) {
  if (forged_write_ != static_cast<std::int64_t>(write.number) || offset != 0) return;
  // The same low bits: only the engine's knowledge of the live epochs can tell.
  std::byte* to = regions_[write.target_rank].at(write.request.remote_offset);
  proto::ChunkHeader header;
  std::memcpy(&header, to, sizeof(header));
  std::uint64_t epoch = record_of(write)->epoch;
  header.epoch = epoch < proto::kImmEpochModulus ? epoch + proto::kImmEpochModulus : epoch - proto::kImmEpochModulus;
  std::memcpy(to, &header, sizeof(header));
}

void Oracle::all_placed(const SimWrite& write) {
  Record* record = record_of(write);
  if (record == nullptr) return;
  record->all_placed = true;
  if (record->released) {
    Phase phase = Imm::decode(write.request.imm).kind == ImmKind::kDispatchChunk ? Phase::kDispatch : Phase::kCombine;
    poison(write.target_rank, write.request.remote_offset, layouts_[0].slot_bytes(phase));
  }
}

void Oracle::imm_polled(const SimWrite& write) {
  if (Record* record = record_of(write)) {
    if (record->imm_polled) fail("an immediate was delivered twice");
    record->imm_polled = true;
  }
}

void Oracle::completion_polled(const SimWrite& write) {
  Record* record = record_of(write);
  if (record == nullptr) return;
  record->completed = true;
  if (checksum_of(regions_[write.source_rank].at(write.request.local_offset), record->bytes) != record->checksum) {
    fail(join("I11: the source of write ", write.number, " of rank ", write.source_rank, " to rank ", write.target_rank,
              " (epoch ", record->epoch, ") changed before its completion"));
  }
}

// --- turns of ranks

void Oracle::after_pump(std::uint32_t rank) {
  for (Phase phase : kPhases) {
    for (std::uint32_t peer = 0; peer < world_.num_nodes(); ++peer) {
      if (peer == node(rank)) continue;
      check_arrived(rank, phase, peer);
      check_send_free(rank, phase, peer);
    }
  }
}

void Oracle::check_arrived(std::uint32_t rank, Phase phase, std::uint32_t source_node) {
  const proto::RegionLayout& layout = layouts_[node(rank)];
  std::uint32_t source = source_node * world_.node_size + local(rank);
  for (std::uint64_t slot = 0; slot < world_.layout.slots; ++slot) {
    std::uint64_t offset = layout.arrived(phase, source_node, slot), value = word(rank, offset);
    if (shadow_[rank][offset / 8] == value) continue;
    grown(rank, offset, value, "arrived");
    std::uint64_t seq = value - 1;
    trace_.add(rank, "flags arrival from rank, seq", source, static_cast<std::int64_t>(seq));
    Records& ring = chunks(source, phase, node(rank));
    if (seq % world_.layout.slots != slot || seq >= ring.size() || !ring[seq].imm_polled) {
      fail(join("I1: rank ", rank, " flags ", proto::phase_name(phase), " chunk ", seq, " of rank ", source,
                " as arrived before its event"));
    }
    // Nobody but the kernels can tell that this one is forged.
    if (!world_.reads_slots && static_cast<std::int64_t>(ring[seq].number) == forged_write_) continue;
    const std::byte* bytes = regions_[rank].at(layout.ring_slot(phase, source_node, seq));
    proto::ChunkHeader header;
    std::memcpy(&header, bytes, sizeof(header));
    if (header.epoch != ring[seq].epoch) {
      fail(join("I4: rank ", rank, " accepts a ", proto::phase_name(phase), " chunk of epoch ", header.epoch,
                " in epoch ", ring[seq].epoch));
    }
    if (checksum_of(bytes, ring[seq].bytes) != ring[seq].checksum) {
      fail(join("I1: ", proto::phase_name(phase), " chunk ", seq, " of rank ", source, " is flagged at rank ", rank,
                " with other bytes than were sent"));
    }
  }
  for (std::uint64_t parity = 0; parity < 2; ++parity) {
    std::uint64_t offset = layout.counts_ready(phase, source_node, parity), value = word(rank, offset);
    if (grown(rank, offset, value, "counts_ready") == value) continue;
    const Records& sent = counts(source, phase, node(rank));
    std::uint64_t epoch = value - 1;
    if (epoch % 2 != parity || epoch >= sent.size() || !sent[epoch].imm_polled ||
        checksum_of(regions_[rank].at(layout.counts(phase, source_node, epoch)), sent[epoch].bytes) !=
            sent[epoch].checksum) {
      fail(join("I1: rank ", rank, " flags ", proto::phase_name(phase), " counts of rank ", source, ", epoch ", epoch,
                " before they arrived"));
    }
  }
}

void Oracle::check_send_free(std::uint32_t rank, Phase phase, std::uint32_t target_node) {
  const proto::RegionLayout& layout = layouts_[node(rank)];
  std::uint64_t offset = layout.send_free(phase, target_node), value = word(rank, offset);
  std::uint64_t before = grown(rank, offset, value, "send_free");
  if (before == value) return;
  const Records& ring = chunks(rank, phase, target_node);
  std::uint32_t target = target_node * world_.node_size + local(rank);
  if (value > ring.size()) fail(join("I2: rank ", rank, " frees ", value, " send slots of ", ring.size()));
  for (std::uint64_t seq = before; seq < value; ++seq) {
    if (!ring[seq].completed) {
      fail(join("I11: rank ", rank, " frees the send slot of ", proto::phase_name(phase), " chunk ", seq,
                " before its completion"));
    }
    if (released(target, phase, node(rank)) <= seq) {
      fail(join("I2: rank ", rank, " frees the slot of ", proto::phase_name(phase), " chunk ", seq, " before rank ",
                target, " is done with it"));
    }
    poison(rank, layout.send_slot(phase, target_node, seq), layout.slot_bytes(phase));
  }
}

void Oracle::after_caller(std::uint32_t rank) {
  std::uint32_t first_mate = node(rank) * world_.node_size;
  for (std::uint32_t owner = first_mate; owner < first_mate + world_.node_size; ++owner) {
    for (std::uint32_t source_node = 0; source_node < world_.num_nodes(); ++source_node) {
      check_released(rank, owner, Phase::kDispatch, source_node);
      if (owner == rank) check_released(rank, owner, Phase::kCombine, source_node);
    }
  }
  check_publish(rank);
}

void Oracle::check_released(std::uint32_t rank, std::uint32_t owner, Phase phase, std::uint32_t source_node) {
  const proto::RegionLayout& layout = layouts_[node(rank)];
  std::uint64_t offset = layout.released(phase, source_node, local(rank)), value = word(owner, offset);
  if (shadow_[owner][offset / 8] == value) return;
  auto least = [&] {
    if (phase == Phase::kCombine) return shadow_[owner][offset / 8];
    std::uint64_t result = ~0ull;
    for (std::uint32_t reader = 0; reader < world_.node_size; ++reader) {
      result = std::min(result, shadow_[owner][layout.released(phase, source_node, reader) / 8]);
    }
    return result;
  };
  std::uint64_t before = least();
  for (std::uint64_t seq = grown(owner, offset, value, "released"); seq < value; ++seq) {
    if (word(owner, layout.arrived(phase, source_node, seq)) != seq + 1) {
      fail(join("I2: rank ", rank, " releases ", proto::phase_name(phase), " chunk ", seq, " of rank ",
                source_node * world_.node_size + local(owner), " before it has arrived"));
    }
  }
  for (std::uint64_t seq = before, end = least(); seq < end; ++seq) {
    std::uint64_t slot = layout.ring_slot(phase, source_node, seq);
    if (source_node == node(rank)) {
      poison(owner, slot, layout.slot_bytes(phase));
      continue;
    }
    Record& record = chunks(source_node * world_.node_size + local(owner), phase, node(owner))[seq];
    record.released = true;
    if (record.all_placed) poison(owner, slot, layout.slot_bytes(phase));  // else when its last duplicate has landed
  }
}

void Oracle::check_publish(std::uint32_t rank) {
  const proto::RegionLayout& layout = layouts_[node(rank)];
  std::uint32_t first_mate = node(rank) * world_.node_size;
  for (std::uint32_t source_node = 0; source_node < world_.num_nodes(); ++source_node) {
    for (std::uint32_t forwarder = 0; forwarder < world_.node_size; ++forwarder) {
      std::uint64_t done = word(rank, layout.published(forwarder, source_node));
      if (done > word(first_mate + forwarder, layout.consumed(source_node)) + world_.layout.publish_slots) {
        fail(join("I2: rank ", rank, " publishes chunk ", done - 1, " for node ", source_node, " over one that rank ",
                  first_mate + forwarder, " has not forwarded"));
      }
    }
    std::uint64_t offset = layout.consumed(source_node), value = word(rank, offset);
    for (std::uint64_t seq = grown(rank, offset, value, "consumed"); seq < value; ++seq) {
      for (std::uint32_t mate = first_mate; mate < first_mate + world_.node_size; ++mate) {
        if (mate == rank) continue;  // its own terms are not published, but added up on the spot
        if (word(mate, layout.published(local(rank), source_node)) <= seq) {
          fail(join("I1: rank ", rank, " forwards chunk ", seq, " before rank ", mate, " has published it"));
        }
        poison(mate, layout.publish_slot(local(rank), source_node, seq), layout.publish_slot_bytes());
      }
    }
  }
}

void Oracle::check_counts_ready(std::uint32_t rank, Phase phase, std::uint64_t epoch) const {
  const proto::RegionLayout& layout = layouts_[node(rank)];
  for (std::uint32_t mate = 0; mate < world_.node_size; ++mate) {
    for (std::uint32_t source_node = 0; source_node < world_.num_nodes(); ++source_node) {
      std::uint32_t board = node(rank) * world_.node_size + mate;
      if (word(board, layout.counts_ready(phase, source_node, epoch)) != epoch + 1) {
        fail(join("I1: rank ", rank, " uses the counts of rank ", source_node * world_.node_size + mate, ", epoch ",
                  epoch, ", before they arrived"));
      }
    }
  }
}

void Oracle::check_drained(const std::vector<std::uint64_t> epochs[proto::kNumPhases]) const {
  for (Phase phase : kPhases) {
    for (std::uint32_t rank = 0; rank < world_.num_ranks && world_.num_nodes() > 1; ++rank) {
      const proto::RegionLayout& layout = layouts_[node(rank)];
      std::uint64_t expected = epochs[index(phase)][rank];
      if (word(rank, layout.retired(phase)) != expected) {
        fail(join("I13: rank ", rank, " has retired ", word(rank, layout.retired(phase)), " of ", expected, " ",
                  proto::phase_name(phase), " epochs after everything came to rest"));
      }
      for (std::uint32_t to = 0; to < world_.num_nodes(); ++to) {
        if (to == node(rank)) continue;
        std::size_t ring = rank * world_.num_nodes() + to;
        if (counts_[index(phase)][ring].size() != expected) fail(join("rank ", rank, " announced other epochs"));
        if (word(rank, layout.send_free(phase, to)) != chunks_[index(phase)][ring].size()) {
          fail(join("I13: credits of rank ", rank, " towards node ", to, " did not come home"));
        }
      }
    }
  }
}

}  // namespace moe_efa::simulator
