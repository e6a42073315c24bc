// combine: results of the experts on their way home, in one resident grid with three roles. publish: this rank's terms
// of the rows that its mates forward; forward: sums over the ranks of this node, a chunk for each source on this rail;
// reduce: sums over nodes into the output. Orders and roundings are those of the CPU kernels (DESIGN: numerics).
#pragma once

#include <cstdint>

#include "kernels/cuda/fault.h"
#include "kernels/cuda/pack.h"
#include "kernels/cuda/plan_view.h"
#include "proto/region.h"

namespace moe_efa::kernels::cuda {

struct CombineArgs {
  proto::NodeView view;  // regions: [node_size], in device memory
  PlanView plan;         // complete
  const void* y;         // [rows, hidden_size]
  proto::DType y_dtype;
  proto::DType wire_dtype;
  const float* weights;       // [rows]; null: plain sum
  const float* weight_grads;  // [rows]; null: none travel
  void* out;                  // [num_tokens, hidden_size] in y_dtype
  float* topk_weight_grads;   // [num_tokens, top_k]; with weight_grads
  const CallState* call;
  const std::uint64_t* publish_seq;  // [num_rings]: publish and combine position of the epoch's first chunk of a source
  const std::uint64_t* receive_seq;  // [num_nodes]: ring position of the first chunk that comes back from a node
  std::uint32_t* next;               // [2 * num_rings], zeros before and after: chunks that publish, forward have taken
  std::uint32_t* ring_arrivals;      // [plan.num_chunks], zeros before and after
  std::uint32_t* send_arrivals;      // [num_nodes * plan.send_chunks], zeros before and after
  ChunkReady* ready;                 // [num_nodes * slots]: mapped host memory; not used for the own node
  GridState* grids;                  // [3]: of the roles
  Watch watch;                       // its grid is not used
};

inline constexpr std::uint32_t kCombineThreads = 256;

// One term of a sum.
struct Term {
  const void* row;  // null: the sum of own terms
  float weight;
};

// What a block needs for its warps' sums.
struct CombineShared {
  static constexpr std::uint32_t kWarps = kCombineThreads / kWarpSize;
  Tickets tickets;
  std::uint32_t ring, chunk;
  Term own[kWarps][proto::kMaxTopK];    // a row's terms of this rank
  Term terms[kWarps][proto::kMaxTopK];  // of the ranks of this node, or of all nodes: never more than experts
};
static_assert(kMaxNodeSize <= proto::kMaxTopK);

struct CombineBlocks {
  std::uint32_t publish, forward, reduce;
};

// Throws StatusError naming the call that failed, as it does for a grid that cannot be resident.
void launch_combine(const CombineArgs& args, const CombineBlocks& blocks, void* stream);

// The same, in a graph: see launch_recorded_pack.
void launch_recorded_combine(const CombineArgs* args, const Watch& watch, const CombineBlocks& blocks, void* stream);

const void* recorded_combine_kernel_entry();
const void* combine_kernel_entry();  // for loading it before it is launched

}  // namespace moe_efa::kernels::cuda
