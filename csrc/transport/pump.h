// Pump: carries the engine's writes to the rails, the rails' events to the engine and the engine's actions to the flags
// of the region. It owns no thread and no clock: a driver thread, a waiting caller or the simulator steps it.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "common/doorbell.h"
#include "engine/descriptor_ring.h"
#include "engine/engine.h"
#include "proto/region.h"
#include "transport/rail.h"

namespace moe_efa::transport {

struct PumpConfig {
  std::size_t events_per_poll = 16;
  std::size_t writes_per_step = 32;
  // Has this rank left in order? It needs nothing more, so what a rail cannot bring it counts as delivered. With
  // `wait`, after an error of the rail, a verdict that is on its way is waited for.
  std::function<bool(std::uint32_t rank, bool wait)> peer_left;
  common::Doorbell* doorbell = nullptr;  // rung when flags have changed; null: nobody sleeps
  // Makes what NICs have written visible to a GPU's kernels: called before arrivals are flagged. Null: it is.
  std::function<void()> flush;
  // The words that only kernels read are stored through a window onto a GPU's memory, which gathers stores.
  bool through_window = false;
  double post_timeout_s = 600.0;  // a write that no rail accepts for so long fails its peer (I5)
};

class Pump {
 public:
  Pump(engine::Engine& engine, const proto::NodeView& view, std::vector<Rail*> rails,
       engine::DescriptorRing& descriptors, const PumpConfig& config);

  // One turn. `now_s` is any monotone clock. True when anything moved.
  bool step(double now_s);

 private:
  bool drain_descriptors();
  bool poll_rails();
  void read_releases();
  bool post_writes(double now_s);
  bool peer_left(std::uint32_t node, bool wait) const;
  bool post(const engine::Write& write);
  void apply_actions();

  engine::Engine& engine_;
  proto::NodeView view_;
  std::vector<Rail*> rails_;
  engine::DescriptorRing& descriptors_;
  PumpConfig config_;
  std::vector<RailEvent> events_;
  double stuck_since_s_ = -1;
};

}  // namespace moe_efa::transport
