#include "kernels/device/dispatch_call.h"

#include <algorithm>

#include "kernels/device/plan_memory.h"

namespace moe_efa::kernels::device {

using proto::Phase;

namespace {

constexpr auto kPhase = Phase::kDispatch;
enum Grid : std::uint32_t { kPlanOrPack, kPull };

}  // namespace

DispatchCall::DispatchCall(const CallContext& context, State& state, const DispatchArgs& args,
                           const DispatchOptions& options)
    : context_(context),
      state_(state),
      phase_(state.phase(kPhase)),
      args_(args),
      options_(options),
      launch_(state.device(), kPhase, options.stream, options.alone),
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
  if (output_set_ && !launched_) {
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
  const State::SendScratch& scratch = state_.scratch();
  SendMemory memory = place_send(config, static_cast<std::byte*>(options_.send_memory));
  cuda::PlanArgs plan{};
  plan.config = config;
  plan.topk_idx = options_.topk_idx;
  plan.topk_weights = options_.topk_weights;
  plan.num_tokens = args_.plan->num_tokens;
  plan.num_nics = context_.num_nics;
  plan.send = memory.send;
  plan.row_token = memory.row_token;
  plan.entry_begin = scratch.entry_begin;
  plan.entries = scratch.entries;
  plan.expert_counts = scratch.expert_counts;
  plan.columns = scratch.columns;
  plan.watch = state_.watch(kPhase, kPlanOrPack);
  state_.device().launch(plan, launch_.stream());
  std::size_t views = config.num_nodes * sizeof(cuda::SendView);
  state_.device().copy(state_.sizes(), memory.send, views, launch_.stream());
  state_.device().copy(state_.sizes() + views, scratch.expert_counts,
                       std::size_t{state_.num_rings()} * config.experts_per_rank * 4, launch_.stream());
  launch_.mark_copies();  // the host goes on from here, while the first chunks are packed
  auto view = std::make_shared<cuda::PlanView>();
  view->num_tokens = args_.plan->num_tokens;
  view->num_nodes = config.num_nodes;
  view->send_chunks = cuda::most_send_chunks(config, args_.plan->num_tokens, context_.num_nics);
  view->send_chunk_rows = config.chunk_rows;
  view->send = memory.send;
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
  // Behind what the first launch has of the arguments, whose copy may not be done.
  cuda::PullArgs pull{};
  std::vector<cuda::RingCall> rings;
  for (std::uint32_t ring = 0; ring < num_rings; ++ring) rings.push_back({ring_seq_[ring], args_.wire_dtype});
  std::size_t used = aligned(sizeof(cuda::CallState)) + aligned(first_seq_.size() * 8);
  Upload upload(phase_.staging + used, phase_.arguments + used, phase_.arguments_bytes - used);
  pull.rings = upload.add(rings.data(), rings.size());
  if (!replay_) {
    const std::vector<std::uint32_t>& counts = rings_->expert_counts();
    std::vector<std::uint32_t> num_pulls = pulls_of_rings();
    Upload tables(phase_.staging + phase_.arguments_bytes, plan_memory_, phase_.staging_bytes - phase_.arguments_bytes);
    place_pulls(plan, config, view.topology.local_rank(), num_pulls.data(), plan_memory_, tables,
                plan.device_view.get());
    tables.queue(device, launch_.stream());
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
  pull.tokens_per_expert = upload.add(plan.tokens_per_expert.data(), plan.tokens_per_expert.size());
  pull.offsets = upload.add(plan.offsets.data(), plan.offsets.size());
  upload.queue(device, launch_.stream());
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
  device.launch(pull, sizes.pull_and_rest, rest ? &pack_ : nullptr, rest ? sizes.pack_rest : 0, launch_.stream());
  launch_.queued();
  for (SendPlan& send : plan.send) send.expert_counts = {};
  plan.complete = true;
  launched_ = true;
}

Waiting DispatchCall::waiting() const {
  if (!begun_) return {-1, -1, "for its own earlier writes to complete"};
  if (!announced_) return {-1, -1, "for its own stream to reach the call"};
  if (int absent = cpu::absent_rank(context_, own_); absent >= 0) return {absent, -1, "to enter the call", true};
  if (!sizes_known_) return {-1, -1, "for counts"};
  return {-1, -1, "for its kernels"};
}

}  // namespace moe_efa::kernels::device
