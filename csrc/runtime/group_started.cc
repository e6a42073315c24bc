// A Group's calls in two halves: one queue a phase, stepped by whoever waits, otherwise in the background.
#include <algorithm>

#include "common/check.h"
#include "runtime/backoff.h"
#include "runtime/device_started.h"
#include "runtime/group.h"

namespace moe_efa::runtime {

using common::StatusCode;
using common::StatusError;
using proto::Phase;

std::uint64_t Group::dispatch_start(const DispatchRequest& request, std::shared_ptr<HostPool> pool) {
  double begin = monotonic_s();
  Prepared prepared = prepare_dispatch(request);
  if (device_) return start_device_dispatch(request, prepared);
  std::uint64_t ticket;
  {
    std::lock_guard lock(calls_mutex_);
    ticket = start_call(std::make_shared<StartedDispatch>(
        context(), kernels::DispatchArgs{request.x, request.dtype, prepared.wire, prepared.out, prepared.plan},
        std::move(pool), cache_share_bytes_));
  }
  phase_stats_[0].seconds += monotonic_s() - begin;
  return ticket;
}

std::uint64_t Group::combine_start(const CombineRequest& request) {
  double begin = monotonic_s();
  kernels::CombineArgs args = prepare_combine(request);
  if (device_) return start_device_combine(request, args);
  std::uint64_t ticket;
  {
    std::lock_guard lock(calls_mutex_);
    ticket = start_call(std::make_shared<StartedCombine>(context(), args));
  }
  phase_stats_[1].seconds += monotonic_s() - begin;
  return ticket;
}

std::uint64_t Group::start_call(std::shared_ptr<StartedCall> call) {
  call->number = state_.call - 1;
  call->ticket = next_ticket_;
  moving_[static_cast<int>(call->phase())].push_back(call);
  pending_.emplace(next_ticket_, std::move(call));
  settle_background();
  return next_ticket_++;
}

DispatchBuffers Group::finish(std::uint64_t ticket, void* stream) {
  double begin = monotonic_s();
  std::shared_ptr<StartedCall> call = pending_call(ticket);
  pending_.erase(ticket);
  check_open(call->phase());
  MOE_EFA_CHECK(!dispatch_, "finish() inside a dispatch");
  auto* on_device = dynamic_cast<DeviceCall*>(call.get());
  run_in_turn(*call, [&] { return on_device == nullptr ? call->done() : on_device->returns(*device_); });
  if (on_device != nullptr) on_device->leave(static_cast<kernels::Device::Stream>(stream));
  count(call->phase(), call->plan(), call->wire_dtype());
  phase_stats_[static_cast<int>(call->phase())].seconds += monotonic_s() - begin;
  if (call->phase() == Phase::kCombine || on_device != nullptr) return {};
  return static_cast<StartedDispatch&>(*call).take_results();
}

bool Group::ended(std::uint64_t ticket) const {
  auto found = pending_.find(ticket);
  return found == pending_.end() || found->second->done() || failed_.load() || liveness_->failed();
}

bool Group::forget(std::uint64_t ticket) {
  auto found = pending_.find(ticket);
  if (found == pending_.end()) return true;
  if (!found->second->done()) {
    std::lock_guard lock(calls_mutex_);
    const auto& moving = moving_[static_cast<int>(found->second->phase())];
    if (std::find(moving.begin(), moving.end(), found->second) != moving.end()) return false;
  }
  pending_.erase(found);
  return true;
}

bool Group::step_started() {
  bool moved = answer_gates();
  for (auto& calls : moving_) {
    if (calls.empty()) continue;
    StartedCall& call = *calls.front();
    moved |= call.step();
    if (!call.done()) continue;
    if (call.replayed) count_locked(call.phase(), call.plan(), call.wire_dtype());
    calls.pop_front();
  }
  return moved;
}

bool Group::step_background() {
  bool moved = false;
  try {
    {
      std::lock_guard lock(calls_mutex_);
      if (!in_background_) return false;
      watch_device_calls();
      if (!failed_.load() && !liveness_->failed()) moved = step_started();
    }
    moved |= place_dispatch();
  } catch (const StatusError& error) {
    record(error.status());
  } catch (const std::exception& error) {
    record({StatusCode::kInternal, -1, -1, -1, -1, std::string("in the background: ") + error.what()});
  }
  if (driver_) moved |= driver_->try_step();
  std::lock_guard lock(calls_mutex_);
  settle_background();
  return moved;
}

// A caller who waits does all there is to do.
void Group::stand_in(bool caller_waits) {
  std::lock_guard lock(calls_mutex_);
  caller_waits_ = caller_waits;
  settle_background();
}

void Group::settle_background() {
  bool anything = std::any_of(std::begin(moving_), std::end(moving_), [](const auto& calls) { return !calls.empty(); });
  bool go_on = (anything || !recorded_.empty()) && !caller_waits_ && !failed_.load();
  if (recorded_.empty()) go_on = go_on && !liveness_->failed();  // otherwise the background has to record it
  // A background that does not sleep steps the driver as well: one core serves both.
  bool enter = go_on && (recorded_.empty() || crowded_);
  if (driver_ && enter != driver_entered_) enter ? driver_->enter() : driver_->leave();
  driver_entered_ = enter;
  if (go_on == in_background_) return;
  in_background_ = go_on;
  background_->want(go_on);
}

void Group::drop_started() {
  std::lock_guard lock(calls_mutex_);
  stop_kernels();
  for (auto& calls : moving_) calls.clear();
}

}  // namespace moe_efa::runtime
