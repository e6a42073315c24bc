#include "transport/pump.h"

#include <algorithm>
#include <sstream>

#include "common/atomic.h"

namespace moe_efa::transport {

using common::load_acquire;
using common::store_release;
using engine::Action;
using proto::Phase;

Pump::Pump(engine::Engine& engine, const proto::NodeView& view, std::vector<Rail*> rails,
           engine::DescriptorRing& descriptors, const PumpConfig& config)
    : engine_(engine),
      view_(view),
      rails_(std::move(rails)),
      descriptors_(descriptors),
      config_(config),
      events_(config.events_per_poll) {}

bool Pump::step(double now_s) {
  if (engine_.failed()) return false;
  bool moved = drain_descriptors();
  moved |= poll_rails();
  read_releases();
  moved |= post_writes(now_s);
  apply_actions();
  return moved;
}

bool Pump::drain_descriptors() {
  engine::Descriptor descriptor;
  bool any = false;
  while (descriptors_.pop(&descriptor)) {
    engine_.on_descriptor(descriptor);
    any = true;
  }
  return any;
}

bool Pump::poll_rails() {
  bool any = false;
  for (Rail* rail : rails_) {
    std::size_t count = rail->poll(events_);
    any |= count > 0;
    for (std::size_t i = 0; i < count; ++i) {
      const RailEvent& event = events_[i];
      if (event.kind == RailEvent::Kind::kWriteDone) {
        engine_.on_write_done(event.id);
      } else if (event.kind == RailEvent::Kind::kRemoteImm) {
        // Nothing of epoch e + 1 can land before this rank's own counts of e left through this pump, so the words read
        // here are never too old for what has landed (I4).
        for (Phase phase : {Phase::kDispatch, Phase::kCombine}) {
          engine_.on_begun(phase, load_acquire(view_.own_word(view_.layout.begun(phase))));
        }
        engine_.on_remote_imm(event.imm, event.bytes);
      } else if (event.own_write && peer_left(static_cast<std::uint32_t>(event.peer_node), true)) {
        engine_.on_write_done(event.id);
      } else {
        int rank = event.peer_node < 0
                       ? -1
                       : static_cast<int>(view_.topology.rail_peer(static_cast<std::uint32_t>(event.peer_node)));
        std::ostringstream message;
        message << rail->describe() << ": " << event.error;
        if (rank >= 0) message << " (peer rank " << rank << ")";
        engine_.on_failure({common::StatusCode::kTransport, rank, -1, -1, -1, message.str()});
      }
    }
    if (count > 0) apply_actions();
  }
  return any;
}

void Pump::read_releases() {
  const proto::Topology& topology = view_.topology;
  for (std::uint32_t node = 0; node < topology.num_nodes(); ++node) {
    if (node == topology.node()) continue;
    // A dispatch ring is free up to the slowest mate, a combine ring has one reader: this rank.
    std::uint64_t least = ~0ull;
    for (std::uint32_t reader = 0; reader < topology.node_size; ++reader) {
      least = std::min(least, load_acquire(view_.own_word(view_.layout.released(Phase::kDispatch, node, reader))));
    }
    engine_.on_released(Phase::kDispatch, node, least);
    engine_.on_released(
        Phase::kCombine, node,
        load_acquire(view_.own_word(view_.layout.released(Phase::kCombine, node, topology.local_rank()))));
  }
}

bool Pump::peer_left(std::uint32_t node, bool wait) const {
  return config_.peer_left && config_.peer_left(view_.topology.rail_peer(node), wait);
}

bool Pump::post(const engine::Write& write) {
  bool delivered = peer_left(write.peer_node, false);
  if (!delivered) {
    WriteRequest request{write.peer_node, write.bytes, write.local_offset, write.remote_offset, write.imm, write.id};
    try {
      if (rails_[write.nic]->post_write(request) == PostResult::kAgain) return false;
    } catch (const common::StatusError& error) {
      common::Status status = error.status();
      if (status.code != common::StatusCode::kTransport) throw;
      if (!peer_left(write.peer_node, true)) {
        status.rank = static_cast<int>(view_.topology.rail_peer(write.peer_node));
        throw common::StatusError(status);
      }
      delivered = true;
    }
  }
  engine_.on_posted(write);
  if (delivered) engine_.on_write_done(write.id);
  return true;
}

bool Pump::post_writes(double now_s) {
  bool any = false;
  engine_.resume_nics();
  std::size_t posted = 0;
  while (posted < config_.writes_per_step) {
    std::optional<engine::Write> write = engine_.next_write();
    if (!write) break;
    if (post(*write)) {
      any = true;
      ++posted;
    } else {
      engine_.on_again(write->nic);
    }
  }
  if (any || !engine_.has_pending_writes()) {
    stuck_since_s_ = -1;
  } else if (stuck_since_s_ < 0) {
    stuck_since_s_ = now_s;
  } else if (now_s - stuck_since_s_ > config_.post_timeout_s) {
    int rank = engine_.waiting_peer();
    std::ostringstream message;
    message << "no write towards rank " << rank << " was accepted for " << config_.post_timeout_s << " s";
    engine_.on_failure({common::StatusCode::kPeerTimeout, rank, -1, -1, -1, message.str()});
  }
  return any;
}

void Pump::apply_actions() {
  if (engine_.actions().empty()) return;
  const proto::RegionLayout& layout = view_.layout;
  auto is_chunk = [](const Action& action) { return action.kind == Action::Kind::kChunkArrived; };
  if (config_.flush && std::any_of(engine_.actions().begin(), engine_.actions().end(), is_chunk)) config_.flush();
  // Through a window a flag reaches the GPU behind the chunk that it tells of: the NIC wrote that before the completion
  // which this thread has seen, and on the way into a device no posted write passes an earlier one. (One with the
  // relaxed-ordering bit may: a NIC's among each other, before their completion. A CPU's has it not.) Whether kernels,
  // of this GPU or of others, see writes in the order in which they came in is the device's affair; where it is not
  // said to be so, the flush above comes between. What a rail has copied by the CPU leaves it before the flag does.
  if (config_.through_window) common::store_fence();
  for (const Action& action : engine_.actions()) {
    switch (action.kind) {
      case Action::Kind::kChunkArrived:
        // Publishes the whole chunk to the readers of this node (I1).
        store_release(view_.own_word(layout.arrived(action.phase, action.node, action.value)), action.value + 1);
        break;
      case Action::Kind::kCountsArrived:
        // Publishes the counts record.
        store_release(view_.own_word(layout.counts_ready(action.phase, action.node, action.value)), action.value + 1);
        break;
      case Action::Kind::kSendFree:
        // Gives the send slots back to pack and forward (I11).
        store_release(view_.own_word(layout.send_free(action.phase, action.node)), action.value);
        break;
      case Action::Kind::kRetired:
        // Gives the counts buffers of retired epochs back to the caller.
        store_release(view_.own_word(layout.retired(action.phase)), action.value);
        break;
    }
  }
  if (config_.through_window) common::store_fence();  // now, and not when the CPU likes
  engine_.actions().clear();
  if (config_.doorbell != nullptr) config_.doorbell->ring_all();
}

}  // namespace moe_efa::transport
