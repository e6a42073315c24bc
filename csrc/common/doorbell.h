// Doorbell: tells a rank of this node that something it may wait for has changed. Rung after the store it announces.
// The runtime wakes sleepers; simulators and tests, which never sleep, have none.
#pragma once

#include <cstdint>

namespace moe_efa::common {

class Doorbell {
 public:
  virtual ~Doorbell() = default;
  virtual void ring(std::uint32_t local_rank) = 0;
  virtual void ring_all() = 0;
};

}  // namespace moe_efa::common
