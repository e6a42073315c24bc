// pack: this rank's tokens into the slots of its rings, chunk by chunk, by a few resident blocks; converts to the
// wire's dtype. A row is read and quantized once for every node it goes to, never for every expert.
#pragma once

#include <cstdint>

#include "kernels/cuda/fault.h"
#include "kernels/cuda/plan_view.h"
#include "proto/region.h"

namespace moe_efa::kernels::cuda {

// Numbers of a call, in device memory, so that a captured launch can be replayed with others.
struct CallState {
  std::uint64_t epoch;
  std::uint64_t plan_id;
};

// What the driver polls, in mapped host memory: one for each send slot. 16 bytes, written by one thread.
struct ChunkReady {
  std::uint64_t seq_plus_1;  // the release: what is below, and the chunk itself, are visible before it
  std::uint32_t rows;
  std::uint32_t bytes;
};
static_assert(sizeof(ChunkReady) == 16);

struct PackArgs {
  proto::NodeView view;  // regions: [node_size], in device memory
  PlanView plan;
  const void* x;  // [num_tokens, hidden_size]
  proto::DType x_dtype;
  proto::DType wire_dtype;
  bool replay;
  std::uint32_t chunk_begin, chunk_end;  // of every destination: the first launch stops at what earlier epochs free
  const CallState* call;
  const std::uint64_t* first_seq;  // [num_nodes]: ring position of the epoch's first chunk
  std::uint32_t* arrivals;         // [num_nodes * plan.send_chunks], zeros before and after
  ChunkReady* ready;               // [num_nodes * slots]: mapped host memory; not used for the own node
  Watch watch;
};

inline constexpr std::uint32_t kPackThreads = 512;
inline constexpr std::uint32_t kPackRows = kPackThreads / kWarpSize;  // of a piece of work: a row for each warp
inline constexpr std::uint32_t kPackBlocks = 6;                       // one for each SM that packing may take

// Queues the kernel on `stream` (a cudaStream_t). Throws StatusError naming the call that failed.
void launch_pack(const PackArgs& args, std::uint32_t num_blocks, void* stream);

// The same, in a graph: the arguments are read from device memory, aligned to 16 bytes, when the kernel runs.
void launch_recorded_pack(const PackArgs* args, const Watch& watch, std::uint32_t num_blocks, void* stream);

const void* recorded_pack_kernel_entry();
const void* pack_kernel_entry();  // for loading it before it is launched

}  // namespace moe_efa::kernels::cuda
