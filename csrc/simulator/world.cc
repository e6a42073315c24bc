#include "simulator/world.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <sstream>

#include "kernels/cpu/plan.h"

namespace moe_efa::simulator {

using kernels::cpu::CombineCall;
using kernels::cpu::DispatchCall;
using proto::DType;
using proto::Phase;

namespace {

constexpr std::uint64_t kMostTurns = 20'000'000;
constexpr std::uint64_t kAlign = 128;
constexpr std::uint64_t kLookAnyway = 16;  // turns after which the oracle looks even where nothing has moved

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

}  // namespace

// A call that was started, with the user's tensors, each its own allocation (I10).
struct World::Running {
  std::size_t number = 0;  // in the script
  std::unique_ptr<DispatchCall> dispatch;
  std::unique_ptr<CombineCall> combine;
  std::vector<std::byte> input, output;
  std::vector<float> weights, weight_grads, out_weights, out_scales, out_grads;
  bool output_given = false;

  kernels::Waiting waiting() const { return dispatch ? dispatch->waiting() : combine->waiting(); }
};

struct World::RankWorld {
  proto::Topology topology;
  proto::NodeView view;
  std::unique_ptr<engine::Engine> engine;
  std::vector<std::unique_ptr<SrdRail>> rails;
  std::unique_ptr<engine::DescriptorRing> descriptors;
  std::unique_ptr<transport::Pump> pump;
  std::unique_ptr<kernels::RankState> state;

  std::size_t next_call = 0, calls_done = 0;                       // of the script
  std::deque<std::unique_ptr<Running>> moving[proto::kNumPhases];  // started and not done
  std::vector<std::shared_ptr<kernels::Plan>> plans;

  std::deque<std::unique_ptr<Running>>& of(Phase phase) { return moving[static_cast<std::size_t>(phase)]; }
};

World::~World() = default;

World::World(const Profile& profile, std::uint64_t seed, std::uint32_t num_ranks, std::size_t trace_lines)
    : work_(make_workload(seed, num_ranks)),
      profile_(profile),
      trace_(trace_lines),
      reference_(work_),
      schedule_(seed, Stream::kSchedule) {
  const proto::RegionLayout layout(work_.layout, 0);
  for (std::uint32_t rank = 0; rank < work_.num_ranks; ++rank) {
    proto::RegionMemory memory;
    memory.bytes = layout.total_bytes();
    memory.slots_begin = layout.slots_begin();
    memory.region = allocate(work_.slots_apart ? memory.slots_begin : memory.bytes);
    std::memset(memory.region, 0, layout.flag_bytes());
    if (work_.slots_apart) {
      memory.slots = allocate(memory.bytes - memory.slots_begin);
      // The words that only kernels read as well; those of the region stay zero then, for which nobody waits.
      std::uint64_t begin = layout.kernel_words_begin(), bytes = layout.flag_bytes() - begin;
      std::byte* words = allocate(bytes);
      std::memset(words, 0, bytes);
      memory.kernel_words = words - begin;
    }
    regions_.push_back(memory);
    region_pointers_.push_back(memory.region);
    slot_bases_.push_back(memory.slot_base());
    kernel_word_bases_.push_back(memory.kernel_word_base());
  }
  oracle_ = std::make_unique<Oracle>(work_, profile_, regions_, trace_);
  NetworkConfig config;
  config.num_ranks = work_.num_ranks;
  config.node_size = work_.node_size;
  config.num_nics = work_.num_nics;
  config.seed = seed;
  config.max_inbound = engine::max_inbound_events(work_.layout);
  config.completion_queue = config.max_inbound + std::min(work_.max_writes_per_nic, profile_.send_queue_depth);
  network_ = std::make_unique<Network>(profile_, config, *oracle_);

  for (std::uint32_t r = 0; r < work_.num_ranks; ++r) {
    auto& rank = *ranks_.emplace_back(std::make_unique<RankWorld>());
    rank.topology = {work_.num_ranks, work_.node_size, r};
    std::uint32_t node = rank.topology.node();
    std::size_t first_mate = std::size_t{node} * work_.node_size;
    rank.view = {rank.topology, proto::RegionLayout(work_.layout, node), region_pointers_.data() + first_mate,
                 work_.slots_apart ? slot_bases_.data() + first_mate : nullptr, kernel_word_bases_.data() + first_mate};
    network_->attach(r, regions_[r]);
    rank.engine = std::make_unique<engine::Engine>(engine::EngineConfig{rank.topology, work_.layout, work_.num_nics,
                                                                        work_.max_writes_per_nic, rank.view.own(),
                                                                        rank.view.own_slots(), work_.reads_slots});
    std::vector<transport::Rail*> rails;
    for (std::uint32_t nic = 0; nic < work_.num_nics; ++nic) {
      rails.push_back(rank.rails.emplace_back(std::make_unique<SrdRail>(*network_, r, nic)).get());
    }
    rank.descriptors = std::make_unique<engine::DescriptorRing>(engine::max_descriptors(work_.layout));
    transport::PumpConfig pump;
    pump.writes_per_step = work_.writes_per_step;
    rank.pump = std::make_unique<transport::Pump>(*rank.engine, rank.view, rails, *rank.descriptors, pump);
    rank.state = std::make_unique<kernels::RankState>(rank.topology);
    rank.engine->on_hello_wanted();
    pace_sums_.push_back((r == 0 ? 0.0 : pace_sums_.back()) + work_.pace[r]);
    if (work_.pause_probability > 0 && schedule_.chance(work_.pause_probability)) {
      oracle_->set_asleep(r);
      network_->wake_later(r, schedule_.exponential(work_.pause_ns));
    }
  }
  if (profile_.lose_peer) {
    Rng fault(seed, Stream::kFault);
    victim_ = static_cast<std::uint32_t>(fault.below(work_.num_ranks));
    // Early as often as late.
    death_turn_ = static_cast<std::uint64_t>(std::exp(fault.uniform() * std::log(2000.0 * work_.num_ranks)));
  }
}

// Bytes that nobody has written yet, in an allocation of their own.
std::byte* World::allocate(std::uint64_t bytes) {
  std::byte* memory = memory_.emplace_back(bytes + kAlign, std::byte{0xEE}).data();
  return memory + (kAlign - reinterpret_cast<std::uintptr_t>(memory) % kAlign) % kAlign;
}

std::uint64_t World::epochs() const {
  std::uint64_t most = 0;
  for (const auto& rank : ranks_) most = std::max(most, rank->state->epoch[0] + rank->state->epoch[1]);
  return most;
}

bool World::finished() const {
  return std::all_of(ranks_.begin(), ranks_.end(), [&](const auto& rank) {
    return rank->calls_done == work_.script.size() || network_->dead(rank->topology.rank);
  });
}

bool World::pump_step(std::uint32_t r) {
  RankWorld& rank = *ranks_[r];
  if (network_->dead(r) || work_.num_nodes() == 1) return false;
  bool moved = rank.pump->step(static_cast<double>(network_->now_ns()) * 1e-9);
  if (moved || turns_ % kLookAnyway == 0) oracle_->after_pump(r);
  if (rank.engine->failed() && !profile_.lose_peer && oracle_->forged_target() != static_cast<std::int64_t>(r)) {
    throw Violation("engine of rank " + std::to_string(r) + " failed: " + rank.engine->failure().message);
  }
  return moved;
}

bool World::caller_step(std::uint32_t r) {
  RankWorld& rank = *ranks_[r];
  if (network_->dead(r) || rank.engine->failed() || oracle_->asleep(r)) return false;
  bool idle = rank.moving[0].empty() && rank.moving[1].empty();
  // A caller who starts several calls does so at any time; who makes one after the other draws nothing.
  if (may_start(rank) && (idle || schedule_.chance(0.3))) {
    start_call(rank);
    return true;
  }
  if (idle) return false;
  try {
    return step_calls(rank);
  } catch (const common::StatusError& error) {
    // Where engines read no headers, a forged one is left to whoever uses the chunk first.
    if (work_.reads_slots || oracle_->forged_target() < 0) throw;
    refused_ = error.status();
    return true;
  }
}

bool World::step_calls(RankWorld& rank) {
  bool both = !rank.moving[0].empty() && !rank.moving[1].empty();
  both_phases_ += both;
  auto first = static_cast<std::uint32_t>(both ? schedule_.below(2) : rank.moving[0].empty());
  bool moved = step_call(rank, static_cast<Phase>(first));
  return (both && step_call(rank, static_cast<Phase>(1 - first))) || moved;
}

// In the script's order; a plan is there once its dispatch is done.
bool World::may_start(const RankWorld& rank) const {
  if (rank.next_call == work_.script.size() || !rank.engine->all_hellos()) return false;
  if (rank.next_call - rank.calls_done >= work_.calls_ahead) return false;
  const ScriptCall& call = work_.script[rank.next_call];
  return call.kind == ScriptCall::Kind::kDispatch || (call.plan < rank.plans.size() && rank.plans[call.plan]->complete);
}

bool World::step_call(RankWorld& rank, Phase phase) {
  std::uint32_t r = rank.topology.rank;
  Running& running = *rank.of(phase).front();
  bool moved;
  if (phase == Phase::kDispatch) {
    moved = running.dispatch->step();
    if (moved || turns_ % kLookAnyway == 0) oracle_->after_caller(r);
    if (running.dispatch->sizes_known() && !running.output_given) {
      oracle_->check_counts_ready(r, Phase::kDispatch, running.dispatch->epoch());
      const ScriptCall& call = work_.script[running.number];
      const kernels::Plan& plan = *rank.plans[call.plan];
      auto rows = static_cast<std::size_t>(plan.rows());
      DType out_dtype = call.fp8_output ? DType::kFp8 : call.user_dtype;
      running.output.assign(rows * work_.layout.hidden_size * proto::dtype_bytes(out_dtype), std::byte{0xCD});
      running.out_weights.assign(rows, -12345.0f);
      running.out_scales.assign(call.fp8_output ? rows * proto::fp8_blocks(work_.layout.hidden_size) : 0, -12345.0f);
      bool replay = call.kind == ScriptCall::Kind::kReplay;
      running.dispatch->set_output(
          {running.output.data(), replay ? nullptr : running.out_weights.data(), running.out_scales.data()});
      running.output_given = moved = true;
    }
    if (!running.dispatch->done()) return moved;
  } else {
    moved = running.combine->step();
    if (moved || turns_ % kLookAnyway == 0) oracle_->after_caller(r);
    if (!running.combine->done()) return moved;
  }
  std::unique_ptr<Running> done = std::move(rank.of(phase).front());
  rank.of(phase).pop_front();
  finish_call(rank, *done);
  return true;
}

void World::start_call(RankWorld& rank) {
  auto running = std::make_unique<Running>();
  running->number = rank.next_call++;
  const ScriptCall& call = work_.script[running->number];
  std::uint32_t r = rank.topology.rank;
  const Routing& routing = work_.routing(call, r);
  kernels::CallContext context{rank.view, *rank.state, work_.num_nodes() > 1 ? rank.descriptors.get() : nullptr,
                               executor_, work_.num_nics};
  trace_.add(r, "enters call", static_cast<std::int64_t>(running->number));
  if (call.kind == ScriptCall::Kind::kCombine) {
    Reference::CombineInput input = reference_.combine_input(running->number, r);
    running->input = std::move(input.y);
    running->weights = std::move(input.weights);
    running->weight_grads = std::move(input.weight_grads);
    running->output.assign(
        std::size_t{routing.num_tokens} * work_.layout.hidden_size * proto::dtype_bytes(call.user_dtype),
        std::byte{0xCD});
    running->out_grads.assign(std::size_t{routing.num_tokens} * work_.layout.top_k, -12345.0f);
    // A rank without rows still takes part: its pointers must not decide what the call is.
    static const float kNone = 0;
    kernels::CombineArgs args;
    args.y = running->input.data();
    args.y_dtype = call.user_dtype;
    args.wire_dtype = call.wire_dtype;
    args.plan = rank.plans[call.plan];
    if (call.weighted) args.weights = running->weights.empty() ? &kNone : running->weights.data();
    if (call.weight_grads) args.weight_grads = running->weight_grads.empty() ? &kNone : running->weight_grads.data();
    args.out = running->output.data();
    args.topk_weight_grads = call.weight_grads ? running->out_grads.data() : nullptr;
    running->combine = std::make_unique<CombineCall>(context, args);
    rank.of(Phase::kCombine).push_back(std::move(running));
    return;
  }
  if (call.kind == ScriptCall::Kind::kDispatch) {
    kernels::cpu::PlanArgs plan;
    plan.topk_idx = routing.topk_idx.data();
    plan.topk_weights = routing.topk_weights.data();
    plan.num_tokens = routing.num_tokens;
    plan.expert_alignment = work_.alignment(r);
    if (work_.is_static(call.plan)) plan.capacity = work_.capacities[call.plan][r];
    plan.num_nics = work_.num_nics;
    rank.plans.push_back(kernels::cpu::build_send_plan(plan, rank.view));
  }
  running->input =
      random_rows(work_.seed, running->number, r, routing.num_tokens, work_.layout.hidden_size, call.user_dtype);
  kernels::DispatchArgs args{running->input.data(), call.user_dtype, call.wire_dtype,
                             call.fp8_output ? DType::kFp8 : call.user_dtype, rank.plans[call.plan]};
  running->dispatch = std::make_unique<DispatchCall>(context, args);
  rank.of(Phase::kDispatch).push_back(std::move(running));
}

void World::finish_call(RankWorld& rank, const Running& running) {
  trace_.add(rank.topology.rank, "leaves call", static_cast<std::int64_t>(running.number));
  running.dispatch ? check_dispatch(rank, running) : check_combine(rank, running);
  ++rank.calls_done;
  if (work_.pause_probability > 0 && schedule_.chance(work_.pause_probability)) {
    oracle_->set_asleep(rank.topology.rank);
    network_->wake_later(rank.topology.rank, schedule_.exponential(work_.pause_ns));
  }
}

void World::check_dispatch(const RankWorld& rank, const Running& running) const {
  const ScriptCall& call = work_.script[running.number];
  const kernels::Plan& plan = *rank.plans[call.plan];
  const RankRows& rows = reference_.rows(call.plan, rank.topology.rank);
  auto name = [&] {
    return "rank " + std::to_string(rank.topology.rank) + ", call " + std::to_string(running.number) + ": ";
  };
  if (plan.tokens_per_expert != rows.tokens_per_expert || plan.offsets != rows.offsets) {
    throw Violation("I3: " + name() + "expert counts or offsets differ from the reference");
  }
  Reference::Dispatched expected = reference_.dispatched(running.number, rank.topology.rank);
  if (running.output != expected.x) throw Violation("I3: " + name() + "dispatched rows differ from the reference");
  if (!same_bits(running.out_scales, expected.scales)) {
    throw Violation("I3: " + name() + "dispatched scales differ from the reference");
  }
  if (call.kind == ScriptCall::Kind::kDispatch && !same_bits(running.out_weights, expected.weights)) {
    throw Violation("I3: " + name() + "dispatched weights differ from the reference");
  }
  if (!plan.is_static()) return;
  // A replay may come after a combine, which has told the rest.
  bool told = call.kind == ScriptCall::Kind::kReplay && *plan.overflow == rows.overflow;
  if (!told && *plan.overflow != rows.own_overflow) throw Violation("I3: " + name() + "overflow of the own experts");
}

void World::check_combine(const RankWorld& rank, const Running& running) const {
  const ScriptCall& call = work_.script[running.number];
  Reference::Combined expected = reference_.combined(running.number, rank.topology.rank);
  auto name = [&] {
    return "rank " + std::to_string(rank.topology.rank) + ", call " + std::to_string(running.number) + ": ";
  };
  if (running.output != expected.out) throw Violation("I3: " + name() + "combined rows differ from the reference");
  if (call.weight_grads && !same_bits(running.out_grads, expected.topk_weight_grads)) {
    throw Violation("I3: " + name() + "gradients of the weights differ from the reference");
  }
  const kernels::Plan& plan = *rank.plans[call.plan];
  std::int64_t overflow = reference_.rows(call.plan, rank.topology.rank).overflow;
  if (plan.is_static() && *plan.overflow != overflow) {
    throw Violation("I3: " + name() + "overflow " + std::to_string(*plan.overflow) + " where " +
                    std::to_string(overflow) + " rows were needed");
  }
}

bool World::turn() {
  ++turns_;
  trace_.set_time(network_->now_ns());
  if (turns_ > kMostTurns) throw Violation("I5: no end after " + std::to_string(kMostTurns) + " turns");
  if (turns_ == death_turn_) {
    trace_.add(victim_, "dies");
    network_->kill(victim_);
  }
  // Once nobody has anything to do, time passes. A landed piece shows nobody anything yet.
  bool let_pass = idle_turns_ > 3ull * work_.num_ranks || schedule_.chance(work_.event_share);
  if (let_pass && !network_->empty()) return network_->step();
  double at = schedule_.uniform() * pace_sums_.back();
  auto rank =
      static_cast<std::uint32_t>(std::upper_bound(pace_sums_.begin(), pace_sums_.end(), at) - pace_sums_.begin());
  rank = std::min(rank, work_.num_ranks - 1);
  return schedule_.chance(0.5) ? caller_step(rank) : pump_step(rank);
}

bool World::settle() {
  bool ever = false;
  for (bool moved = true; moved; ever |= moved) {
    std::uint64_t refusals = network_->refusals();
    moved = !network_->empty();
    network_->step();
    for (std::uint32_t rank = 0; rank < work_.num_ranks; ++rank) {
      moved |= caller_step(rank);
      moved |= pump_step(rank);
    }
    // A burst of EAGAIN ends by itself; a rank that sleeps is woken by the network.
    moved |= network_->refusals() != refusals || !network_->empty();
    if (++turns_ > kMostTurns) throw Violation("I5: no end after " + std::to_string(kMostTurns) + " turns");
  }
  return ever;
}

void World::run() {
  while (!finished()) {
    if (turn()) {
      idle_turns_ = 0;
    } else if (++idle_turns_ > 200ull * work_.num_ranks + 1000) {
      if (!settle()) break;
      idle_turns_ = 0;
    }
    if (oracle_->forged_target() < 0) continue;
    if (!refused_.ok() || ranks_[static_cast<std::size_t>(oracle_->forged_target())]->engine->failed()) {
      return after_forgery();
    }
  }
  if (finished() && oracle_->forged_target() >= 0) throw Violation("I4: nobody noticed a forged epoch");
  if (profile_.lose_peer && network_->dead(victim_)) return after_loss();
  if (!finished()) deadlock();
  come_to_rest();
}

void World::come_to_rest() {
  settle();
  if (!network_->quiet()) throw Violation("I13: the network does not come to rest");
  std::vector<std::uint64_t> epochs[proto::kNumPhases];
  for (const auto& rank : ranks_) {
    if (work_.num_nodes() > 1 && !rank->engine->idle()) {
      throw Violation("I13: rank " + std::to_string(rank->topology.rank) + " keeps writes back");
    }
    for (std::size_t phase = 0; phase < proto::kNumPhases; ++phase) epochs[phase].push_back(rank->state->epoch[phase]);
  }
  oracle_->check_drained(epochs);
}

void World::after_loss() {
  // Outputs were compared as calls ended. A control channel, not simulated here, tells everybody in the end.
  settle();
  for (const auto& rank : ranks_) {
    if (rank->topology.rank == victim_) continue;
    const common::Status failure = rank->engine->failure();
    if (!failure.ok() && failure.rank != static_cast<int>(victim_)) {
      throw Violation("I6: rank " + std::to_string(rank->topology.rank) + " blames rank " +
                      std::to_string(failure.rank) + " where rank " + std::to_string(victim_) +
                      " died: " + failure.message);
    }
    rank->engine->on_failure({common::StatusCode::kPeerLost, static_cast<int>(victim_), -1, -1, -1, "lost"});
    if (rank->engine->failure().rank != static_cast<int>(victim_)) throw Violation("I6: the first error did not win");
    if (pump_step(rank->topology.rank)) throw Violation("I6: a failed engine went on");
  }
}

void World::after_forgery() {
  auto target = static_cast<std::uint32_t>(oracle_->forged_target());
  const common::Status& failure = refused_.ok() ? ranks_[target]->engine->failure() : refused_;
  if (failure.code != common::StatusCode::kProtocol || failure.rank != oracle_->forged_source()) {
    throw Violation("I4: a forged epoch was reported as: " + failure.message);
  }
}

void World::deadlock() const {
  std::ostringstream text;
  text << "I5: deadlock";
  for (const auto& rank : ranks_) {
    if (rank->calls_done == work_.script.size()) continue;
    text << "; rank " << rank->topology.rank << " has done " << rank->calls_done << " calls";
    if (rank->moving[0].empty() && rank->moving[1].empty()) text << " and has not begun the next";
    for (const auto& moving : rank->moving) {
      if (moving.empty()) continue;
      kernels::Waiting waiting = moving.front()->waiting();
      text << ", waits in call " << moving.front()->number;
      if (waiting.rank >= 0) text << " for rank " << waiting.rank;
      text << " " << waiting.what;
      if (waiting.chunk >= 0) text << " " << waiting.chunk;
    }
  }
  throw Violation(text.str());
}

}  // namespace moe_efa::simulator
