// Opens the rails that a configuration asks for. The only place that knows which kinds there are.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "runtime/config.h"
#include "transport/rail.h"
#include "transport/segment.h"

namespace moe_efa::runtime {

struct Rails {
  std::vector<std::unique_ptr<transport::Rail>> rails;  // one per NIC
  std::function<void()> unlink;                         // once every peer has connected; may be empty
};

Rails open_rails(const GroupConfig& config, const transport::Segment& region, std::uint32_t max_inbound_events,
                 std::uint32_t max_writes);

}  // namespace moe_efa::runtime
