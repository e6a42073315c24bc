// A step is a write of the rail below; its id there is place * kMaxSteps + step, so a completion finds its write. Time
// is counted in polls: whoever waits polls.
#include "transport/reorder_rail.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/check.h"
#include "common/random.h"

namespace moe_efa::transport {
namespace {

constexpr std::uint32_t kMaxSteps = 8;       // kMaxPieces, one of them twice, one late
constexpr std::uint32_t kLeastCutBytes = 2;  // of a write that is cut
constexpr std::uint32_t kMaxDelay = 6;       // polls
constexpr std::uint32_t kDropDelay = 100;    // polls until a write to a dropped peer fails
constexpr std::size_t kMaxHeldImms = 64;     // the rest waits in the completion queue of the rail below
constexpr std::size_t kCollect = 16;
constexpr char kMark[8] = {'r', 'e', 'o', 'r', 'd', 'e', 'r', '1'};

enum Stream : std::uint64_t { kOfWrite = 1, kOfTurn, kOfEvent, kOfPoll };

std::uint64_t stream_state(const ReorderConfig& config, std::uint64_t stream, std::uint64_t number) {
  std::uint64_t state = common::mix64(config.seed + common::kMixStep);
  for (std::uint64_t part : {std::uint64_t{config.rank}, std::uint64_t{config.nic}, stream, number}) {
    state = common::mix64(state ^ (part + common::kMixStep));
  }
  return state;
}

class Draws {
 public:
  explicit Draws(std::uint64_t state) : state_(state) {}
  std::uint32_t below(std::uint32_t bound) {
    return static_cast<std::uint32_t>(common::mix64(state_ += common::kMixStep) % bound);
  }
  bool one_in(std::uint32_t bound) { return below(bound) == 0; }

 private:
  std::uint64_t state_;
};

// Mostly short, now and then long.
std::uint32_t draw_delay(Draws& draws) { return draws.one_in(3) ? 0 : draws.below(kMaxDelay + 1); }

}  // namespace

ReorderDecision decide(const ReorderConfig& config, std::uint64_t number, std::uint32_t bytes) {
  Draws draws(stream_state(config, kOfWrite, number));
  ReorderDecision decision;
  if (draws.one_in(6)) decision.refusals = 1 + draws.below(3);
  if (draws.one_in(48)) decision.refusals = 20;
  const bool cut = bytes >= kLeastCutBytes && draws.one_in(2);
  if (cut) decision.num_pieces = std::min(2 + draws.below(ReorderDecision::kMaxPieces - 1), bytes);
  // Distinct places to cut at: a random one in each of equal parts.
  for (std::uint32_t i = 1; i < decision.num_pieces; ++i) {
    const std::uint64_t begin = std::uint64_t{bytes} * i / decision.num_pieces;
    const std::uint64_t end = std::uint64_t{bytes} * (i + 1) / decision.num_pieces;
    decision.bounds[i] = static_cast<std::uint32_t>(begin) + draws.below(static_cast<std::uint32_t>(end - begin));
  }
  decision.bounds[decision.num_pieces] = bytes;
  for (std::uint32_t i = 0; i < decision.num_pieces; ++i) {
    const std::uint32_t j = draws.below(i + 1);  // an even shuffle
    decision.order[i] = decision.order[j];
    decision.order[j] = static_cast<std::uint8_t>(i);
    decision.delays[i] = draw_delay(draws);
  }
  decision.twice = decision.num_pieces > 1 && draws.one_in(4);
  decision.twice_late = bytes > 0 && draws.one_in(8) && config.repeat_late;
  return decision;
}

ReorderRail::ReorderRail(std::unique_ptr<Rail> inner, const ReorderConfig& config)
    : inner_(std::move(inner)), config_(config), writes_(config.max_outstanding), batch_(kCollect) {
  MOE_EFA_CHECK(inner_ != nullptr && config.max_outstanding > 0, "bad ReorderConfig");
  static_assert(kMaxSteps >= ReorderDecision::kMaxPieces + 2);
  for (std::uint32_t i = config.max_outstanding; i-- > 0;) free_.push_back(i);
}

std::string ReorderRail::describe() const {
  return "reordered (seed " + std::to_string(config_.seed) + ") " + inner_->describe();
}

std::vector<std::byte> ReorderRail::local_address() const {
  std::vector<std::byte> address(sizeof(kMark));
  std::memcpy(address.data(), kMark, sizeof(kMark));
  const std::vector<std::byte> inner = inner_->local_address();
  address.insert(address.end(), inner.begin(), inner.end());
  return address;
}

void ReorderRail::add_peer(std::uint32_t node, std::span<const std::byte> address) {
  if (address.size() < sizeof(kMark) || std::memcmp(address.data(), kMark, sizeof(kMark)) != 0) {
    throw common::StatusError({common::StatusCode::kConfig, -1, -1, -1, -1,
                               "the rail of node " + std::to_string(node) +
                                   " is not reordered, ours is: is MOE_EFA_REORDER set for all ranks?"});
  }
  inner_->add_peer(node, address.subspan(sizeof(kMark)));
}

std::uint64_t ReorderRail::draw(std::uint64_t stream, std::uint64_t number) const {
  return stream_state(config_, stream, number);
}

// Steps before the one with the immediate.
std::uint32_t ReorderRail::num_plain(const Write& write) {
  return write.decision.num_pieces - 1 + (write.decision.twice ? 1 : 0);
}

std::uint32_t ReorderRail::num_steps(const Write& write) {
  return num_plain(write) + 1 + (write.decision.twice_late ? 1 : 0);
}

PostResult ReorderRail::post_write(const WriteRequest& request) {
  if (free_.empty()) return PostResult::kAgain;
  const ReorderDecision decision = decide(config_, accepted_, request.bytes);
  if (refused_ < decision.refusals) {
    ++refused_;
    return PostResult::kAgain;
  }
  refused_ = 0;
  const std::uint32_t place = free_.back();
  free_.pop_back();
  Write& write = writes_[place];
  write = Write{};
  write.busy = true;
  write.number = accepted_++;
  write.request = request;
  write.decision = decision;
  write.accepted_at = polls_;
  write.ready_at = polls_ + decision.delays[0];
  if (static_cast<std::int64_t>(request.peer_node) == config_.drop_node && to_dropped_++ >= config_.drop_after) {
    write.dropped = true;
    write.ready_at = polls_ + kDropDelay;
  }
  post_held();
  return PostResult::kPosted;
}

bool ReorderRail::may_post(const Write& write) const {
  if (!write.busy || write.dropped || !write.error.empty() || write.posted == num_steps(write)) return false;
  // Plain pieces need not wait for each other, nor for their delays in order; the immediate vouches for all of them,
  // and only a late repetition may follow it.
  if (write.posted >= num_plain(write) && write.completed < write.posted) return false;
  return polls_ >= write.ready_at;
}

WriteRequest ReorderRail::step_request(const Write& write, std::uint32_t place) const {
  const ReorderDecision& decision = write.decision;
  const std::uint32_t step = write.posted;
  // The repetitions are of the first piece and of whichever the number says.
  const std::uint32_t turn = step < decision.num_pieces - 1 ? step
                             : step < num_plain(write)      ? 0
                             : step == num_plain(write)     ? decision.num_pieces - 1
                                                            : write.number % decision.num_pieces;
  const std::uint32_t piece = decision.order[turn];
  WriteRequest request = write.request;
  request.bytes = decision.bounds[piece + 1] - decision.bounds[piece];
  request.local_offset += decision.bounds[piece];
  request.remote_offset += decision.bounds[piece];
  request.with_imm = step == num_plain(write) && write.request.with_imm;
  request.id = std::uint64_t{place} * kMaxSteps + step;
  return request;
}

void ReorderRail::post_held() {
  turn_.clear();
  for (std::uint32_t place = 0; place < writes_.size(); ++place) {
    const Write& write = writes_[place];
    if (may_post(write)) turn_.emplace_back(common::mix64(draw(kOfTurn, write.number) ^ polls_), place);
  }
  std::sort(turn_.begin(), turn_.end());
  for (const auto& [key, place] : turn_) {
    Write& write = writes_[place];
    while (may_post(write)) {
      try {
        if (inner_->post_write(step_request(write, place)) == PostResult::kAgain) break;
      } catch (const common::StatusError& error) {
        if (error.status().code != common::StatusCode::kTransport) throw;
        ++write.posted;
        step_done(place, error.what());
        break;
      }
      ++write.posted;
      if (write.posted < write.decision.num_pieces) {
        write.ready_at = std::max(write.ready_at, write.accepted_at + write.decision.delays[write.posted]);
      }
    }
  }
}

void ReorderRail::step_done(std::uint32_t place, const std::string& error) {
  Write& write = writes_[place];
  MOE_EFA_CHECK(write.busy && write.completed < write.posted, "completion of a write that was not posted");
  ++write.completed;
  if (write.error.empty()) write.error = error;
  const bool over = write.completed == num_steps(write) || (!write.error.empty() && write.completed == write.posted);
  if (!over) return;
  RailEvent event;
  event.id = write.request.id;
  if (!write.error.empty()) {
    event.kind = RailEvent::Kind::kError;
    event.own_write = true;
    event.peer_node = static_cast<int>(write.request.peer_node);
    event.error = write.error;
  }
  write.busy = false;
  hold(std::move(event), place);
}

void ReorderRail::hold(RailEvent event, std::int64_t place) {
  Draws draws(draw(kOfEvent, events_++));
  const std::uint32_t delay = draw_delay(draws);
  held_.push_back({polls_ + delay, std::uint64_t{draws.below(1u << 31)}, place, std::move(event)});
}

void ReorderRail::collect() {
  auto is_imm = [](const HeldEvent& held) { return held.event.kind == RailEvent::Kind::kRemoteImm; };
  for (std::size_t count = kCollect; count == kCollect;) {
    if (static_cast<std::size_t>(std::count_if(held_.begin(), held_.end(), is_imm)) >= kMaxHeldImms) return;
    count = inner_->poll(batch_);
    for (std::size_t i = 0; i < count; ++i) {
      RailEvent& event = batch_[i];
      const bool failed = event.kind == RailEvent::Kind::kError && event.own_write;
      if (event.kind == RailEvent::Kind::kWriteDone || failed) {
        const std::string error = !failed ? "" : event.error.empty() ? "write failed" : event.error;
        step_done(static_cast<std::uint32_t>(event.id / kMaxSteps), error);
        continue;
      }
      event.bytes = 0;  // of the last piece alone
      hold(std::move(event), -1);
    }
  }
}

std::size_t ReorderRail::poll(std::span<RailEvent> events) {
  ++polls_;
  collect();
  for (std::uint32_t place = 0; place < writes_.size(); ++place) {
    Write& write = writes_[place];
    if (!write.busy || !write.dropped || polls_ < write.ready_at) continue;
    ++write.posted;
    step_done(place,
              config_.drop_after > 0
                  ? "write failed: unresponsive remote, it answered before (status 13), dropped by MOE_EFA_REORDER"
                  : "write failed: unreachable remote, it never answered (status 15), dropped by MOE_EFA_REORDER");
  }
  post_held();
  // Few at a time: what goes wrong between two events shows only if something can happen between them.
  const std::size_t most = std::min<std::size_t>(events.size(), 1 + draw(kOfPoll, polls_) % 4);
  std::size_t count = 0;
  while (count < most) {
    auto next = held_.end();
    for (auto it = held_.begin(); it != held_.end(); ++it) {
      if (it->due <= polls_ && (next == held_.end() || it->key < next->key)) next = it;
    }
    if (next == held_.end()) break;
    events[count++] = std::move(next->event);
    if (next->place >= 0) free_.push_back(static_cast<std::uint32_t>(next->place));
    if (next != held_.end() - 1) *next = std::move(held_.back());
    held_.pop_back();
  }
  return count;
}

}  // namespace moe_efa::transport
