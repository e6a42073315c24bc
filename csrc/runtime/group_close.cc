// How a Group ends: what it owes is done first (I13), and it leaves together with the others.
#include <sched.h>

#include <algorithm>
#include <sstream>

#include "runtime/backoff.h"
#include "runtime/group.h"
#include "runtime/group_waits.h"

namespace moe_efa::runtime {

using common::Status;
using common::StatusCode;
using common::StatusError;
using proto::Phase;

namespace {

constexpr double kFarewellS = 1;  // more than the others wait, so that who knows the culprit speaks first
constexpr double kDrainS = 2;

}  // namespace

// What this rank owes is written and credited before it leaves, by calls that it started and did not finish as well
// (I13): the background goes on with those. Short, since others may never enter them.
void Group::drain(double most_s) {
  double begin = monotonic_s();
  auto idle = [this] {
    if (calls_done() < calls_begun() && !left_behind()) return false;
    bool idle = true;
    if (driver_) {
      driver_->inspect([&](engine::Engine& engine) { idle = engine.idle() && descriptors_->empty(); });
    }
    return idle;
  };
  while (!idle() && !failed_.load() && !liveness_->failed() && monotonic_s() - begin < most_s) {
    if (most_s > kDrainS && interrupt_check_) interrupt_check_();
    if (!driver_) {
      sleep_us(kRailsPauseUs);
    } else if (!driver_->try_step()) {
      sched_yield();
    }
  }
}

// A caller who closes has been promised the results of what it finished.
void Group::check_results(double timeout_s) {
  std::lock_guard lock(calls_mutex_);
  for (const auto& calls : moving_) {
    for (const auto& call : calls) {
      bool finished =
          std::none_of(pending_.begin(), pending_.end(), [&](const auto& one) { return one.second == call; });
      if (!finished) continue;
      std::ostringstream text;
      text << proto::phase_name(call->phase()) << " epoch " << call->epoch() << " on rank " << config_.topology.rank
           << " was still under way " << timeout_s << " s after close(): waiting" << describe_wait(call->waiting());
      return record({StatusCode::kPeerTimeout, call->waiting().rank, static_cast<int>(call->phase()),
                     static_cast<std::int64_t>(call->epoch()), -1, text.str()});
    }
  }
}

// Replays begin calls in the background.
std::uint64_t Group::calls_begun() const {
  std::lock_guard lock(calls_mutex_);
  return state_.call;
}

std::int64_t Group::next_epoch(Phase phase) const {
  std::lock_guard lock(calls_mutex_);
  return static_cast<std::int64_t>(state_.epoch[static_cast<int>(phase)]);
}

// Calls before the first that still moves.
std::uint64_t Group::calls_done() {
  std::lock_guard lock(calls_mutex_);
  std::uint64_t calls = state_.call;
  for (const auto& moving : moving_) {
    if (!moving.empty()) calls = std::min(calls, moving.front()->number);
  }
  return calls;
}

// Whether the call that still moves waits for a rank that left before it.
bool Group::left_behind() {
  if (!liveness_->any_goodbye()) return false;
  std::uint64_t done = calls_done();
  std::vector<std::uint32_t> ranks = neighbours();
  return std::any_of(ranks.begin(), ranks.end(), [&](std::uint32_t rank) {
    std::optional<std::uint64_t> calls = liveness_->goodbye_of(static_cast<int>(rank));
    return calls && *calls <= done;
  });
}

void Group::close(bool collective, double timeout_s, const std::string& reason) {
  if (closed_) return;
  auto broken = [this] { return failed_.load() || liveness_->failed(); };
  Status failure;
  bool others_need_this_rank = false;
  try {
    if (started_ && dispatch_) {
      abort("closed in the middle of a dispatch");
    } else if (started_ && !broken()) {
      drain(device_ && collective ? timeout_s : std::min(timeout_s, kDrainS));
      if (device_ && collective && !broken()) check_results(timeout_s);
      if (!broken()) {
        // Who waits for the others goes on serving the calls that it entered; who does not vouches for those that
        // ended.
        liveness_->goodbye(collective ? calls_begun() : calls_done(), reason);
        if (collective) close_together(timeout_s);
        // Then this rank knows best why it closed.
        Status heard = liveness_->failure();
        others_need_this_rank =
            heard.code == StatusCode::kPeerLost && heard.rank == static_cast<int>(config_.topology.rank);
      }
    }
    if (started_ && collective && broken() && !failure_raised_ && !others_need_this_rank) check_open();
  } catch (const StatusError& error) {
    failure = error.status();
  }
  closed_ = true;
  background_->stop();
  dispatch_.reset();
  drop_started();
  pending_.clear();
  if (driver_) driver_->stop();
  if (!failure.ok()) throw StatusError(failure);
}

// The others may still need this rank's progress, so the driver keeps running. Short waits let Ctrl-C through.
void Group::close_together(double timeout_s) {
  constexpr double kTurnS = 0.1;
  double begin = monotonic_s();
  while (!liveness_->wait_goodbyes(kTurnS) || !liveness_->missing_goodbye().ok()) {
    if (liveness_->failed()) return;
    if (interrupt_check_) interrupt_check_();
    Status missing = liveness_->missing_goodbye();
    bool late = monotonic_s() - begin > timeout_s;
    if (missing.ok() || (missing.code != StatusCode::kPeerLost && !late)) continue;
    std::ostringstream text;
    text << missing.message << " in close() of rank " << config_.topology.rank << ", which is collective";
    if (missing.code == StatusCode::kPeerTimeout) text << ": it did not close within " << timeout_s << " s";
    missing.message = text.str();
    return record(missing);
  }
  slots_.close_imports();  // nobody's kernels run any more, and nobody has freed what it exported
  liveness_->farewell();
  begin = monotonic_s();
  while (!liveness_->wait_farewells(kTurnS)) {
    if (liveness_->failed()) return;
    if (interrupt_check_) interrupt_check_();
    if (monotonic_s() - begin <= timeout_s + kFarewellS) continue;
    return record({StatusCode::kPeerTimeout, -1, -1, -1, -1,
                   "close() is collective: not every rank closed within " + std::to_string(timeout_s) + " s"});
  }
}

}  // namespace moe_efa::runtime
