// AnnouncedRings: what the sources of a dispatch have announced so far and, when all have, the sizes that follow. It
// reads boards on the host; where the rows go, it does not know.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/cpu/announce.h"
#include "kernels/cpu/static_sizes.h"
#include "kernels/launch.h"

namespace moe_efa::kernels::cpu {

// One ring that this rank reads: of source (node, local), in the region of mate `local`.
struct AnnouncedRing {
  bool announced = false;
  std::uint64_t first_seq = 0;
  RingFacts facts;
  proto::DType wire_dtype = proto::DType::kBf16;
};

class AnnouncedRings {
 public:
  // `own` is what this rank announces; the plan is complete in a replay.
  AnnouncedRings(const CallContext& context, const Announcement& own, const Plan& plan);

  // Reads what has come. True when anything had. Throws StatusError(kProtocol).
  bool step(const CallContext& context, const Announcement& own, const Plan& plan);
  bool complete() const { return complete_; }
  // Of a fresh dispatch, when all have announced: the plan's counts, offsets, rings and the room for pulls and masks.
  void size_plan(const CallContext& context, const Announcement& own, Plan& plan);

  const std::vector<AnnouncedRing>& rings() const { return rings_; }  // [local * nodes + node]
  // [source rank][own expert]: rows, and where they start in the output.
  const std::vector<std::uint32_t>& expert_counts() const { return expert_counts_; }
  const std::vector<std::int64_t>& expert_base() const { return expert_base_; }
  const StaticSizes* static_sizes() const { return static_sizes_ ? &*static_sizes_ : nullptr; }

 private:
  void read_counts(const CallContext& context, const Announcement& own, std::uint32_t local, std::uint32_t node,
                   const proto::CountsRecord& record);
  void fit_capacity(Plan& plan);

  bool complete_ = false;
  std::vector<AnnouncedRing> rings_;
  std::vector<std::uint32_t> expert_counts_;
  std::vector<std::int64_t> expert_base_;
  std::optional<StaticSizes> static_sizes_;  // of a fresh dispatch in static mode
};

}  // namespace moe_efa::kernels::cpu
