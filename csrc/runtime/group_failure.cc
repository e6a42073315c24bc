// How a Group fails: the first error wins and reaches all ranks (I6), and every wait has a deadline (I5).
#include <cstdlib>
#include <sstream>

#include "common/check.h"
#include "common/log.h"
#include "runtime/backoff.h"
#include "runtime/group.h"
#include "runtime/group_waits.h"

namespace moe_efa::runtime {

using common::Status;
using common::StatusCode;
using common::StatusError;
using proto::Phase;

namespace {

constexpr double kHearsayS = 1;  // before a rank blames one that may be waiting for another

}  // namespace

void Group::record(const Status& status) {
  {
    std::lock_guard lock(failure_mutex_);
    if (failure_.ok()) failure_ = status;  // the first error wins (I6)
    failed_.store(true);
  }
  if (device_state_) device_state_->stop();  // before what may take a moment
  liveness_->abort(status);
}

void Group::check() const {
  if (liveness_->failed()) throw StatusError(liveness_->failure());
  std::lock_guard lock(failure_mutex_);
  if (!failure_.ok()) throw StatusError(failure_);
}

bool Group::peer_left(std::uint32_t rank, bool wait) const {
  double begin = monotonic_s();
  for (;;) {
    if (liveness_->any_goodbye() && liveness_->peer_said_goodbye(static_cast<int>(rank))) return true;
    if (!wait || liveness_->failed() || monotonic_s() - begin > kVerdictS) return false;
    sleep_us(1000);
  }
}

// A peer that left after this very call owes nothing. One that left before it will never come: ok() where there is
// none.
Status Group::departure(Phase phase, std::int64_t epoch, std::uint64_t calls_begun) const {
  for (std::uint32_t rank : neighbours()) {
    std::optional<std::uint64_t> calls = liveness_->goodbye_of(static_cast<int>(rank));
    if (!calls || *calls >= calls_begun) continue;
    std::string reason = liveness_->reason_of(static_cast<int>(rank));
    std::ostringstream text;
    text << "rank " << rank << ' '
         << (reason.empty() ? "closed the group (or its process ended: see its own error)" : reason) << " while rank "
         << config_.topology.rank << " was in " << proto::phase_name(phase) << " epoch " << epoch;
    return {reason.empty() ? StatusCode::kPeerLost : StatusCode::kTransport,
            static_cast<int>(rank),
            static_cast<int>(phase),
            epoch,
            -1,
            text.str()};
  }
  return {};
}

void Group::fail(Status status) {
  record(status);
  check_open();
  std::abort();  // unreachable: check_open throws after record
}

void Group::check_open(std::optional<Phase> entering) {
  if (closed_) throw StatusError({StatusCode::kClosed, -1, -1, -1, -1, "this ExpertParallel is closed"});
  if (!failed_.load() && liveness_->failed()) {
    record(entering ? peer_failure(*entering, next_epoch(*entering), {}) : liveness_->failure());
  }
  if (failed_.load()) {
    drop_started();  // the memory that they use goes with whoever catches this
    std::lock_guard lock(failure_mutex_);
    failure_raised_ = true;
    throw StatusError(failure_);
  }
  MOE_EFA_CHECK(started_, "the group was not started");
}

Status Group::peer_failure(Phase phase, std::int64_t epoch, const kernels::Waiting& waiting) const {
  Status status = liveness_->failure();
  // The detector knows the rank; the call knows where it was.
  if (status.phase < 0) status.phase = static_cast<int>(phase);
  if (status.epoch < 0) status.epoch = epoch;
  if (status.chunk < 0) status.chunk = waiting.chunk;
  std::ostringstream text;
  text << status.message << "; rank " << config_.topology.rank << " was in " << proto::phase_name(phase) << " epoch "
       << epoch;
  status.message = text.str();
  return status;
}

void Group::check_patience(Phase phase, std::int64_t epoch, const kernels::Waiting& waiting, double idle_s,
                           bool* warned) {
  auto status_of = [&](StatusCode code, int rank, const std::string& text) {
    return Status{code, rank, static_cast<int>(phase), epoch, waiting.chunk, text};
  };
  if (idle_s > config_.warn_after_s && !*warned) {
    *warned = true;
    std::ostringstream text;
    text << "waiting for " << static_cast<int>(idle_s) << " s in " << proto::phase_name(phase) << " epoch " << epoch
         << describe_wait(waiting);
    common::log_line("warning", static_cast<int>(config_.topology.rank), text.str());
  }
  // Ranks wait for each other in chains; one that has stopped is at the end of all of them. Who sees it stand still
  // speaks first, who only waits for a rank that may be waiting itself gives the others a moment to say so.
  int suspect = liveness_->suspect();
  if (idle_s > config_.timeout_s + (suspect >= 0 || waiting.absent ? 0 : kHearsayS)) {
    std::ostringstream text;
    text << proto::phase_name(phase) << " epoch " << epoch << " on rank " << config_.topology.rank
         << " made no progress for " << config_.timeout_s << " s: waiting" << describe_wait(waiting);
    if (suspect >= 0 && suspect != waiting.rank) text << "; rank " << suspect << " has been silent for a while";
    fail(status_of(StatusCode::kPeerTimeout, suspect >= 0 ? suspect : waiting.rank, text.str()));
  }
}

void Group::abort(const std::string& message) {
  abort(Status{StatusCode::kTransport, static_cast<int>(config_.topology.rank), -1, -1, -1,
               "rank " + std::to_string(config_.topology.rank) + " gave up: " + message});
}

void Group::abort(const Status& status) {
  if (closed_) return;
  record(status);
  failure_raised_ = true;
}

}  // namespace moe_efa::runtime
