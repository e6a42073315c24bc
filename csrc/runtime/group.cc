#include "runtime/group.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <thread>

#include "common/check.h"
#include "common/log.h"
#include "kernels/cpu/plan.h"
#include "runtime/backoff.h"
#include "runtime/device_started.h"
#include "runtime/huge_pages.h"
#include "runtime/rails.h"

namespace moe_efa::runtime {

using common::Status;
using common::StatusCode;
using common::StatusError;
using proto::Phase;

namespace {

constexpr double kPatienceS = 0.5;  // before a call asks whom it waits for
constexpr double kVerdictS = 0.5;   // after an error of a rail: for the failure detector to say what happened
constexpr double kFarewellS = 1;    // more than the others wait, so that who knows the culprit speaks first
constexpr double kHearsayS = 1;     // before a rank blames one that may be waiting for another
constexpr double kDrainS = 2;
constexpr long kRailsPauseUs = 50, kMatesPauseUs = 10'000;  // the longest sleep of a waiting call
constexpr long kBackgroundPauseUs = 200;                    // and of one that nobody waits for yet
constexpr long kDevicePauseUs = 10;                         // between two looks at what kernels have done

// Two busy threads a rank: the caller and the driver.
bool is_crowded(const GroupConfig& config) {
  std::uint32_t ranks = std::max(config.ranks_on_host, config.topology.node_size);
  return std::thread::hardware_concurrency() < 2 * ranks * std::max(1u, config.num_threads);
}

// What a rank may hope to find in the last-level cache, half of it its own data's.
std::uint64_t cache_share(const GroupConfig& config) {
  constexpr long kUnknown = 8 << 20;
  long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  std::uint32_t ranks = std::max(config.ranks_on_host, config.topology.node_size);
  return static_cast<std::uint64_t>(bytes > 0 ? bytes : kUnknown) / (2 * std::max(1u, ranks));
}

GroupConfig with_buffers(GroupConfig config, const kernels::Device* device) {
  config.buffers = choose_buffers(config, device);
  return config;
}

// `configured` is one of the words that choose_layout knows.
proto::DType resolve_dtype(const std::string& configured, proto::DType tensor) {
  for (proto::DType dtype : {proto::DType::kBf16, proto::DType::kFp32, proto::DType::kFp8}) {
    if (configured == proto::dtype_name(dtype)) return dtype;
  }
  return tensor;  // "auto"
}

}  // namespace

Group::Group(const GroupConfig& config, std::shared_ptr<kernels::Device> device)
    : config_(with_buffers(config, device.get())),
      sizing_(choose_layout(config)),
      layout_(sizing_.layout, config.topology.node()),
      slots_(config_, layout_, device),
      state_(config.topology),
      pool_(std::max(1u, config.num_threads)),
      crowded_(is_crowded(config)),
      cache_share_bytes_(cache_share(config)),
      device_(std::move(device)) {
  const proto::Topology& topology = config_.topology;
  int rank = static_cast<int>(topology.rank);
  segment_ = transport::Segment::create(transport::segment_name(config_.job_key, rank), slots_.segment_bytes());
  regions_.assign(topology.node_size, nullptr);
  regions_[topology.local_rank()] = segment_.data();
  slot_bases_.assign(topology.node_size, nullptr);
  slot_bases_[topology.local_rank()] = slots_.memory(segment_.data()).slot_base();
  kernel_word_bases_.assign(topology.node_size, nullptr);
  view_ = {topology, layout_, regions_.data(), slot_bases_.data(), kernel_word_bases_.data()};
  liveness_ = std::make_unique<transport::Liveness>(
      transport::LivenessConfig{rank, config_.listen_host, config_.job_key, config_.heartbeat_timeout_s});
  if (topology.num_nodes() > 1) make_rails();
  long pause_us = driver_ && crowded_ ? kBackgroundPauseUs : kMatesPauseUs;
  if (device_) pause_us = crowded_ ? kBackgroundPauseUs : kDevicePauseUs;  // kernels do not ring
  background_ = std::make_unique<Background>(doorbell_, pause_us, [this] { return step_background(); });
}

void Group::make_rails() {
  RailLimits limits;
  limits.max_inbound_events = static_cast<std::uint32_t>(engine::max_inbound_events(sizing_.layout));
  limits.max_writes = kWritesPerNic;
  limits.max_write_bytes =
      std::max({layout_.slot_bytes(Phase::kDispatch), layout_.slot_bytes(Phase::kCombine), layout_.counts_bytes()});
  Rails rails = open_rails(config_, segment_, slots_, limits);
  rails_ = std::move(rails.rails);
  unlink_rails_ = std::move(rails.unlink);
  descriptors_ = std::make_unique<engine::DescriptorRing>(engine::max_descriptors(sizing_.layout));
  engine_ = std::make_unique<engine::Engine>(
      engine::EngineConfig{config_.topology, sizing_.layout, static_cast<std::uint32_t>(rails_.size()), kWritesPerNic,
                           view_.own(), view_.own_slots(), !slots_.apart()});
  std::vector<transport::Rail*> raw;
  for (const auto& rail : rails_) raw.push_back(rail.get());
  transport::PumpConfig pump_config;
  pump_config.post_timeout_s = config_.timeout_s;
  pump_config.doorbell = &doorbell_;
  if (slots_.wants_flush()) pump_config.flush = [this] { slots_.flush(); };
  pump_config.through_window = slots_.kernel_words_window() != nullptr;
  pump_config.peer_left = [this](std::uint32_t rank, bool wait) { return peer_left(rank, wait); };
  pump_ = std::make_unique<transport::Pump>(*engine_, view_, raw, *descriptors_, pump_config);
  driver_ = std::make_unique<Driver>(*engine_, *pump_, !crowded_, [this](const Status& status) {
    if (status.code == StatusCode::kTransport) {
      // A connection that breaks is mostly the first sign of a death, for which the failure detector has better words.
      double begin = monotonic_s();
      while (!liveness_->failed() && monotonic_s() - begin < kVerdictS) sleep_us(1000);
      if (liveness_->failed()) return;
    }
    record(status);
  });
}

Group::~Group() {
  background_->stop();
  if (driver_) driver_->stop();
  dispatch_.reset();
  drop_started();
  close_device();
  driver_.reset();
  rails_.clear();  // before the region that they registered
  liveness_.reset();
}

std::string Group::address() const {
  Address address;
  address.rank = config_.topology.rank;
  address.layout_hash = layout_hash(sizing_.layout, config_.buffers);
  address.host = config_.listen_host;
  address.port = liveness_->port();
  address.segment = segment_.name();
  address.segment_bytes = segment_.size();
  address.slots = slots_.exported();
  address.kernel_words = slots_.has_kernel_words();
  for (const auto& rail : rails_) address.rails.push_back(rail->local_address());
  return address.encode();
}

std::vector<std::uint32_t> Group::neighbours() const {
  std::vector<std::uint32_t> ranks;
  const proto::Topology& topology = config_.topology;
  for (std::uint32_t mate = 0; mate < topology.node_size; ++mate) {
    if (mate != topology.local_rank()) ranks.push_back(topology.rank_of(topology.node(), mate));
  }
  for (std::uint32_t node = 0; node < topology.num_nodes(); ++node) {
    if (node != topology.node()) ranks.push_back(topology.rail_peer(node));
  }
  return ranks;
}

void Group::connect(const std::vector<std::string>& encoded) {
  const proto::Topology& topology = config_.topology;
  MOE_EFA_CHECK(!connected_ && encoded.size() == topology.num_ranks, "connect() needs one address per rank, once");
  auto config_error = [](const std::string& text) { throw StatusError({StatusCode::kConfig, -1, -1, -1, -1, text}); };
  std::vector<Address> addresses;
  for (std::uint32_t rank = 0; rank < topology.num_ranks; ++rank) {
    addresses.push_back(Address::decode(encoded[rank]));
    if (addresses[rank].rank != rank)
      config_error("address of rank " + std::to_string(addresses[rank].rank) + " at " + std::to_string(rank));
    if (addresses[rank].layout_hash != layout_hash(sizing_.layout, config_.buffers)) {
      config_error("memory layout differs between rank " + std::to_string(topology.rank) + " and rank " +
                   std::to_string(rank) + ": same version and configuration everywhere?");
    }
    if (addresses[rank].rails.size() != rails_.size()) {
      config_error("rank " + std::to_string(topology.rank) + " has " + std::to_string(rails_.size()) + " NICs, rank " +
                   std::to_string(rank) + " has " + std::to_string(addresses[rank].rails.size()) +
                   ": all ranks need the same number");
    }
  }
  for (std::uint32_t mate = 0; mate < topology.node_size; ++mate) {
    if (mate == topology.local_rank()) continue;
    const Address& address = addresses[topology.rank_of(topology.node(), mate)];
    mate_segments_.push_back(transport::Segment::open(address.segment, address.segment_bytes));
    regions_[mate] = mate_segments_.back().data();
    slot_bases_[mate] = slots_.memory(regions_[mate], address.slots).slot_base();
  }
  place_kernel_words(addresses);
  for (std::uint32_t node = 0; node < topology.num_nodes(); ++node) {
    if (node == topology.node()) continue;
    for (std::size_t nic = 0; nic < rails_.size(); ++nic) {
      rails_[nic]->add_peer(node, addresses[topology.rail_peer(node)].rails[nic]);
    }
  }
  for (std::uint32_t rank : neighbours()) {
    peers_.push_back({static_cast<int>(rank), addresses[rank].host, static_cast<std::uint16_t>(addresses[rank].port)});
  }
  if (device_) open_device_state();
  connected_ = true;
}

void Group::meet(const std::function<void()>& poll) {
  MOE_EFA_CHECK(connected_ && !met_, "meet() follows connect(), once");
  liveness_->connect(peers_, config_.timeout_s, poll);
  met_ = true;
}

void Group::start() {
  MOE_EFA_CHECK(met_ && !started_, "start() follows meet(), once");
  segment_.unlink();  // everybody has mapped it: from here a crash leaves nothing behind
  if (unlink_rails_) unlink_rails_();
  started_ = true;
  if (!driver_) return;
  driver_->inspect([](engine::Engine& engine) { engine.on_hello_wanted(); });
  driver_->start();
  // First contact: also opens the provider's connections before the first call is timed.
  double begin = monotonic_s();
  for (bool met = false; !met;) {
    driver_->try_step();
    driver_->inspect([&](engine::Engine& engine) { met = engine.all_hellos() && engine.idle(); });
    if (liveness_->failed()) fail(liveness_->failure());
    if (failed_.load()) check_open();
    if (interrupt_check_) interrupt_check_();
    if (monotonic_s() - begin > config_.timeout_s) {
      engine::MissingHello missing;
      driver_->inspect(
          [&](engine::Engine& engine) { missing = engine.missing_hello().value_or(engine::MissingHello{}); });
      int peer =
          missing.node == config_.topology.node() ? -1 : static_cast<int>(config_.topology.rail_peer(missing.node));
      std::string text = rails_[missing.nic]->describe() + (peer < 0 ? "" : " with rank " + std::to_string(peer));
      fail({StatusCode::kPeerTimeout, peer, -1, -1, -1,
            "no first contact over " + text + " within " + std::to_string(config_.timeout_s) + " s"});
    }
    if (!met) sched_yield();
  }
}

// --- failures

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

// --- calls

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

// --- calls in two halves

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

// --- the end

void Group::abort(const std::string& message) {
  abort(Status{StatusCode::kTransport, static_cast<int>(config_.topology.rank), -1, -1, -1,
               "rank " + std::to_string(config_.topology.rank) + " gave up: " + message});
}

void Group::abort(const Status& status) {
  if (closed_) return;
  record(status);
  failure_raised_ = true;
}

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

GroupStats Group::stats() {
  GroupStats stats;
  {
    std::lock_guard lock(calls_mutex_);
    for (std::uint32_t p = 0; p < proto::kNumPhases; ++p) stats.phases[p] = phase_stats_[p];
  }
  if (!driver_) return stats;
  // The driver may still be posting the last call's chunks.
  bool settled = false;
  for (double begin = monotonic_s(); !settled && !failed_.load() && !closed_ && monotonic_s() - begin < 1;) {
    if (!driver_->try_step()) sched_yield();
    // Asked first: what is fed later would be neither here nor there.
    bool fed = !device_state_ || (device_state_->all_fed(Phase::kDispatch) && device_state_->all_fed(Phase::kCombine));
    driver_->inspect(
        [&](engine::Engine& engine) { settled = fed && !engine.has_pending_writes() && descriptors_->empty(); });
  }
  driver_->inspect([&](engine::Engine& engine) {
    for (std::uint32_t p = 0; p < proto::kNumPhases; ++p) stats.phases[p].wire_bytes = engine.stats().wire_bytes[p];
    stats.writes = engine.stats().writes;
    stats.nics = engine.stats().nics;
  });
  return stats;
}

GroupInfo Group::info() const {
  GroupInfo info;
  info.transport = rails_.empty() ? "shared memory" : rails_[0]->describe();
  info.layout = sizing_.layout;
  for (const auto& rail : rails_) info.nics.push_back(rail->describe());
  info.registered_bytes = sizing_.region_bytes;
  info.num_threads = static_cast<std::uint32_t>(pool_.width());
  if (device_) info.device = device_->facts().name;
  info.buffers = config_.buffers;
  info.flags = kernel_words_apart_ ? "device" : "host";
  return info;
}

}  // namespace moe_efa::runtime
