// Deliberately wrong variants of the protocol. They exist only in the test build (MOE_EFA_MUTANTS), where each must be
// caught by the simulator's oracles; in every other build the test is a constant false and the branch disappears.
#pragma once

namespace moe_efa::common {

enum class Mutant {
  kNone,
  kCreditOnArrival,          // credit returned before the readers are done
  kReuseBeforeCompletion,    // a send slot refilled before the local completion of its last write
  kReuseBeforeCredit,        // a send slot refilled before its credit
  kStaleEpochAccepted,       // epoch of a landing not checked
  kCountsTrustedEarly,       // counts read before their arrival event
  kChunkTrustedEarly,        // an arrival is taken to vouch for the chunk posted before it
  kForwardInReadinessOrder,  // the forwarder takes ring slots in the order in which chunks become ready
  kReduceInArrivalOrder,     // nodes summed as they come
  kReleaseBeforeRead,        // a reader releases a slot and then reads it
  kPublishWithoutConsumed,   // a publish slot refilled before the forwarder has read it
  kLastCreditKept,           // a partial batch of credits is never sent
  kBatchedOrderCompletion,   // the k-th completion is taken to be that of the k-th write
  kOverflowUntold,           // a chunk that lost rows does not say so
  kLostRowsSummed,           // a mate that lost its rows of a token is thought to have published them
  kHeaderUnchecked,          // a call uses a chunk whatever its header says
};

#ifdef MOE_EFA_MUTANTS
inline Mutant active_mutant = Mutant::kNone;
inline bool mutant(Mutant which) { return active_mutant == which; }
#else
constexpr bool mutant(Mutant) { return false; }
#endif

}  // namespace moe_efa::common
