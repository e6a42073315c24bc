// Opens the rails that a configuration asks for. The only place that knows which kinds there are.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "runtime/config.h"
#include "runtime/slot_memory.h"
#include "transport/rail.h"
#include "transport/segment.h"

namespace moe_efa::runtime {

struct Rails {
  std::vector<std::unique_ptr<transport::Rail>> rails;  // one per NIC
  std::function<void()> unlink;                         // once every peer has connected; may be empty
};

// What the layout asks of each rail.
struct RailLimits {
  std::uint32_t max_inbound_events = 0;
  std::uint32_t max_writes = 0;       // own, in flight
  std::uint64_t max_write_bytes = 0;  // of one
};

// The rails use `slots` until they are destroyed.
Rails open_rails(const GroupConfig& config, const transport::Segment& segment, SlotMemory& slots,
                 const RailLimits& limits);

}  // namespace moe_efa::runtime
