// One combine of a rank whose tensors are on a device, as a resumable state machine like cpu/combine_call.h: one
// resident grid that publishes, forwards and reduces. step() queues it and looks at flags, and waits for nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/announce.h"
#include "kernels/device/launch.h"
#include "kernels/device/recording.h"
#include "kernels/device/state.h"
#include "kernels/device/upload.h"
#include "kernels/launch.h"

namespace moe_efa::kernels::device {

// Queues the kernels of a combine on a stream that is being captured; CombineCalls with the same arguments are its
// replays.
void record_combine(State& state, const Recording& recording);

class CombineCall {
 public:
  // Of a plan that was made on a device. `stream`: the caller's; `alone`: see DispatchOptions.
  // `recording`: it is a replay of a graph.
  CombineCall(const CallContext& context, State& state, const CombineArgs& args, Device::Stream stream, bool alone,
              Recording* recording = nullptr);

  bool step();
  bool launched() const { return begun_; }  // the rest happens without the caller
  bool done() const { return done_; }       // on this rank: output complete, duties in the driver's hands (I13)
  const Launch& launch() const { return launch_; }
  void leave(Device::Stream current) { launch_.leave(current); }
  Waiting waiting() const;
  std::uint64_t epoch() const { return own_.epoch; }

 private:
  bool begin();
  void queue();
  bool step_announcements();

  CallContext context_;
  State& state_;
  PhaseState& phase_;
  CombineArgs args_;
  Launch launch_;
  cpu::Announcement own_;
  bool begun_ = false, done_ = false;
  std::vector<bool> announced_;  // [mates | nodes]
  std::vector<std::uint64_t> publish_seq_, receive_seq_;
};

}  // namespace moe_efa::kernels::device
