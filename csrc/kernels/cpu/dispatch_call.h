// One dispatch on one rank as a resumable state machine: announce, pack, collect counts, pull. It waits for nothing:
// step() does what can be done now, so that a caller's loop, or the simulator, decides about time.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/cpu/announced_rings.h"
#include "kernels/launch.h"

namespace moe_efa::kernels::cpu {

class DispatchCall {
 public:
  DispatchCall(const CallContext& context, const DispatchArgs& args);

  // True when anything moved. Throws StatusError(kProtocol).
  bool step();
  // All counts are in: plan->offsets and tokens_per_expert are final, and set_output may be called.
  bool sizes_known() const { return sizes_known_; }
  // Zeroes the rows that no pull writes: padding, and in static mode what is behind the last expert.
  void set_output(const DispatchOutput& output);
  // Output complete and all duties done or in the driver's hands (I13).
  bool done() const { return done_; }
  Waiting waiting() const;
  std::uint64_t epoch() const { return own_.epoch; }

 private:
  // One ring that this rank reads: of source (node, local), in the region of mate `local`.
  struct Ring {
    std::uint64_t first_seq = 0;
    RingFacts facts;
    std::uint32_t head = 0;  // chunks below are pulled
    std::vector<bool> pulled;
    proto::DType wire_dtype = proto::DType::kBf16;
  };

  bool begin();
  bool step_pack();
  bool step_counts();
  bool step_pull();
  void make_room();
  void finish();
  bool slot_is_free(std::uint32_t node, std::uint64_t seq) const;
  std::size_t ring_index(std::uint32_t local, std::uint32_t node) const;

  CallContext context_;
  DispatchArgs args_;
  Announcement own_;
  bool replay_;
  bool begun_ = false, packed_ = false, sizes_known_ = false, output_set_ = false, done_ = false;
  DispatchOutput output_;
  std::vector<std::uint64_t> first_seq_;   // [node]
  std::vector<std::uint32_t> next_chunk_;  // [node]
  std::vector<Ring> rings_;                // [local * nodes + node]
  std::optional<AnnouncedRings> announced_;
};

}  // namespace moe_efa::kernels::cpu
