// Recording: one call in a graph that was captured. Its kernels are queued once, with gates between them (cuda/gate.h);
// at every replay the host makes a call of it when the first gate knocks, as if it had been issued then, and steps it
// like any other. So a replay takes its number among the calls of the group in the order of its stream (I14), and what
// a call checks, announces and owes to others is the same.
#pragma once

#include <cstdint>

#include "common/atomic.h"
#include "kernels/cuda/gate.h"
#include "kernels/device/state.h"

namespace moe_efa::kernels::device {

class Recording {
 public:
  // Where gates stand. kSizes tells that plan has found what a fresh dispatch sends, and holds up nobody.
  enum Point : std::uint32_t { kEnter, kSizes, kPlace, kEnd };
  static_assert(kEnd + 1 == GateWords::kPoints);

  // Queues on `stream`, which is being captured.
  Recording(State& state, proto::Phase phase, Device::Stream stream)
      : state_(state), phase_(phase), stream_(stream), gates_(state.take_gates()) {}
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

  // --- at capture. The caller fills in what the gate copies.
  cuda::GateArgs gate(Point point, bool waits) const;
  void queue(const cuda::GateArgs& gate) const { state_.device().launch(gate, stream_); }
  Device::Stream stream() const { return stream_; }

  // --- at replays
  // The stream has come to a replay of which there is no call yet.
  bool knocks() const { return knocked_at(kEnter) > run_; }
  void begin() { ++run_; }
  // The stream has passed, or waits at, the gate.
  bool knocked(Point point) const { return knocked_at(point) >= run_; }
  // Publishes to the gate what it is to bring to the device.
  void open(Point point) { common::store_release(gates_.words->opened + point, run_); }

 private:
  // Pairs with the release of the gate.
  std::uint64_t knocked_at(Point point) const { return common::load_acquire(gates_.words->knocked + point); }

  State& state_;
  proto::Phase phase_;
  Device::Stream stream_;
  State::Gates gates_;
  std::uint64_t run_ = 0;  // replays that were begun
};

}  // namespace moe_efa::kernels::device
