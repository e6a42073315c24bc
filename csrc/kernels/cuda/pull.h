// pull: the rows of this rank's experts out of the rings of its node, chunk by chunk as they land, into the
// expert-major output with its padding; dequantizes, or hands FP8 rows and their scales through. Checks every field of
// a chunk before it is used (I1, I10); places by the sender's index, never by arrival (I3).
#pragma once

#include <cstdint>

#include "kernels/cuda/fault.h"
#include "kernels/cuda/pack.h"
#include "kernels/cuda/plan_view.h"
#include "proto/region.h"

namespace moe_efa::kernels::cuda {

// What a source announced for this call.
struct RingCall {
  std::uint64_t first_seq;
  proto::DType wire_dtype;
};

struct PullArgs {
  proto::NodeView view;    // regions: [node_size], in device memory
  PlanView plan;           // rings are known; a fresh dispatch fills in pulls and masks
  const RingCall* rings;   // [num_rings]
  proto::DType out_dtype;  // FP8: the wire's rows, handed through
  bool replay;
  const CallState* call;
  const std::uint32_t* expert_counts;     // [num_ranks * experts_per_rank]: rows of that source for own experts
  const std::int64_t* expert_base;        // the same shape: where they start in the output
  const std::int64_t* tokens_per_expert;  // [experts_per_rank]
  const std::int64_t* offsets;            // [experts_per_rank + 1]
  std::int64_t num_rows;                  // of the output: offsets' last, or more in static mode
  std::int64_t usable_rows;               // Plan::usable_rows
  // Of static mode where a rank of the node lost rows, otherwise null.
  const std::uint32_t* room;  // [num_nodes * experts of the node]: rows of the source (node, own local rank) that fit
  const std::uint64_t* required;  // [node_size]: the capacity that each rank of the node needed
  void* x;                        // [rows, hidden_size] in out_dtype
  float* weights;                 // [rows]; null in a replay
  float* scales;                  // [rows, fp8_blocks(hidden_size)]; of FP8 rows only
  std::uint32_t* arrivals;        // [plan.num_chunks], zeros before and after
  std::uint32_t* pulled;          // [num_rings], zeros before and after
  Watch watch;
};

struct PullShared {
  Tickets tickets;
  std::uint32_t begin, count;  // of the chunk's pulls
  proto::ChunkHeader header;
};

inline constexpr std::uint32_t kPullThreads = 256;

// One resident grid: `pack_blocks` of its blocks pack what an earlier launch of pack left (`rest`; null where nothing
// is left), the others pull. Throws StatusError naming the call that failed, as it does for a grid that cannot be
// resident.
void launch_pull(const PullArgs& args, std::uint32_t num_blocks, const PackArgs* rest, std::uint32_t pack_blocks,
                 void* stream);

// What a pull in a graph is to do: see launch_recorded_pack. Of its blocks `pack_blocks` pack, where anything is left.
struct RecordedPull {
  alignas(16) PullArgs pull;
  alignas(16) PackArgs rest;
};
void launch_recorded_pull(const RecordedPull* args, const Watch& watch, std::uint32_t num_blocks,
                          std::uint32_t pack_blocks, void* stream);

const void* recorded_pull_kernel_entry();
const void* pull_kernel_entry();  // for loading it before it is launched

}  // namespace moe_efa::kernels::cuda
