// Launch: on which stream a call's kernels go. Alone, they go where its caller computes; beside, on a stream of their
// own, which first waits for what the caller has queued, and which the caller's stream waits for when the call ends. At
// a replay of a graph they are queued already, and its gates tell where they are.
#pragma once

#include "kernels/device.h"
#include "kernels/device/recording.h"
#include "proto/topology.h"

namespace moe_efa::kernels::device {

class Launch {
 public:
  Launch(Device& device, proto::Phase phase, Device::Stream caller, bool alone, Recording* recording = nullptr);
  ~Launch();
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  Device::Stream stream() const { return stream_; }
  bool alone() const { return alone_; }
  Recording* recording() const { return recording_; }
  // Before the first kernel.
  void enter();
  // After copies that the host waits for.
  void mark_copies() { replace(copies_); }
  bool copies_arrived() const {
    if (recording_ != nullptr) return recording_->knocked(Recording::kSizes);
    return copies_ != 0 && device_.reached(copies_);
  }
  // After everything else that was queued.
  void queued() { replace(last_); }
  // Whether all of it has run.
  bool quiet() const {
    if (recording_ != nullptr) return recording_->knocked(Recording::kEnd);
    return last_ == 0 || device_.reached(last_);
  }
  bool wait_quiet(double most_s) const;  // false where it has not in time
  // What is queued from here on comes after the kernels: on the stream where the call began, whose memory it used, and
  // on `current`, where it ends.
  void leave(Device::Stream current);

 private:
  void replace(Device::Mark& mark);

  Device& device_;
  Device::Stream caller_, stream_;
  bool alone_;
  Recording* recording_;  // null: kernels are queued now
  Device::Mark entered_, copies_ = 0, last_ = 0;
};

}  // namespace moe_efa::kernels::device
