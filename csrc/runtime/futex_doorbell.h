// FutexDoorbell: every rank's region has a count of rings and a count of sleepers. A ring is one atomic addition, and a
// system call only where somebody sleeps; a sleeper gives its core away until the next ring.
#pragma once

#include <cstdint>

#include "common/doorbell.h"
#include "proto/region.h"

namespace moe_efa::runtime {

class FutexDoorbell final : public common::Doorbell {
 public:
  explicit FutexDoorbell(const proto::NodeView& view) : view_(view) {}

  void ring(std::uint32_t local_rank) override;
  void ring_all() override;  // all ranks of the node, this one too: its driver and its caller are two threads

  // The count to hand to sleep(), read before looking at what the rings announce: no ring after that is missed.
  std::uint32_t rings() const;
  // Until the count of this rank differs from `seen`, or `timeout_us` have passed.
  void sleep(std::uint32_t seen, long timeout_us);

 private:
  struct Words {
    std::uint32_t rings;
    std::uint32_t sleepers;
  };
  Words* words(std::uint32_t local_rank) const;

  const proto::NodeView& view_;
};

}  // namespace moe_efa::runtime
