#include "kernels/device/combine_call.h"

#include <algorithm>

#include "common/status.h"

namespace moe_efa::kernels::device {

using proto::Phase;

namespace {

constexpr auto kPhase = Phase::kCombine;

}  // namespace

CombineCall::CombineCall(const CallContext& context, State& state, const CombineArgs& args, Device::Stream stream,
                         bool alone, Recording* recording)
    : context_(context),
      state_(state),
      phase_(state.phase(kPhase)),
      args_(args),
      launch_(state.device(), kPhase, stream, alone, recording) {
  const proto::LayoutConfig& config = context_.view.layout.config();
  announced_.assign(config.node_size + config.num_nodes, false);
  own_ = cpu::next_combine(context_.state, args_);
}

bool CombineCall::step() {
  if (done_) return false;
  state_.check(kPhase);
  if (!begun_) return begin();
  bool moved = state_.feed(context_.descriptors);
  moved |= step_announcements();
  if (!std::all_of(announced_.begin(), announced_.end(), [](bool announced) { return announced; })) return moved;
  if (!launch_.quiet() || !state_.all_fed(kPhase)) return moved;
  state_.check(kPhase);
  done_ = true;
  return true;
}

bool CombineCall::begin() {
  if (!cpu::may_begin(context_, own_)) return false;
  const proto::NodeView& view = context_.view;
  const Plan& plan = *args_.plan;
  std::uint32_t nodes = view.topology.num_nodes();
  std::size_t own_rings = std::size_t{view.topology.local_rank()} * nodes;
  publish_seq_ = context_.state.combine_seen;
  receive_seq_ = context_.state.combine_received;
  for (std::size_t ring = 0; ring < plan.rings.size(); ++ring) {
    context_.state.combine_seen[ring] += plan.rings[ring].num_chunks;
  }
  std::vector<Sending> sending;
  std::vector<const RingFacts*> facts;  // of what this rank will forward to each of its rail peers
  for (std::uint32_t node = 0; node < nodes; ++node) {
    facts.push_back(&plan.rings[own_rings + node]);
    context_.state.combine_received[node] += plan.send[node].facts.num_chunks;
    if (node != view.topology.node()) {
      sending.push_back({node, publish_seq_[own_rings + node], facts.back()->num_chunks});
    }
  }
  queue();
  state_.send(kPhase, own_.epoch, sending,
              [&] { cpu::announce(context_, own_, facts.data(), publish_seq_.data() + own_rings, nullptr); });
  begun_ = true;
  return true;
}

void CombineCall::queue() {
  const proto::LayoutConfig& config = context_.view.layout.config();
  std::size_t num_rings = state_.num_rings(), most = state_.most_chunks();
  cuda::CallState call{own_.epoch, own_.plan_id};
  Upload upload(phase_.staging, phase_.arguments, phase_.arguments_bytes);
  Recording* recording = launch_.recording();
  cuda::CombineArgs combine{}, *recorded = nullptr, *placed = nullptr;
  if (recording != nullptr) recorded = upload.add<cuda::CombineArgs>(1, &placed);
  combine.view = state_.view();
  combine.plan = *args_.plan->device_view;
  combine.y = args_.y;
  combine.y_dtype = args_.y_dtype;
  combine.wire_dtype = args_.wire_dtype;
  combine.weights = args_.weights;
  combine.weight_grads = args_.weight_grads;
  combine.out = args_.out;
  combine.topk_weight_grads = args_.topk_weight_grads;
  combine.call = upload.add(&call, 1);
  combine.publish_seq = upload.add(publish_seq_.data(), publish_seq_.size());
  combine.receive_seq = upload.add(receive_seq_.data(), receive_seq_.size());
  combine.send_arrivals = phase_.words;
  combine.ring_arrivals = phase_.words + config.num_nodes * most;
  combine.next = combine.ring_arrivals + num_rings * most;
  combine.ready = phase_.ready_words;
  combine.grids = phase_.grids;
  combine.watch = state_.watch(kPhase, 0);
  if (recording != nullptr) {
    *recorded = combine;
    return recording->open(Recording::kEnter);
  }
  launch_.enter();
  upload.queue(state_.device(), launch_.stream());
  state_.device().launch(combine, state_.grids(launch_.alone()).combine, launch_.stream());
  launch_.queued();
}

void record_combine(State& state, const Recording& recording) {
  const PhaseState& phase = state.phase(kPhase);
  cuda::GateArgs enter = recording.gate(Recording::kEnter, true);
  enter.after[0] = {phase.arguments, phase.staging, static_cast<std::uint32_t>(phase.arguments_bytes)};
  recording.queue(enter);
  state.device().launch(reinterpret_cast<const cuda::CombineArgs*>(phase.arguments), state.watch(kPhase, 0),
                        state.grids(true).combine, recording.stream());
  recording.queue(recording.gate(Recording::kEnd, false));
}

// Everyone this rank exchanges anything with has entered the same call (I14).
bool CombineCall::step_announcements() {
  const proto::NodeView& view = context_.view;
  std::uint32_t mates = view.topology.node_size, nodes = view.topology.num_nodes();
  bool moved = false, all = true;
  for (std::uint32_t i = 0; i < mates + nodes; ++i) {
    if (announced_[i]) continue;
    std::uint32_t board = i < mates ? i : view.topology.local_rank();
    std::uint32_t node = i < mates ? view.topology.node() : i - mates;
    proto::CountsRecord record;
    if (!cpu::read_announcement(context_, own_, board, node, &record)) {
      all = false;
      continue;
    }
    announced_[i] = moved = true;
    if (board != view.topology.local_rank()) continue;
    RingFacts facts{record.rows, record.rows_per_chunk, record.num_chunks};
    if (facts == args_.plan->send[node].facts && record.first_seq == receive_seq_[node]) continue;
    auto rank = static_cast<int>(view.topology.rank_of(node, board));
    throw common::StatusError({common::StatusCode::kProtocol, rank, static_cast<int>(kPhase),
                               static_cast<std::int64_t>(own_.epoch), -1,
                               "rank " + std::to_string(rank) + " returns other rows than were sent to its node"});
  }
  if (!all && !moved) cpu::check_other_phase(context_, own_);
  return moved;
}

Waiting CombineCall::waiting() const {
  if (!begun_) return {-1, -1, "for its own earlier writes to complete"};
  if (int absent = cpu::absent_rank(context_, own_); absent >= 0) return {absent, -1, "to enter the call", true};
  return {-1, -1, "for its kernels"};
}

}  // namespace moe_efa::kernels::device
