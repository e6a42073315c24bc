#include "kernels/device/dispatch_call.h"

#include <algorithm>

#include "kernels/device/plan_memory.h"

namespace moe_efa::kernels::device {

using proto::Phase;

namespace {

constexpr auto kPhase = Phase::kDispatch;
enum Grid : std::uint32_t { kPlanOrPack, kPull };

// The arguments of the first launch: a call's numbers, then, of a recording, what pack is to do. Those of the second
// are behind them, since the copy of the first may not be done when they are written.
struct FirstArguments {
  FirstArguments(const proto::LayoutConfig& config, bool recorded)
      : pack_at(aligned(sizeof(cuda::CallState)) + aligned(config.num_nodes * 8)),
        end(pack_at + (recorded ? aligned(sizeof(cuda::PackArgs)) : 0)) {}
  std::size_t pack_at, end;
};

cuda::PlanArgs plan_args(State& state, const DispatchArgs& args, const DispatchOptions& options,
                         std::uint32_t num_nics) {
  const proto::LayoutConfig& config = state.view().layout.config();
  const State::SendScratch& scratch = state.scratch();
  SendMemory memory = place_send(config, static_cast<std::byte*>(options.send_memory));
  cuda::PlanArgs plan{};
  plan.config = config;
  plan.topk_idx = options.topk_idx;
  plan.topk_weights = options.topk_weights;
  plan.num_tokens = args.plan->num_tokens;
  plan.num_nics = num_nics;
  plan.send = memory.send;
  plan.row_token = memory.row_token;
  plan.entry_begin = scratch.entry_begin;
  plan.entries = scratch.entries;
  plan.expert_counts = scratch.expert_counts;
  plan.columns = scratch.columns;
  plan.watch = state.watch(kPhase, kPlanOrPack);
  return plan;
}

// What of a plan comes back to the host.
struct Sizes {
  Sizes(State& state, const cuda::PlanArgs& plan)
      : views{state.sizes(), plan.send, static_cast<std::uint32_t>(plan.config.num_nodes * sizeof(cuda::SendView))},
        counts{state.sizes() + views.bytes, plan.expert_counts, state.num_rings() * plan.config.experts_per_rank * 4} {}
  cuda::GateCopy views, counts;
};

}  // namespace

DispatchCall::DispatchCall(const CallContext& context, State& state, const DispatchArgs& args,
                           const DispatchOptions& options)
    : context_(context),
      state_(state),
      phase_(state.phase(kPhase)),
      args_(args),
      options_(options),
      launch_(state.device(), kPhase, options.stream, options.alone, options.recording),
      replay_(args.plan->complete) {
  own_ = cpu::next_dispatch(context_.state, args_);
  rings_.emplace(context_, own_, *args_.plan);
}

bool DispatchCall::step() {
  if (done_) return false;
  state_.check(kPhase);
  if (!begun_) return begin();
  if (!announced_) return read_send_sizes();
  bool moved = state_.feed(context_.descriptors);
  if (!rings_->complete() && rings_->step(context_, own_, *args_.plan)) {
    moved = true;
    if (rings_->complete() && !sizes_known_) {
      rings_->size_plan(context_, own_, *args_.plan);
      sizes_known_ = true;
    }
  }
  if (sizes_known_ && output_set_ && !launched_) {
    queue_pull();
    return true;
  }
  if (launched_ && rings_->complete() && launch_.quiet() && state_.all_fed(kPhase)) {
    state_.check(kPhase);
    done_ = true;
    return true;
  }
  return moved;
}

bool DispatchCall::begin() {
  if (!cpu::may_begin(context_, own_)) return false;
  begun_ = true;
  first_seq_ = context_.state.dispatch_sent;
  ring_seq_ = context_.state.dispatch_seen;
  launch_.enter();
  if (replay_) {
    announce_call();
    sizes_known_ = true;
  } else {
    queue_plan();
  }
  queue_first_pack();
  return true;
}

void DispatchCall::queue_plan() {
  const proto::LayoutConfig& config = context_.view.layout.config();
  cuda::PlanArgs plan = plan_args(state_, args_, options_, context_.num_nics);
  if (launch_.recording() == nullptr) {
    state_.device().launch(plan, launch_.stream());
    Sizes sizes(state_, plan);
    for (const cuda::GateCopy& copy : {sizes.views, sizes.counts}) {
      state_.device().copy(copy.to, copy.from, copy.bytes, launch_.stream());
    }
    launch_.mark_copies();  // the host goes on from here, while the first chunks are packed
  }
  auto view = std::make_shared<cuda::PlanView>();
  view->num_tokens = args_.plan->num_tokens;
  view->num_nodes = config.num_nodes;
  view->send_chunks = cuda::most_send_chunks(config, args_.plan->num_tokens, context_.num_nics);
  view->send_chunk_rows = config.chunk_rows;
  view->send = plan.send;
  args_.plan->device_view = std::move(view);
}

void DispatchCall::queue_first_pack() {
  const proto::LayoutConfig& config = context_.view.layout.config();
  cuda::CallState call{own_.epoch, own_.plan_id};
  Upload upload(phase_.staging, phase_.arguments, phase_.arguments_bytes);
  pack_.view = state_.view();
  pack_.plan = *args_.plan->device_view;
  pack_.x = args_.x;
  pack_.x_dtype = args_.x_dtype;
  pack_.wire_dtype = args_.wire_dtype;
  pack_.replay = replay_;
  pack_.chunk_end = std::min(config.slots, config.own_slots);
  pack_.call = upload.add(&call, 1);
  pack_.first_seq = upload.add(first_seq_.data(), first_seq_.size());
  pack_.arrivals = phase_.words;
  pack_.ready = phase_.ready_words;
  pack_.watch = state_.watch(kPhase, kPlanOrPack);
  if (launch_.recording() != nullptr) {
    upload.add(&pack_, 1);
    return launch_.recording()->open(Recording::kEnter);
  }
  upload.queue(state_.device(), launch_.stream());
  state_.device().launch(pack_, state_.grids(launch_.alone()).pack, launch_.stream());
  launch_.queued();
}

// What plan has found, for the announcement.
bool DispatchCall::read_send_sizes() {
  if (!launch_.copies_arrived()) return false;
  state_.check(kPhase);
  const proto::LayoutConfig& config = context_.view.layout.config();
  std::uint32_t nodes = config.num_nodes, experts = config.experts_per_rank * config.node_size;
  const auto* send = reinterpret_cast<const cuda::SendView*>(state_.sizes());
  const auto* counts = reinterpret_cast<const std::uint32_t*>(send + nodes);
  for (std::uint32_t node = 0; node < nodes; ++node) {
    args_.plan->send[node].facts = send[node].facts;
    args_.plan->send[node].expert_counts.assign(counts + node * experts, counts + (node + 1) * experts);
  }
  announce_call();
  return true;
}

void DispatchCall::announce_call() {
  std::vector<const RingFacts*> facts;
  std::vector<const std::vector<std::uint32_t>*> counts;
  std::vector<Sending> sending;
  for (std::uint32_t node = 0; node < args_.plan->send.size(); ++node) {
    const SendPlan& send = args_.plan->send[node];
    facts.push_back(&send.facts);
    counts.push_back(&send.expert_counts);
    context_.state.dispatch_sent[node] += send.facts.num_chunks;
    if (node != context_.view.topology.node()) sending.push_back({node, first_seq_[node], send.facts.num_chunks});
  }
  state_.send(kPhase, own_.epoch, sending, [&] {
    cpu::announce(context_, own_, facts.data(), first_seq_.data(), replay_ ? nullptr : counts.data());
  });
  announced_ = true;
}

std::size_t DispatchCall::plan_bytes() const {
  if (replay_) return 0;
  const proto::NodeView& view = context_.view;
  return pull_bytes(*args_.plan, view.layout.config(), view.topology.local_rank());
}

void DispatchCall::set_output(const DispatchOutput& output, void* plan_memory) {
  output_ = output;
  plan_memory_ = static_cast<std::byte*>(plan_memory);
  output_set_ = true;
}

// [ring]: rows for this rank's experts that it has room for.
std::vector<std::uint32_t> DispatchCall::pulls_of_rings() const {
  const proto::NodeView& view = context_.view;
  const proto::LayoutConfig& config = view.layout.config();
  std::vector<std::uint32_t> pulls(state_.num_rings());
  for (std::uint32_t rank = 0; rank < view.topology.num_ranks; ++rank) {
    std::uint32_t& of_ring = pulls[rank % config.node_size * config.num_nodes + rank / config.node_size];
    for (std::uint32_t i = 0; i < config.experts_per_rank; ++i) {
      std::size_t at = std::size_t{rank} * config.experts_per_rank + i;
      std::int64_t room = std::max<std::int64_t>(0, args_.plan->usable_rows() - rings_->expert_base()[at]);
      of_ring += static_cast<std::uint32_t>(std::min<std::int64_t>(room, rings_->expert_counts()[at]));
    }
  }
  return pulls;
}

// What this rank forwards, its mates may have no room for.
void DispatchCall::upload_losses(Upload& upload, cuda::PullArgs& pull) const {
  const cpu::StaticSizes* sizes = rings_->static_sizes();
  if (sizes == nullptr || !sizes->any_lost()) return;
  const proto::LayoutConfig& config = context_.view.layout.config();
  std::vector<std::uint32_t> room;
  std::vector<std::uint64_t> required;
  for (std::uint32_t node = 0; node < config.num_nodes; ++node) {
    for (std::uint32_t expert = 0; expert < config.experts_per_rank * config.node_size; ++expert) {
      room.push_back(sizes->room(node, expert));
    }
  }
  for (std::uint32_t mate = 0; mate < config.node_size; ++mate) required.push_back(sizes->required(mate));
  pull.room = upload.add(room.data(), room.size());
  pull.required = upload.add(required.data(), required.size());
}

void DispatchCall::queue_pull() {
  const proto::NodeView& view = context_.view;
  const proto::LayoutConfig& config = view.layout.config();
  Plan& plan = *args_.plan;
  std::uint32_t nodes = config.num_nodes, num_rings = state_.num_rings();
  Device& device = state_.device();
  Recording* recording = launch_.recording();
  cuda::PullArgs pull{};
  std::vector<cuda::RingCall> rings;
  for (std::uint32_t ring = 0; ring < num_rings; ++ring) rings.push_back({ring_seq_[ring], args_.wire_dtype});
  std::size_t used = FirstArguments(config, recording != nullptr).end;
  Upload upload(phase_.staging + used, phase_.arguments + used, phase_.arguments_bytes - used);
  // Of a recording, where its gate expects them.
  cuda::RecordedPull *recorded = nullptr, *placed = nullptr;
  if (recording != nullptr) recorded = upload.add<cuda::RecordedPull>(1, &placed);
  pull.tokens_per_expert = upload.add(plan.tokens_per_expert.data(), plan.tokens_per_expert.size());
  pull.offsets = upload.add(plan.offsets.data(), plan.offsets.size());
  if (recording != nullptr) {
    std::int32_t* narrow_placed;
    std::int32_t* narrow = upload.add<std::int32_t>(plan.offsets.size(), &narrow_placed);
    std::transform(plan.offsets.begin(), plan.offsets.end(), narrow,
                   [](std::int64_t offset) { return static_cast<std::int32_t>(offset); });
  }
  pull.rings = upload.add(rings.data(), rings.size());
  if (!replay_) {
    const std::vector<std::uint32_t>& counts = rings_->expert_counts();
    std::vector<std::uint32_t> num_pulls = pulls_of_rings();
    Upload tables(phase_.staging + phase_.arguments_bytes, plan_memory_, phase_.staging_bytes - phase_.arguments_bytes);
    place_pulls(plan, config, view.topology.local_rank(), num_pulls.data(), plan_memory_, tables,
                plan.device_view.get());
    if (recording == nullptr) tables.queue(device, launch_.stream());
    pull.expert_counts = upload.add(counts.data(), counts.size());
    pull.expert_base = upload.add(rings_->expert_base().data(), counts.size());
    upload_losses(upload, pull);
    // The bound that the first launch had to take has done its work.
    plan.device_view->send_chunks = plan.device_view->send_chunk_rows = 0;
    for (const SendPlan& send : plan.send) {
      plan.device_view->send_chunks = std::max(plan.device_view->send_chunks, send.facts.num_chunks);
      plan.device_view->send_chunk_rows =
          std::max(plan.device_view->send_chunk_rows, std::min(send.facts.rows, send.facts.rows_per_chunk));
    }
  }
  pull.view = state_.view();
  pull.plan = *plan.device_view;
  pull.out_dtype = args_.out_dtype;
  pull.replay = replay_;
  pull.num_rows = plan.rows();
  pull.usable_rows = plan.usable_rows();
  pull.call = pack_.call;
  pull.x = output_.x;
  pull.weights = output_.weights;
  pull.scales = output_.scales;
  std::uint32_t* words = phase_.words + std::size_t{nodes} * state_.most_chunks();
  pull.arrivals = words;
  pull.pulled = words + std::size_t{num_rings} * state_.most_chunks();
  pull.watch = state_.watch(kPhase, kPull);

  GridSizes sizes = state_.grids(launch_.alone());
  pack_.plan = *plan.device_view;
  pack_.chunk_begin = pack_.chunk_end;
  pack_.chunk_end = ~0u;
  bool rest = pack_.chunk_begin < pack_.plan.send_chunks;
  if (recording != nullptr) {
    *recorded = {pull, pack_};
    recording->open(Recording::kPlace);
  } else {
    upload.queue(device, launch_.stream());
    device.launch(pull, sizes.pull_and_rest, rest ? &pack_ : nullptr, rest ? sizes.pack_rest : 0, launch_.stream());
    launch_.queued();
  }
  for (SendPlan& send : plan.send) send.expert_counts = {};
  plan.complete = true;
  launched_ = true;
}

void record_dispatch(State& state, const Recording& recording, const DispatchArgs& args, const DispatchOptions& options,
                     void* plan_memory, const RecordedTables& tables, std::uint32_t num_nics) {
  const proto::LayoutConfig& config = state.view().layout.config();
  const PhaseState& phase = state.phase(kPhase);
  Device& device = state.device();
  FirstArguments first(config, true);
  GridSizes grids = state.grids(true);
  bool fresh = options.send_memory != nullptr;

  cuda::GateArgs enter = recording.gate(Recording::kEnter, true);
  enter.after[0] = {phase.arguments, phase.staging, static_cast<std::uint32_t>(first.end)};
  recording.queue(enter);
  if (fresh) {
    cuda::PlanArgs plan = plan_args(state, args, options, num_nics);
    plan.recorded = true;
    device.launch(plan, recording.stream());
    Sizes found(state, plan);
    cuda::GateArgs sizes = recording.gate(Recording::kSizes, false);
    sizes.before[0] = found.views;
    sizes.before[1] = found.counts;
    recording.queue(sizes);
  }
  device.launch(reinterpret_cast<const cuda::PackArgs*>(phase.arguments + first.pack_at),
                state.watch(kPhase, kPlanOrPack), grids.pack, recording.stream());

  cuda::GateArgs place = recording.gate(Recording::kPlace, true);
  place.after[0] = {phase.arguments + first.end, phase.staging + first.end,
                    static_cast<std::uint32_t>(phase.arguments_bytes - first.end)};
  if (fresh) {
    std::size_t counts_at = first.end + aligned(sizeof(cuda::RecordedPull));
    std::size_t offsets_at =
        counts_at + aligned(config.experts_per_rank * 8) + aligned((config.experts_per_rank + 1) * 8);
    place.after[1] = {plan_memory, phase.staging + phase.arguments_bytes,
                      static_cast<std::uint32_t>(table_bytes(config))};
    place.after[2] = {tables.counts, phase.staging + counts_at, config.experts_per_rank * 8};
    place.after[3] = {tables.offsets, phase.staging + offsets_at, (config.experts_per_rank + 1) * 4};
  }
  recording.queue(place);
  device.launch(reinterpret_cast<const cuda::RecordedPull*>(phase.arguments + first.end), state.watch(kPhase, kPull),
                grids.pull_and_rest, grids.pack_rest, recording.stream());
  recording.queue(recording.gate(Recording::kEnd, false));
}

Waiting DispatchCall::waiting() const {
  if (!begun_) return {-1, -1, "for its own earlier writes to complete"};
  if (!announced_) return {-1, -1, "for its own stream to reach the call"};
  if (int absent = cpu::absent_rank(context_, own_); absent >= 0) return {absent, -1, "to enter the call", true};
  if (!sizes_known_) return {-1, -1, "for counts"};
  return {-1, -1, "for its kernels"};
}

}  // namespace moe_efa::kernels::device
