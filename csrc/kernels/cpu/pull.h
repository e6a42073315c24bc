// pull: the rows of one landed chunk that belong to this rank's experts, placed straight into the expert-major output.
// Checks every per-row field before use (I1, I10); places by the sender's index, never by arrival (I3).
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/static_sizes.h"
#include "kernels/launch.h"

namespace moe_efa::kernels::cpu {

struct PullArgs {
  Plan* plan = nullptr;
  const DispatchOutput* output = nullptr;
  proto::DType out_dtype = proto::DType::kBf16;   // FP8: the wire's rows, handed through
  proto::DType wire_dtype = proto::DType::kBf16;  // announced by the source
  std::uint32_t source_local = 0;                 // source rank = (source_node, source_local)
  std::uint32_t source_node = 0;
  std::uint32_t chunk = 0;  // of this epoch
  std::uint64_t seq = 0;
  std::uint64_t epoch = 0;
  bool replay = false;
  const std::byte* slot = nullptr;
  // Fresh dispatch only: rows of this source per own expert, and where they start in the output.
  const std::uint32_t* expert_counts = nullptr;  // [experts_per_rank]
  const std::int64_t* expert_base = nullptr;     // [experts_per_rank]
  const StaticSizes* static_sizes = nullptr;     // null where the output has room for every row
};

// Throws StatusError(kProtocol) naming the source when a field cannot be right.
void pull_chunk(const PullArgs& args, const proto::NodeView& view);

}  // namespace moe_efa::kernels::cpu
