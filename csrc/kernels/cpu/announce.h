// announce: what a rank tells its node and its rail peers at the start of an epoch, and what it checks of theirs: same
// call, phase, epoch, plan and dtype on every rank (I14).
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/launch.h"

namespace moe_efa::kernels::cpu {

struct Announcement {
  proto::Phase phase = proto::Phase::kDispatch;
  std::uint64_t epoch = 0;
  std::uint64_t call = 0;
  std::uint64_t plan_id = 0;
  std::uint8_t flags = 0;
  proto::DType dtype = proto::DType::kBf16;
  std::uint32_t capacity = 0, expert_alignment = 0;  // with kFlagStatic; they may differ between ranks
};

// The next call of a phase: takes its numbers. A fresh dispatch names its plan.
Announcement next_dispatch(RankState& state, const DispatchArgs& args);
Announcement next_combine(RankState& state, const CombineArgs& args);

// Whether a call may announce itself: counts buffers alternate, and those of e - 2 must be wholly out of the way (I4,
// I11).
bool may_begin(const CallContext& context, const Announcement& own);

// Raises the begun word, then writes one CountsRecord per node: to the own board, and to the rail peers through the
// driver. facts[node] and first_seq[node] describe the chunks that this rank will write into that node's ring.
// expert_counts[node] is null where no per-expert counts follow.
void announce(const CallContext& context, const Announcement& own, const RingFacts* const* facts,
              const std::uint64_t* first_seq, const std::vector<std::uint32_t>* const* expert_counts);

// True and *record filled when source (node, local) has announced this epoch. `board` is the mate whose region holds
// the record. Throws StatusError(kProtocol) naming both ranks when it announced something else.
bool read_announcement(const CallContext& context, const Announcement& own, std::uint32_t board, std::uint32_t node,
                       proto::CountsRecord* record);

// Throws when a rank has entered the other phase with this very call: the programs differ (I14).
void check_other_phase(const CallContext& context, const Announcement& own);

// The lowest rank that has not announced this epoch on any board of this node, or -1.
int absent_rank(const CallContext& context, const Announcement& own);

}  // namespace moe_efa::kernels::cpu
