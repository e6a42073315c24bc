// A Group's calls that are waited for: the loop of all waiting, and what calls need before they begin.
#include <algorithm>

#include "common/check.h"
#include "kernels/cpu/plan.h"
#include "runtime/backoff.h"
#include "runtime/group.h"
#include "runtime/group_waits.h"
#include "runtime/huge_pages.h"

namespace moe_efa::runtime {

using common::Status;
using common::StatusCode;
using common::StatusError;
using proto::Phase;

namespace {

constexpr double kPatienceS = 0.5;  // before a call asks whom it waits for

// `configured` is one of the words that choose_layout knows.
proto::DType resolve_dtype(const std::string& configured, proto::DType tensor) {
  for (proto::DType dtype : {proto::DType::kBf16, proto::DType::kFp32, proto::DType::kFp8}) {
    if (configured == proto::dtype_name(dtype)) return dtype;
  }
  return tensor;  // "auto"
}

}  // namespace

kernels::CallContext Group::context() {
  return {view_,
          state_,
          descriptors_.get(),
          pool_,
          std::max<std::uint32_t>(1, static_cast<std::uint32_t>(rails_.size())),
          &doorbell_};
}

template <typename Call>
bool Group::step_call(Call& call, Phase phase) {
  std::lock_guard lock(calls_mutex_);
  bool moved = step_started();
  // What was started earlier goes first.
  return (moving_[static_cast<int>(phase)].empty() && call.step()) || moved;
}

template <typename Call>
kernels::Waiting Group::waiting_for(const Call& call, Phase phase) {
  std::lock_guard lock(calls_mutex_);
  const auto& before = moving_[static_cast<int>(phase)];
  return before.empty() ? call.waiting() : before.front()->waiting();
}

template <typename Call, typename Until>
void Group::run(Call& call, Phase phase, const Until& until) {
  constexpr double kCheckEveryS = 0.02;  // between two looks at anything that is not this call
  auto epoch = static_cast<std::int64_t>(call.epoch());
  double last_moved = monotonic_s(), last_check = last_moved;
  bool warned = false;
  // Mates and the driver ring; where the driver has no core of its own, nobody rings for what only the rails know.
  Backoff backoff(doorbell_, crowded_, device_ || (driver_ && crowded_) ? kRailsPauseUs : kMatesPauseUs);
  if (driver_) driver_->enter();
  stand_in(true);
  struct Leave {
    Group& group;
    ~Leave() {
      if (group.driver_) group.driver_->leave();
      group.stand_in(false);
    }
  } leave{*this};
  try {
    while (!until()) {
      backoff.before_look();
      bool moved = step_call(call, phase);
      moved |= place_dispatch();
      if (driver_) moved |= driver_->try_step();
      if (moved) {
        backoff.reset();
        continue;
      }
      if (backoff.turns() == 0) last_moved = monotonic_s();
      if (liveness_->failed() && !failed_.load()) fail(peer_failure(phase, epoch, waiting_for(call, phase)));
      if (failed_.load()) check_open();
      if (!backoff.pause()) continue;
      double now = monotonic_s();
      if (now - last_check < kCheckEveryS) continue;
      last_check = now;
      if (interrupt_check_) interrupt_check_();
      if (liveness_->any_goodbye()) {
        if (Status left = departure(phase, epoch, calls_begun()); !left.ok()) fail(left);
      }
      if (now - last_moved > kPatienceS) {
        check_patience(phase, epoch, waiting_for(call, phase), now - last_moved, &warned);
      }
    }
    if (device_ && failed_.load()) check_open();  // kernels that an error stopped look as if they were done
  } catch (const StatusError& error) {
    if (!failed_.load()) fail(error.status());
    throw;
  } catch (...) {
    // An interrupt in the middle of a call: the others cannot finish without this rank.
    record({StatusCode::kTransport, static_cast<int>(config_.topology.rank), static_cast<int>(phase), epoch, -1,
            "rank " + std::to_string(config_.topology.rank) + " was interrupted in " + proto::phase_name(phase) +
                " epoch " + std::to_string(epoch)});
    failure_raised_ = true;  // in the shape of the interrupt
    drop_started();
    throw;
  }
}

std::uint64_t Group::floor_bytes(Phase phase, const kernels::Plan& plan, proto::DType dtype) const {
  std::uint64_t rows = 0;
  for (std::uint32_t node = 0; node < config_.topology.num_nodes(); ++node) {
    if (node == config_.topology.node()) continue;
    rows += phase == Phase::kDispatch
                ? plan.send[node].facts.rows
                : plan.rings[config_.topology.local_rank() * config_.topology.num_nodes() + node].rows;
  }
  return rows * proto::dense_row_bytes(config_.hidden_size, dtype);
}

void Group::count(Phase phase, const kernels::Plan& plan, proto::DType wire) {
  std::lock_guard lock(calls_mutex_);
  count_locked(phase, plan, wire);
}

void Group::count_locked(Phase phase, const kernels::Plan& plan, proto::DType wire) {
  PhaseStats& stats = phase_stats_[static_cast<int>(phase)];
  ++stats.calls;
  stats.wire_floor_bytes += floor_bytes(phase, plan, wire);
}

Group::Prepared Group::prepare_dispatch(const DispatchRequest& request) {
  check_open(Phase::kDispatch);
  MOE_EFA_CHECK(!dispatch_, "a dispatch while dispatch_begin() waits for its dispatch_finish()");
  proto::DType wire = resolve_dtype(request.gradient ? config_.grad_wire_dtype : config_.wire_dtype, request.dtype);
  if (request.fp8_output && wire != proto::DType::kFp8) {
    throw StatusError(
        {StatusCode::kInvalid, -1, -1, -1, -1,
         std::string("FP8 rows cannot be handed through: the wire's dtype is ") + proto::dtype_name(wire)});
  }
  std::shared_ptr<kernels::Plan> plan = request.plan;
  if (plan && !plan->complete) {
    throw StatusError({StatusCode::kInvalid, -1, -1, -1, -1, "the plan's dispatch has not finished"});
  }
  if (!plan && device_) {
    plan = new_device_plan(request);
  } else if (!plan) {
    // Throws kInvalid before anything is sent or counted (I17).
    plan = kernels::cpu::build_send_plan({request.topk_idx, request.topk_weights, request.num_tokens,
                                          request.expert_alignment, context().num_nics, request.capacity},
                                         view_);
  }
  return {plan, wire, request.fp8_output ? proto::DType::kFp8 : request.dtype};
}

std::shared_ptr<kernels::Plan> Group::dispatch_begin(const DispatchRequest& request) {
  double begin = monotonic_s();
  Prepared prepared = prepare_dispatch(request);
  dispatch_request_ = request;
  dispatch_plan_ = prepared.plan;
  dispatch_wire_ = prepared.wire;
  dispatch_out_ = prepared.out;
  {
    std::lock_guard lock(calls_mutex_);
    dispatch_.emplace(context(),
                      kernels::DispatchArgs{request.x, request.dtype, dispatch_wire_, dispatch_out_, dispatch_plan_});
  }
  run(*dispatch_, Phase::kDispatch, [&] { return dispatch_->sizes_known(); });
  liveness_->set_away(true);  // until the caller has memory for the rows
  phase_stats_[0].seconds += monotonic_s() - begin;
  return dispatch_plan_;
}

void Group::dispatch_finish(const kernels::DispatchOutput& output) {
  liveness_->set_away(false);
  check_open(Phase::kDispatch);
  MOE_EFA_CHECK(dispatch_, "dispatch_finish() without dispatch_begin()");
  double begin = monotonic_s();
  MOE_EFA_CHECK((output.scales != nullptr) == (dispatch_out_ == proto::DType::kFp8),
                "scales are for FP8 rows, and only for them");
  std::uint64_t bytes = dispatch_plan_->rows() * config_.hidden_size * proto::dtype_bytes(dispatch_out_);
  prefer_huge_pages(output.x, bytes);
  kernels::DispatchOutput to = output;
  to.stream = bytes > cache_share_bytes_;
  dispatch_->set_output(to);
  run(*dispatch_, Phase::kDispatch, [&] { return dispatch_->done(); });
  dispatch_.reset();
  count(Phase::kDispatch, *dispatch_plan_, dispatch_wire_);
  phase_stats_[0].seconds += monotonic_s() - begin;
  dispatch_plan_.reset();
  dispatch_request_ = {};
}

kernels::CombineArgs Group::prepare_combine(const CombineRequest& request) {
  check_open(Phase::kCombine);
  MOE_EFA_CHECK(!dispatch_, "a combine inside a dispatch");
  MOE_EFA_CHECK(request.plan && request.plan->complete, "a combine needs the plan of a finished dispatch");
  proto::DType wire =
      resolve_dtype(request.gradient ? config_.grad_combine_dtype : config_.combine_dtype, request.dtype);
  if (!device_)
    prefer_huge_pages(
        request.out, std::uint64_t{request.plan->num_tokens} * config_.hidden_size * proto::dtype_bytes(request.dtype));
  return {request.y,       request.dtype,        wire,        request.plan,
          request.weights, request.weight_grads, request.out, request.topk_weight_grads};
}

void Group::combine(const CombineRequest& request) {
  double begin = monotonic_s();
  kernels::CombineArgs args = prepare_combine(request);
  std::optional<kernels::cpu::CombineCall> call;
  {
    std::lock_guard lock(calls_mutex_);
    call.emplace(context(), args);
  }
  run(*call, Phase::kCombine, [&] { return call->done(); });
  count(Phase::kCombine, *request.plan, args.wire_dtype);
  phase_stats_[1].seconds += monotonic_s() - begin;
}

// Waits for something about a call that is stepped with the others, in its turn.
void Group::run_in_turn(const StartedCall& call, const std::function<bool()>& until) {
  struct InTurn {
    const StartedCall& call;
    bool step() { return false; }
    kernels::Waiting waiting() const { return {}; }
    std::uint64_t epoch() const { return call.epoch(); }
  } in_turn{call};
  run(in_turn, call.phase(), until);
}

}  // namespace moe_efa::runtime
