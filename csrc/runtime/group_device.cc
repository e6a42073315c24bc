// What a Group does otherwise where its tensors are on a device.
#include <algorithm>

#include "common/check.h"
#include "common/log.h"
#include "kernels/device/plan_memory.h"
#include "runtime/device_started.h"
#include "runtime/group.h"

namespace moe_efa::runtime {

using common::StatusCode;
using common::StatusError;
using proto::Phase;

namespace {

constexpr double kStopS = 5;  // for kernels to leave

}  // namespace

// Words that only kernels read lie in memory of the GPUs, beside the slots, if every rank of the node can have them
// there: all or none, since mates read each other's.
void Group::place_kernel_words(const std::vector<Address>& addresses) {
  const proto::Topology& topology = config_.topology;
  std::copy(regions_.begin(), regions_.end(), kernel_word_bases_.begin());
  if (!slots_.apart()) return;
  std::string missing = slots_.no_window();
  for (std::uint32_t mate = 0; slots_.has_kernel_words() && mate < topology.node_size; ++mate) {
    std::uint32_t rank = topology.rank_of(topology.node(), mate);
    if (!addresses[rank].kernel_words) missing = "rank " + std::to_string(rank) + " has no GDRCopy";
  }
  kernel_words_apart_ = slots_.has_kernel_words() && missing.empty();
  if (!missing.empty()) {
    common::log_line("note", static_cast<int>(topology.rank), "kernels poll for arrivals in host memory: " + missing);
  }
  if (!kernel_words_apart_) return;
  std::fill(kernel_word_bases_.begin(), kernel_word_bases_.end(), nullptr);  // the CPU reads none
  kernel_word_bases_[topology.local_rank()] = slots_.kernel_words_window();
}

// After the mates' memory is mapped.
void Group::open_device_state() {
  std::vector<proto::RegionMemory> seen;  // by kernels
  for (std::uint32_t mate = 0; mate < config_.topology.node_size; ++mate) {
    proto::RegionMemory& memory = seen.emplace_back();
    memory.region = static_cast<std::byte*>(device_->map_host(regions_[mate], slots_.segment_bytes()));
    device_regions_.push_back(regions_[mate]);
    if (slots_.apart()) memory.slots = slot_bases_[mate] + layout_.slots_begin();
    memory.slots_begin = layout_.slots_begin();
    memory.bytes = layout_.total_bytes();
    if (kernel_words_apart_) memory.kernel_words = slots_.kernel_words(slot_bases_[mate]);
  }
  device_state_ = std::make_unique<kernels::device::State>(
      device_, view_, seen,
      kernels::device::StateConfig{config_.max_tokens_per_rank, context().num_nics, config_.timeout_s});
  // On the driver's thread: what kernels have packed goes on at once, whoever steps the calls.
  if (driver_) driver_->set_feed([this] { return device_state_->feed(descriptors_.get()); });
}

// With calls_mutex_ held, and for the time after an error, or a close that others cut short. Kernels that wait leave by
// themselves; one that is queued behind something of the caller's, such as a collective of another library, may not
// come to run for long. It is given a moment; then what it would touch is kept for ever.
void Group::stop_kernels() {
  if (!device_state_) return;
  device_state_->stop();
  double begin = monotonic_s();
  for (auto& calls : moving_) {
    for (const auto& call : calls) {
      auto& on_device = static_cast<DeviceCall&>(*call);
      bool quiet = false;
      kernels::device::quietly([&] { quiet = on_device.wait_quiet(std::max(0.0, kStopS - (monotonic_s() - begin))); });
      if (!quiet) stuck_.push_back(call);
    }
  }
}

void Group::close_device() {
  if (!device_) return;
  if (stuck_.empty() && device_state_ && device_state_->has_gates()) {
    // A graph may be replayed whenever its owner likes: its gates then find that this group has stopped.
    new std::unique_ptr<kernels::device::State>(std::move(device_state_));
  }
  if (!stuck_.empty()) {
    common::log_line("warning", static_cast<int>(config_.topology.rank),
                     "kernels of a failed group are still queued: its memory is not given back");
    slots_.abandon();
    new std::unique_ptr<kernels::device::State>(std::move(device_state_));
    new std::vector<std::shared_ptr<StartedCall>>(std::move(stuck_));
    new transport::Segment(std::move(segment_));
    new std::vector<transport::Segment>(std::move(mate_segments_));
    return;
  }
  device_state_.reset();
  for (std::byte* region : device_regions_) {
    kernels::device::quietly([&] { device_->unmap_host(region); });
  }
  device_regions_.clear();
}

// Results that the caller was promised are in its memory, or an error is raised.
void Group::synchronize(void* stream) {
  check_open();
  if (!device_) return;
  catch_up(stream);
  for (Phase phase : {Phase::kDispatch, Phase::kCombine}) {
    std::shared_ptr<StartedCall> last;
    {
      std::lock_guard lock(calls_mutex_);
      for (const auto& call : moving_[static_cast<int>(phase)]) {
        if (static_cast<DeviceCall&>(*call).launched()) last = call;
      }
    }
    if (last) run_in_turn(*last, [&] { return last->done(); });
  }
}

std::shared_ptr<kernels::Plan> Group::new_device_plan(const DispatchRequest& request) const {
  auto invalid = [](const std::string& text) { throw StatusError({StatusCode::kInvalid, -1, -1, -1, -1, text}); };
  if (request.num_tokens > config_.max_tokens_per_rank) {
    invalid(std::to_string(request.num_tokens) + " tokens, where max_tokens_per_rank is " +
            std::to_string(config_.max_tokens_per_rank));
  }
  MOE_EFA_CHECK(request.send_memory != nullptr, "a dispatch on a device needs memory for its plan");
  auto plan = std::make_shared<kernels::Plan>();
  plan->num_tokens = request.num_tokens;
  plan->expert_alignment = request.expert_alignment;
  plan->capacity = request.capacity;
  if (plan->is_static()) plan->overflow = std::make_shared<std::int64_t>(0);
  plan->send.resize(config_.topology.num_nodes());
  return plan;
}

void Group::check_plan(const kernels::Plan& plan) const {
  MOE_EFA_CHECK(plan.device_view, "the plan was not made on this device");
  if (!plan.rings.empty()) return;
  throw StatusError({StatusCode::kInvalid, -1, -1, -1, -1,
                     "the dispatch of this handle was captured in a graph that has not been replayed yet"});
}

std::uint64_t Group::start_device_dispatch(const DispatchRequest& request, const Prepared& prepared) {
  if (request.plan) check_plan(*request.plan);
  kernels::device::DispatchOptions options{static_cast<kernels::Device::Stream>(request.stream), request.alone,
                                           request.topk_idx, request.topk_weights, request.send_memory};
  MOE_EFA_CHECK(allocate_, "dispatches on a device need set_allocate()");
  std::lock_guard lock(calls_mutex_);
  return start_call(std::make_shared<DeviceDispatch>(
      context(), *device_state_,
      kernels::DispatchArgs{request.x, request.dtype, prepared.wire, prepared.out, prepared.plan}, options));
}

std::uint64_t Group::start_device_combine(const CombineRequest& request, const kernels::CombineArgs& args) {
  check_plan(*args.plan);
  std::lock_guard lock(calls_mutex_);
  return start_call(std::make_shared<DeviceCombine>(
      context(), *device_state_, args, static_cast<kernels::Device::Stream>(request.stream), request.alone));
}

std::shared_ptr<StartedCall> Group::pending_call(std::uint64_t ticket) {
  auto found = pending_.find(ticket);
  if (found == pending_.end()) check_open();
  MOE_EFA_CHECK(found != pending_.end(), "no call with ticket " << ticket << " is pending");
  return found->second;
}

// Gives the dispatch that is stepped its memory as soon as the sizes are known, so that none waits for a later call of
// its caller (I13). True when it did. Without a lock: memory may take long, and user threads wait with theirs held.
bool Group::place_dispatch() {
  if (!device_) return false;
  std::shared_ptr<DeviceDispatch> call;
  DispatchSizes sizes;
  {
    std::lock_guard lock(calls_mutex_);
    const auto& moving = moving_[static_cast<int>(Phase::kDispatch)];
    if (moving.empty() || failed_.load()) return false;
    call = std::static_pointer_cast<DeviceDispatch>(moving.front());
    if (!call->claim()) return false;
    sizes = {call->made_plan(), call->plan_bytes()};
  }
  DispatchMemory memory;
  liveness_->set_away(true);
  try {
    std::shared_ptr<void> allowed = device_->beside_captures();
    memory = allocate_(call->ticket, sizes);
  } catch (const NoMemory& error) {
    std::string rank = std::to_string(config_.topology.rank);
    throw StatusError({StatusCode::kTransport, static_cast<int>(config_.topology.rank),
                       static_cast<int>(Phase::kDispatch), static_cast<std::int64_t>(call->epoch()), -1,
                       "rank " + rank + " could not finish a dispatch: " + error.what() + " (dispatch epoch " +
                           std::to_string(call->epoch()) + ", memory for " + std::to_string(sizes.plan->rows()) +
                           " rows)"});
  }
  liveness_->set_away(false);
  const kernels::DispatchOutput& output = memory.output;
  MOE_EFA_CHECK((output.scales != nullptr) == (call->out_dtype() == proto::DType::kFp8),
                "scales are for FP8 rows, and only for them");
  MOE_EFA_CHECK((output.weights != nullptr) == call->fresh(), "weights are for fresh dispatches, and only for them");
  std::lock_guard lock(calls_mutex_);
  call->set_output(output, memory.plan_memory);
  return true;
}

// Looks after kernels that nobody waits for: with calls_mutex_ held.
void Group::watch_device_calls() {
  if (!device_ || failed_.load()) return;
  for (const auto& calls : moving_) {
    if (calls.empty()) continue;
    auto epoch = static_cast<std::int64_t>(calls.front()->epoch());
    if (liveness_->failed()) return record(peer_failure(calls.front()->phase(), epoch, {}));
    if (!liveness_->any_goodbye()) continue;
    if (common::Status left = departure(calls.front()->phase(), epoch, state_.call); !left.ok()) return record(left);
  }
  // With graphs nobody else may be here to hear of it, and a replay that is to come would wait.
  if (!recorded_.empty() && liveness_->failed()) return record(liveness_->failure());
  check_replays();
}

std::size_t Group::device_send_bytes(std::uint32_t num_tokens) const {
  return kernels::device::send_bytes(layout_.config(), num_tokens);
}

}  // namespace moe_efa::runtime
