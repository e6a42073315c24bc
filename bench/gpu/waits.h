// Kernels that only wait. One tells how long a word takes to a thread of the host and back: both words lie in mapped
// host memory, which the kernel writes and polls over the bus, as pack tells the driver of chunks and pull waits for
// them. The other lets a stream pause by the device's clock of real time, whatever the frequency of its cores.
#pragma once

#include <cstdint>

#include "kernels/cuda/block.h"

namespace moe_efa::bench {

struct FlagLatencyArgs {
  std::uint64_t* ping;  // the kernel writes
  std::uint64_t* pong;  // the host answers
  std::uint64_t* elapsed_ns;
  std::uint64_t rounds;
  std::uint64_t timeout_ns;  // of each round
};

// For a grid of one block. `elapsed_ns` stays 0 when an answer did not come in time.
template <class Block>
MOE_EFA_DEVICE void flag_latency_body(Block& block, const FlagLatencyArgs& args) {
  if (block.thread() != 0) return;
  std::uint64_t start = block.now_ns();
  MOE_EFA_NO_UNROLL
  for (std::uint64_t round = 1; round <= args.rounds; ++round) {
    block.store_release(args.ping, round);
    std::uint64_t sent = block.now_ns();
    while (block.load_acquire(args.pong) < round) {
      if (block.now_ns() - sent > args.timeout_ns) return;
#if !defined(__CUDA_ARCH__)
      block.pause();  // fibers take turns
#endif
    }
  }
  block.store_release(args.elapsed_ns, block.now_ns() - start);
}

template <class Block>
MOE_EFA_DEVICE void pause_body(Block& block, std::uint64_t nanoseconds) {
  if (block.thread() != 0) return;
  std::uint64_t start = block.now_ns();
  while (block.now_ns() - start < nanoseconds) block.pause();
}

void launch_flag_latency(const FlagLatencyArgs& args, void* stream);
void launch_pause(std::uint64_t nanoseconds, void* stream);

}  // namespace moe_efa::bench
