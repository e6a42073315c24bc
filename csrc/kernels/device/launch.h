// Launch: on which stream a call's kernels go. Alone, they go where its caller computes; beside, on a stream of their
// own, which first waits for what the caller has queued, and which the caller's stream waits for when the call ends.
#pragma once

#include "kernels/device.h"
#include "kernels/device/state.h"
#include "proto/topology.h"

namespace moe_efa::kernels::device {

class Launch {
 public:
  Launch(Device& device, proto::Phase phase, Device::Stream caller, bool alone)
      : device_(device),
        caller_(caller),
        stream_(alone ? caller : device.own_stream(static_cast<std::uint32_t>(phase))),
        alone_(alone),
        entered_(alone ? 0 : device.mark(caller)) {}
  ~Launch() {
    for (Device::Mark mark : {entered_, marked_}) {
      if (mark != 0) quietly([&] { device_.release(mark); });
    }
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  Device::Stream stream() const { return stream_; }
  bool alone() const { return alone_; }
  // Before the first kernel.
  void enter() {
    if (entered_ != 0) device_.wait_for(stream_, entered_);
  }
  // After some kernels; reached() is about the last mark.
  void mark() {
    if (marked_ != 0) device_.release(marked_);
    marked_ = device_.mark(stream_);
  }
  bool reached() const { return marked_ != 0 && device_.reached(marked_); }
  // What the caller queues from here on comes after the kernels.
  void leave() {
    if (!alone_ && marked_ != 0) device_.wait_for(caller_, marked_);
  }

 private:
  Device& device_;
  Device::Stream caller_, stream_;
  bool alone_;
  Device::Mark entered_, marked_ = 0;
};

}  // namespace moe_efa::kernels::device
