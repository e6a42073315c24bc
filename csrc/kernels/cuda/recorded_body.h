// The bodies of pack, pull and combine in a graph, for any Block (block.h): what they do at a replay is in device
// memory.
#pragma once

#include "kernels/cuda/combine_body.h"
#include "kernels/cuda/gate_body.h"
#include "kernels/cuda/pack_body.h"
#include "kernels/cuda/pull_body.h"

namespace moe_efa::kernels::cuda {

struct RecordedPackShared {
  Tickets tickets;
  Fetched<PackArgs> args;
};

template <class Block>
MOE_EFA_DEVICE void recorded_pack_body(Block& block, const PackArgs* args, const Watch& watch,
                                       RecordedPackShared& shared) {
  if (!fetch(block, watch, args, shared.args, shared.tickets)) return;
  pack_body(block, shared.args.args(), block.num_blocks(), shared.tickets);
}

struct RecordedPullShared {
  PullShared pull;
  Fetched<PullArgs> args;
  Fetched<PackArgs> rest;
};

template <class Block>
MOE_EFA_DEVICE void recorded_pull_body(Block& block, const RecordedPull* args, const Watch& watch,
                                       std::uint32_t pack_blocks, RecordedPullShared& shared) {
  if (block.block() < pack_blocks) {
    if (!fetch(block, watch, &args->rest, shared.rest, shared.pull.tickets)) return;
    pack_body(block, shared.rest.args(), pack_blocks, shared.pull.tickets);
  } else {
    if (!fetch(block, watch, &args->pull, shared.args, shared.pull.tickets)) return;
    pull_body(block, shared.args.args(), block.num_blocks() - pack_blocks, shared.pull);
  }
}

struct RecordedCombineShared {
  CombineShared combine;
  Fetched<CombineArgs> args;
};

template <class Block>
MOE_EFA_DEVICE void recorded_combine_body(Block& block, const CombineArgs* args, const Watch& watch,
                                          const CombineBlocks& blocks, RecordedCombineShared& shared) {
  if (!fetch(block, watch, args, shared.args, shared.combine.tickets)) return;
  combine_body(block, shared.args.args(), blocks, shared.combine);
}

}  // namespace moe_efa::kernels::cuda
