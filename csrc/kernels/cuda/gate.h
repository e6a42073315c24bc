// gate: where a captured graph meets the host. At every replay of a graph its kernels run with no call on the host, so
// between them stand gates: one tells the driver's side that the stream has come to a point of a call, and, where the
// host has something to say first, waits (bounded, I5) until it does. The counter of replays lies in device memory and
// only grows; nothing is cleared between replays.
#pragma once

#include <cstdint>

#include "kernels/cuda/fault.h"

namespace moe_efa::kernels::cuda {

// Words, of 4 bytes, that a gate brings over: a copy of its own would be a node, and a launch, more.
struct GateCopy {
  void* to;
  const void* from;  // past the caches: mapped host memory, or what earlier kernels wrote
  std::uint32_t bytes;
};

struct GateArgs {
  static constexpr std::uint32_t kCopies = 4;

  std::uint64_t* run;                        // device: replays that came to the first gate of the call
  bool enters;                               // this is that gate
  std::uint64_t* knocked;                    // mapped host: replays that came here
  const std::uint64_t* opened;               // mapped host: replays that may go on; null: all may
  GateCopy before[kCopies], after[kCopies];  // copied before the host is told, and when it has answered; 0 bytes: none
  std::uint32_t phase;
  Watch watch;
};

inline constexpr std::uint32_t kGateThreads = 256;

// Queues the kernel on `stream` (a cudaStream_t). Throws StatusError naming the call that failed.
void launch_gate(const GateArgs& args, void* stream);

const void* gate_kernel_entry();  // for loading it before it is launched

}  // namespace moe_efa::kernels::cuda
