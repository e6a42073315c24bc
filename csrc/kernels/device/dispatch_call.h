// One dispatch of a rank whose tensors are on a device, as a resumable state machine like cpu/dispatch_call.h: step()
// queues kernels and looks at flags, and waits for nothing. Two launches (DESIGN, "Kernels never deadlock"): plan and
// the chunks that the slots of earlier epochs take; then, when the sizes are known and there is memory for the rows,
// one resident grid that packs the rest and pulls.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/cpu/announced_rings.h"
#include "kernels/device/launch.h"
#include "kernels/device/recording.h"
#include "kernels/device/state.h"
#include "kernels/device/upload.h"
#include "kernels/launch.h"

namespace moe_efa::kernels::device {

struct DispatchOptions {
  Device::Stream stream = nullptr;  // the caller's
  bool alone = true;                // the caller does nothing else until the call is queued
  // Of a fresh dispatch.
  const std::int64_t* topk_idx = nullptr;  // [num_tokens, top_k], device
  const float* topk_weights = nullptr;     // the same
  void* send_memory = nullptr;             // send_bytes(num_tokens), device; the plan's
  Recording* recording = nullptr;          // a replay of a graph: `stream` and `alone` are those of its capture
};

// Where a dispatch in a graph puts what of a plan is known on the host first, in memory of the device; fresh only.
struct RecordedTables {
  std::int64_t* counts = nullptr;   // [experts_per_rank]
  std::int32_t* offsets = nullptr;  // [experts_per_rank + 1]
};

// Queues the kernels of a dispatch on a stream that is being captured; DispatchCalls with the same arguments and output
// are its replays. A fresh one is in static mode. `plan_memory`: most_pull_bytes(); fresh only.
void record_dispatch(State& state, const Recording& recording, const DispatchArgs& args, const DispatchOptions& options,
                     void* plan_memory, const RecordedTables& tables, std::uint32_t num_nics);

class DispatchCall {
 public:
  // Of a plan that was made on a device, or a fresh one whose `send` has num_nodes elements.
  DispatchCall(const CallContext& context, State& state, const DispatchArgs& args, const DispatchOptions& options);

  bool step();
  bool sizes_known() const { return sizes_known_; }
  std::size_t plan_bytes() const;  // that set_output wants, once sizes are known; 0 in a replay
  void set_output(const DispatchOutput& output, void* plan_memory);
  bool launched() const { return launched_; }  // the rest happens without the caller
  bool done() const { return done_; }          // on this rank: output complete, duties in the driver's hands (I13)
  const Launch& launch() const { return launch_; }
  void leave(Device::Stream current) { launch_.leave(current); }
  Waiting waiting() const;
  std::uint64_t epoch() const { return own_.epoch; }

 private:
  bool begin();
  void queue_plan();
  void queue_first_pack();
  bool read_send_sizes();
  void announce_call();
  std::vector<std::uint32_t> pulls_of_rings() const;
  void upload_losses(Upload& upload, cuda::PullArgs& pull) const;
  void queue_pull();

  CallContext context_;
  State& state_;
  PhaseState& phase_;
  DispatchArgs args_;
  DispatchOptions options_;
  Launch launch_;
  cpu::Announcement own_;
  bool replay_;
  bool begun_ = false, announced_ = false, sizes_known_ = false, output_set_ = false, launched_ = false, done_ = false;
  std::vector<std::uint64_t> first_seq_;  // [node]: of this rank's rings
  std::vector<std::uint64_t> ring_seq_;   // [ring]: of what this rank pulls
  std::optional<cpu::AnnouncedRings> rings_;
  cuda::PackArgs pack_{};
  DispatchOutput output_;
  std::byte* plan_memory_ = nullptr;
};

}  // namespace moe_efa::kernels::device
