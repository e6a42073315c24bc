#include "simulator/network.h"

#include <algorithm>
#include <cstring>

namespace moe_efa::simulator {

using transport::PostResult;
using transport::RailEvent;
using transport::WriteRequest;

namespace {

constexpr double kErrorDelayNs = 1e6;  // until a write towards a dead rank fails

}  // namespace

Network::Network(const Profile& profile, const NetworkConfig& config, NetworkObserver& observer)
    : profile_(profile),
      config_(config),
      observer_(observer),
      delay_(config.seed, Stream::kDelay),
      duplicate_(config.seed, Stream::kDuplicate),
      again_(config.seed, Stream::kAgain),
      poll_(config.seed, Stream::kPoll),
      fault_(config.seed, Stream::kFault, 1),
      tie_(config.seed, Stream::kTieBreak),
      regions_(config.num_ranks),
      endpoints_(std::size_t{config.num_ranks} * config.num_nics),
      dead_(config.num_ranks, false),
      inflight_(config.num_ranks, 0) {
  Rng links(config.seed, Stream::kDelay, 1);
  for (std::uint32_t i = 0; i < config.num_ranks * config.num_ranks; ++i) {
    slow_links_.push_back(links.chance(profile.tail_links));
  }
}

void Network::schedule(Kind kind, double delay_ns, std::uint64_t write, std::uint32_t offset, std::uint32_t bytes,
                       bool late) {
  std::uint64_t tie = profile_.in_order ? 0 : tie_.next();
  heap_.push({now_ns_ + static_cast<std::uint64_t>(delay_ns), tie, event_number_++, kind, write, offset, bytes, late});
}

double Network::piece_delay(const SimWrite& write) {
  double delay = profile_.latency_ns;
  if (profile_.jitter_ns > 0) delay += delay_.exponential(profile_.jitter_ns);
  bool slow = slow_links_[write.source_rank * config_.num_ranks + write.target_rank];
  if (slow && delay_.chance(profile_.tail_probability)) delay += delay_.exponential(profile_.tail_ns);
  return delay;
}

void Network::wake_later(std::uint32_t rank, double delay_ns) { schedule(Kind::kWake, delay_ns, rank); }

PostResult Network::post(std::uint32_t rank, std::uint32_t nic, const WriteRequest& request) {
  Endpoint& from = endpoint(rank, nic);
  if (from.again_left > 0) {
    --from.again_left;
    ++refusals_;
    return PostResult::kAgain;
  }
  if (again_.chance(profile_.again_probability)) from.again_left = again_.between(1, profile_.again_burst);
  if (from.outstanding >= profile_.send_queue_depth) return PostResult::kAgain;
  ++from.outstanding;

  SimWrite write;
  write.number = writes_.size();
  write.source_rank = rank;
  write.target_rank = request.peer_node * config_.node_size + rank % config_.node_size;
  write.nic = nic;
  write.request = request;
  if (write.target_rank >= config_.num_ranks || write.target_rank == rank) {
    throw Violation("a write towards node " + std::to_string(request.peer_node));
  }
  if (request.local_offset + request.bytes > regions_[rank].bytes ||
      request.remote_offset + request.bytes > regions_[write.target_rank].bytes) {
    throw Violation("a write outside its registrations");
  }
  if (request.imm == 0 || !request.with_imm) throw Violation("a write without an immediate");
  observer_.posted(write);
  ++inflight_[write.target_rank];
  inflight_high_water_ = std::max(inflight_high_water_, inflight_[write.target_rank]);

  // A write without payload is one empty piece.
  for (std::uint32_t offset = 0; offset < std::max(request.bytes, 1u); offset += profile_.mtu_bytes) {
    std::uint32_t bytes = std::min(profile_.mtu_bytes, request.bytes - offset);
    schedule(Kind::kPlace, piece_delay(write), write.number, offset, bytes);
    ++write.before_imm, ++write.before_done;
    if (!duplicate_.chance(profile_.duplicate_probability)) continue;
    bool late = profile_.late_duplicates && duplicate_.chance(0.7);
    schedule(Kind::kPlace, piece_delay(write) * (late ? 4 : 1), write.number, offset, bytes, late);
    ++write.before_done;
    if (!late) ++write.before_imm;
  }
  writes_.push_back(write);
  return PostResult::kPosted;
}

void Network::place(const Event& event) {
  SimWrite& write = writes_[event.write];
  if (write.lost) return;
  if (dead_[write.target_rank] || (dead_[write.source_rank] && fault_.chance(0.5))) {
    write.lost = true;
    schedule(Kind::kError, kErrorDelayNs, write.number);
    return;
  }
  if (event.bytes > 0) {
    std::memcpy(regions_[write.target_rank].at(write.request.remote_offset) + event.offset,
                regions_[write.source_rank].at(write.request.local_offset) + event.offset, event.bytes);
    observer_.piece_placed(write, event.offset);
  }
  if (!event.late && --write.before_imm == 0) {
    schedule(Kind::kImm, profile_.in_order ? 0 : delay_.exponential(profile_.imm_delay_ns), write.number);
  }
  if (--write.before_done == 0) {
    double ack = profile_.in_order ? profile_.ack_delay_ns : delay_.exponential(profile_.ack_delay_ns);
    schedule(Kind::kDone, ack, write.number);
    observer_.all_placed(write);
  }
}

void Network::enqueue(Endpoint& to, const QueueEntry& entry, const SimWrite& write) {
  to.completions.push_back(entry);
  if (to.completions.size() > config_.completion_queue) {
    throw Violation(
        "I12: completion queue of rank " +
        std::to_string(entry.event.kind == RailEvent::Kind::kRemoteImm ? write.target_rank : write.source_rank) +
        " overrun, " + std::to_string(config_.completion_queue) + " entries");
  }
}

bool Network::step() {
  if (heap_.empty()) return false;
  Event event = heap_.top();
  heap_.pop();
  now_ns_ = std::max(now_ns_, event.time_ns);
  ++events_;
  if (event.kind == Kind::kWake) {
    observer_.woken(static_cast<std::uint32_t>(event.write));
    return true;
  }
  SimWrite& write = writes_[event.write];
  switch (event.kind) {
    case Kind::kPlace:
      if (profile_.manual_progress && !dead_[write.target_rank]) {
        endpoint(write.target_rank, write.nic).deferred.push_back(event);
      } else {
        place(event);
        return false;
      }
      break;
    case Kind::kImm: {
      if (dead_[write.target_rank]) break;
      Endpoint& to = endpoint(write.target_rank, write.nic);
      if (++to.inbound > config_.max_inbound) {
        throw Violation("I12: no receive is posted at rank " + std::to_string(write.target_rank) + " for immediate " +
                        std::to_string(write.request.imm) + " of rank " + std::to_string(write.source_rank) + ", " +
                        std::to_string(config_.max_inbound) + " were");
      }
      inbound_high_water_ = std::max<std::size_t>(inbound_high_water_, to.inbound);
      RailEvent imm;
      imm.kind = RailEvent::Kind::kRemoteImm;
      imm.imm = write.request.imm;
      imm.bytes = write.request.bytes;
      enqueue(to, {imm, write.number}, write);
      break;
    }
    case Kind::kDone:
    case Kind::kError: {
      if (dead_[write.source_rank]) break;
      RailEvent done;
      done.id = write.request.id;
      if (event.kind == Kind::kError || dead_[write.target_rank]) {
        done.kind = RailEvent::Kind::kError;
        done.own_write = true;
        done.peer_node = static_cast<int>(write.request.peer_node);
        done.error = "write: remote side is gone";
      }
      enqueue(endpoint(write.source_rank, write.nic), {done, write.number}, write);
      break;
    }
    case Kind::kWake:
      break;
  }
  return true;
}

std::size_t Network::poll(std::uint32_t rank, std::uint32_t nic, std::span<RailEvent> events) {
  Endpoint& at = endpoint(rank, nic);
  while (!at.deferred.empty()) {
    Event event = at.deferred.front();
    at.deferred.pop_front();
    place(event);
  }
  std::size_t most = std::min<std::size_t>(events.size(), poll_.between(1, profile_.events_per_poll));
  std::size_t count = 0;
  for (; count < most && !at.completions.empty(); ++count) {
    QueueEntry entry = at.completions.front();
    at.completions.pop_front();
    const SimWrite& write = writes_[entry.write];
    if (entry.event.kind == RailEvent::Kind::kRemoteImm) {
      --at.inbound;
      --inflight_[rank];
      observer_.imm_polled(write);
    } else {
      --at.outstanding;
      if (entry.event.kind == RailEvent::Kind::kWriteDone) observer_.completion_polled(write);
    }
    events[count] = entry.event;
  }
  return count;
}

bool Network::quiet() const {
  return heap_.empty() && std::all_of(endpoints_.begin(), endpoints_.end(), [](const Endpoint& at) {
           return at.completions.empty() && at.deferred.empty() && at.outstanding == 0;
         });
}

}  // namespace moe_efa::simulator
