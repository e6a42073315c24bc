// One combine on one rank as a resumable state machine: publish for every source, forward for the own rail, reduce the
// own tokens. step() never waits, and no source without credit blocks another.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/announce.h"
#include "kernels/launch.h"

namespace moe_efa::kernels::cpu {

class CombineCall {
 public:
  CombineCall(const CallContext& context, const CombineArgs& args);

  bool step();  // true when anything moved; throws StatusError(kProtocol)
  bool done() const { return done_; }
  Waiting waiting() const;
  std::uint64_t epoch() const { return own_.epoch; }

 private:
  bool begin();
  void clear_unsent();
  bool step_announcements();
  bool step_publish();
  bool step_forward();
  bool step_reduce();
  bool slot_is_free(std::uint32_t node, std::uint64_t seq) const;
  void check_chunk(std::uint32_t node, std::uint32_t chunk);
  const RingFacts& ring_facts(std::uint32_t local, std::uint32_t node) const;
  std::size_t ring_index(std::uint32_t local, std::uint32_t node) const;

  CallContext context_;
  CombineArgs args_;
  Announcement own_;
  bool begun_ = false, all_announced_ = false, done_ = false;
  std::vector<bool> announced_;              // [node_size + num_nodes]: mates, then rail peers
  std::vector<std::uint64_t> publish_base_;  // [local * nodes + node]: also the ring position towards that source
  std::vector<std::uint32_t> published_;     // [local * nodes + node]: chunks
  std::vector<std::uint32_t> forwarded_;     // [node]: chunks
  std::vector<std::uint64_t> receive_base_;  // [node]
  std::vector<std::uint32_t> received_;      // [node]: chunks that have arrived without a gap
  std::uint32_t tokens_done_ = 0;
  std::uint64_t overflow_ = 0;  // the largest capacity that was told
};

}  // namespace moe_efa::kernels::cpu
