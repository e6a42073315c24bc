// What the pack and forward kernels tell the driver: 16-byte descriptors of what may be posted, in posting order.
// One producer (the call in progress), one consumer (whoever steps the engine). It knows nothing of the ring slots.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "common/check.h"
#include "proto/topology.h"

namespace moe_efa::engine {

struct Descriptor {
  std::uint16_t node = 0;  // destination
  std::uint8_t phase = 0;
  std::uint8_t flags = 0;
  std::uint32_t count = 0;  // rows of the chunk; for counts: chunks of the epoch towards this node
  std::uint32_t bytes = 0;
  std::uint32_t epoch = 0;  // low bits, for the engine's own check

  static constexpr std::uint8_t kCounts = 1;  // a CountsRecord, not a chunk
  static constexpr std::uint8_t kLast = 2;
};
static_assert(sizeof(Descriptor) == 16);

class DescriptorRing {
 public:
  // See engine::max_descriptors.
  explicit DescriptorRing(std::size_t capacity) : entries_(capacity + 1) {}

  void push(const Descriptor& descriptor) {
    std::size_t tail = tail_.load(std::memory_order_relaxed);
    std::size_t next = (tail + 1) % entries_.size();
    MOE_EFA_CHECK(next != head_.load(std::memory_order_acquire), "descriptor ring overflow");
    entries_[tail] = descriptor;
    tail_.store(next, std::memory_order_release);  // publishes the entry and the packed bytes behind it
  }

  bool pop(Descriptor* descriptor) {
    std::size_t head = head_.load(std::memory_order_relaxed);
    if (head == tail_.load(std::memory_order_acquire)) return false;  // pairs with push
    *descriptor = entries_[head];
    head_.store((head + 1) % entries_.size(), std::memory_order_release);  // gives the entry back
    return true;
  }

  bool empty() const { return head_.load(std::memory_order_acquire) == tail_.load(std::memory_order_acquire); }

 private:
  std::vector<Descriptor> entries_;
  alignas(64) std::atomic<std::size_t> head_{0};
  alignas(64) std::atomic<std::size_t> tail_{0};
};

}  // namespace moe_efa::engine
