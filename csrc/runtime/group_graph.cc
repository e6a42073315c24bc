// What a Group does for graphs. Capture queues kernels and sends nothing; a replay is a call from the moment when its
// first gate knocks, and goes through the same states as any other: in the background, for nobody waits for it.
#include <algorithm>
#include <sstream>

#include "common/check.h"
#include "kernels/device/plan_memory.h"
#include "runtime/backoff.h"
#include "runtime/device_started.h"
#include "runtime/group.h"

namespace moe_efa::runtime {

using common::StatusCode;
using common::StatusError;
using kernels::device::Recording;
using proto::Phase;

namespace {

constexpr std::size_t kGatesPerLook = 64;
constexpr long kLookPauseUs = 20;     // between two looks at a stream
constexpr double kHostPatienceS = 3;  // who waits for a replay lets others say first why

// A mark that is released, whatever happens.
class ScopedMark {
 public:
  ScopedMark(kernels::Device& device, kernels::Device::Stream stream) : device_(device), mark_(device.mark(stream)) {}
  ~ScopedMark() {
    kernels::device::quietly([this] { device_.release(mark_); });
  }
  ScopedMark(const ScopedMark&) = delete;
  ScopedMark& operator=(const ScopedMark&) = delete;
  bool reached() const { return device_.reached(mark_); }

 private:
  kernels::Device& device_;
  kernels::Device::Mark mark_;
};

}  // namespace

std::size_t Group::device_plan_bytes(std::int64_t capacity) const {
  return kernels::device::most_pull_bytes(layout_.config(), capacity, config_.max_tokens_per_rank,
                                          device_state_->most_chunks());
}

std::shared_ptr<kernels::Plan> Group::record_dispatch(const DispatchRequest& request, const RecordedOutput& output) {
  Prepared prepared = prepare_dispatch(request);
  const std::shared_ptr<kernels::Plan>& plan = prepared.plan;
  bool fresh = !request.plan;
  MOE_EFA_CHECK(!fresh || plan->is_static(), "a fresh dispatch in a graph needs a capacity");
  MOE_EFA_CHECK(fresh || plan->device_view, "the plan was not made on this device");
  kernels::DispatchArgs args{request.x, request.dtype, prepared.wire, prepared.out, plan};
  kernels::device::DispatchOptions options{request.stream,      true,   request.topk_idx, request.topk_weights,
                                           request.send_memory, nullptr};
  auto recording = std::make_unique<Recording>(*device_state_, Phase::kDispatch, request.stream);
  kernels::device::record_dispatch(*device_state_, *recording, args, options, output.plan_memory, output.tables,
                                   context().num_nics);
  if (fresh) {
    // What later captures need to know; every replay fills in the rest.
    auto view = std::make_shared<kernels::cuda::PlanView>();
    view->overflow = static_cast<std::uint64_t*>(output.plan_memory);
    plan->device_view = std::move(view);
    plan->complete = true;
  }
  add_recording(std::move(recording), [=, this](Recording& of) {
    kernels::device::DispatchOptions replayed = options;
    replayed.recording = &of;
    if (fresh) {
      plan->complete = false;
      __atomic_store_n(plan->overflow.get(), 0, __ATOMIC_RELAXED);
    } else {
      check_replayed(*plan, Phase::kDispatch);
    }
    auto call = std::make_shared<DeviceDispatch>(context(), *device_state_, args, replayed);
    call->set_output(output.rows, output.plan_memory);
    return call;
  });
  return plan;
}

void Group::record_combine(const CombineRequest& request) {
  kernels::CombineArgs args = prepare_combine(request);
  MOE_EFA_CHECK(args.plan->device_view, "the plan was not made on this device");
  auto recording = std::make_unique<Recording>(*device_state_, Phase::kCombine, request.stream);
  kernels::device::record_combine(*device_state_, *recording);
  add_recording(std::move(recording), [=, this](Recording& of) {
    check_replayed(*args.plan, Phase::kCombine);
    return std::make_shared<DeviceCombine>(context(), *device_state_, args, request.stream, true, &of);
  });
}

// At a replay it is too late to refuse it: others may have begun theirs.
void Group::check_replayed(const kernels::Plan& plan, Phase phase) const {
  if (!plan.rings.empty()) return;
  int rank = static_cast<int>(config_.topology.rank);
  throw StatusError({StatusCode::kTransport, rank, static_cast<int>(phase), -1, -1,
                     "rank " + std::to_string(rank) + " replayed a " + proto::phase_name(phase) +
                         " before the graph with the dispatch of its handle"});
}

void Group::add_recording(std::unique_ptr<Recording> recording,
                          std::function<std::shared_ptr<StartedCall>(Recording&)> make_call) {
  std::lock_guard lock(calls_mutex_);
  recorded_.push_back({std::move(recording), std::move(make_call), nullptr});
  background_->stay_awake(!crowded_);
  settle_background();
}

// With calls_mutex_ held: a call for a replay that has come to its first gate. Of those on one stream the next begins
// when the one before has ended. Captured in the order in which they are replayed, mostly: a look is at the one that
// should come, and at a few others in turn.
bool Group::answer_gates() {
  if (recorded_.empty()) return false;
  if (answer_gate(expected_)) return true;
  for (std::size_t i = 0; i < std::min(kGatesPerLook, recorded_.size()); ++i) {
    looked_at_ = (looked_at_ + 1) % recorded_.size();
    if (answer_gate(looked_at_)) return true;
  }
  return false;
}

bool Group::answer_gate(std::size_t index) {
  Recorded& recorded = recorded_[index];
  if (!recorded.recording->knocks()) return false;
  // Its stream may be a replay ahead of what the host has seen of the one before.
  if (recorded.call && !recorded.call->done()) return false;
  recorded.recording->begin();
  recorded.call = recorded.make_call(*recorded.recording);
  recorded.call->number = state_.call - 1;
  recorded.call->replayed = true;
  recorded.call->begin_s = monotonic_s();
  moving_[static_cast<int>(recorded.call->phase())].push_back(recorded.call);
  expected_ = (index + 1) % recorded_.size();
  return true;
}

// With calls_mutex_ held.
bool Group::replays_run() const {
  for (const auto& calls : moving_) {
    for (const auto& call : calls) {
      if (call->replayed) return true;
    }
  }
  return false;
}

// Before a call that is no replay: those that the stream has before it come first. The background goes on meanwhile: to
// ask for a mark may take as long as a kernel runs that waits at a gate.
void Group::catch_up(void* stream) {
  if (recorded_.empty()) return;
  check_open(Phase::kDispatch);
  ScopedMark mark(*device_, stream);
  auto caught_up = [&] {
    if (!mark.reached()) return false;
    std::lock_guard lock(calls_mutex_);
    return !replays_run();
  };
  std::uint64_t done = calls_done();
  for (double last_moved = monotonic_s(); !caught_up(); sleep_us(kLookPauseUs)) {
    if (failed_.load() || liveness_->failed()) check_open(Phase::kDispatch);
    if (interrupt_check_) interrupt_check_();
    if (std::uint64_t now = calls_done(); now != done) {
      done = now;
      last_moved = monotonic_s();
    }
    if (monotonic_s() - last_moved <= config_.timeout_s + kHostPatienceS) continue;
    fail({StatusCode::kPeerTimeout, -1, -1, -1, -1,
          "the stream of rank " + std::to_string(config_.topology.rank) + " did not come to its call within " +
              std::to_string(config_.timeout_s) + " s"});
  }
  if (failed_.load() || liveness_->failed()) check_open(Phase::kDispatch);  // what an error stopped looks done
}

// With calls_mutex_ held: the first replay that waits for too long, for whom the host knows better than its gate.
void Group::check_replays() {
  for (const auto& calls : moving_) {
    if (calls.empty() || !calls.front()->replayed) continue;
    const StartedCall& call = *calls.front();
    double since_s = monotonic_s() - call.begin_s;
    if (since_s <= config_.timeout_s) continue;
    kernels::Waiting waiting = call.waiting();
    std::ostringstream text;
    text << proto::phase_name(call.phase()) << " epoch " << call.epoch() << " on rank " << config_.topology.rank
         << ", a replay, has not ended in " << config_.timeout_s << " s: waiting" << describe_wait(waiting);
    return record({StatusCode::kPeerTimeout, waiting.rank, static_cast<int>(call.phase()),
                   static_cast<std::int64_t>(call.epoch()), waiting.chunk, text.str()});
  }
}

}  // namespace moe_efa::runtime
