// pack: one chunk of a rank's tokens, header, metadata and rows, into a slot; converts to the wire's dtype, which
// for FP8 means that a row is quantized once for every node it goes to.
#pragma once

#include <cstdint>

#include "kernels/launch.h"

namespace moe_efa::kernels::cpu {

struct PackArgs {
  const DispatchArgs* dispatch = nullptr;
  std::uint32_t node = 0;   // destination
  std::uint32_t chunk = 0;  // of this epoch towards that node
  std::uint64_t seq = 0;    // its place in the ring
  std::uint64_t epoch = 0;
  std::byte* slot = nullptr;
};

// Returns the bytes of the chunk.
std::uint32_t pack_chunk(const PackArgs& args, const proto::NodeView& view);

}  // namespace moe_efa::kernels::cpu
