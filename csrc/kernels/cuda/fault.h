// Fault: what stopped a grid, written once by the first thread that finds something wrong, into host memory; and the
// bounded wait that all bodies use (I5, I6). raise() turns it into the exception that the CPU kernels would have
// thrown.
#pragma once

#include <cstdint>

#include "kernels/cuda/block.h"
#include "kernels/header_check.h"

namespace moe_efa::kernels::cuda {

enum class What : std::uint32_t {
  kNothing,
  // Waits that ran out.
  kGrid,
  kCredit,
  kChunk,
  kPublished,
  kConsumed,
  kGate,
  // Chunks that cannot be right (I1).
  kHeader,
  kPlan,
  kRows,
  kDType,
  kRowEntries,
  kEntry,
  kIndex,
  kLeftOver,
  kPulls,
  kSize,
  // Arguments.
  kExpertId,
};

MOE_EFA_DEVICE inline What what_of(HeaderPart part) {
  switch (part) {
    case HeaderPart::kAll:
      break;
    case HeaderPart::kIdentity:
      return What::kHeader;
    case HeaderPart::kPlan:
      return What::kPlan;
    case HeaderPart::kRows:
      return What::kRows;
    case HeaderPart::kDType:
      return What::kDType;
    case HeaderPart::kEntries:
      return What::kRowEntries;
    case HeaderPart::kSize:
      return What::kSize;
  }
  return What::kNothing;
}

struct Fault {
  std::uint64_t set;  // 1 when the rest is written
  What what;
  std::uint32_t phase;
  std::uint32_t rank;  // that found it
  std::uint32_t peer;  // to blame
  std::uint64_t epoch;
  std::uint64_t chunk;  // ring sequence number; kExpertId: token * top_k + position
  std::uint64_t expected;
  std::uint64_t got;
};

// Throws StatusError for a fault that is set, naming what, rank, peer, epoch, expected and got.
void raise(const Fault& fault);

// Words of a grid, in device memory. Zero before a launch, and left at zero by one without a fault.
struct GridState {
  std::uint32_t ticket;
  std::uint32_t exited;
  std::uint32_t waiting;     // blocks at the barrier
  std::uint32_t generation;  // barriers passed; only grows
};

// What every body needs to stop in time.
struct Watch {
  GridState* grid;
  std::uint32_t* faults;     // of all roles of the launch, in device memory; zero before
  Fault* fault;              // mapped host memory
  std::uint64_t timeout_ns;  // of each wait
  std::uint32_t rank;
  const std::uint64_t* stop;  // mapped host memory: not 0 ends all waits, without a fault; null: nobody can
};

// The first fault of a grid wins; the others only stop.
template <class Block>
MOE_EFA_DEVICE void report(Block& block, const Watch& watch, const Fault& fault) {
  if (block.add_acq_rel(watch.faults, 1) != 0) return;
  Fault* to = watch.fault;
  to->what = fault.what;
  to->phase = fault.phase;
  to->rank = watch.rank;
  to->peer = fault.peer;
  to->epoch = fault.epoch;
  to->chunk = fault.chunk;
  to->expected = fault.expected;
  to->got = fault.got;
  block.store_release(&to->set, 1);  // publishes the fields above to the host
}

template <class Block>
MOE_EFA_DEVICE bool faulted(Block& block, const Watch& watch) {
  return block.load_relaxed(watch.faults) != 0;
}

// For a thread that waits: another one has found a fault, or the host has given up.
template <class Block>
MOE_EFA_DEVICE bool must_leave(Block& block, const Watch& watch) {
  if (faulted(block, watch)) return true;
  if (watch.stop == nullptr || block.load_acquire(watch.stop) == 0) return false;
  block.add_acq_rel(watch.faults, 1);  // so that blocks which do not wait leave as well
  return true;
}

// For one thread. Until `observe()`, which reads words with acquire, is at least `least`. False when time is up, which
// is reported, or when another thread has reported something.
template <class Block, class Observe>
MOE_EFA_DEVICE bool wait_at_least(Block& block, const Watch& watch, std::uint64_t least, const Fault& about,
                                  Observe observe) {
  std::uint64_t got = observe();
  if (got >= least) return true;
  std::uint64_t start = block.now_ns();
  do {
    if (must_leave(block, watch)) return false;
    block.pause();
    got = observe();
    if (got >= least) return true;
  } while (block.now_ns() - start < watch.timeout_ns);
  Fault fault = about;
  fault.expected = least;
  fault.got = got;
  report(block, watch, fault);
  return false;
}

// A grid whose blocks take numbered pieces of work, lowest first, so that the blocks that are resident get done what
// comes first, however few they are. `shared` is of the block. False where there is no more, or after a fault.
struct Tickets {
  std::uint32_t next;
  std::uint32_t go;  // may this block go on: what its first thread found
};

template <class Block>
MOE_EFA_DEVICE bool take_ticket(Block& block, const Watch& watch, Tickets& shared, std::uint32_t count,
                                std::uint32_t* ticket) {
  block.sync();  // everyone is done with the one before
  if (block.thread() == 0) {
    shared.next = faulted(block, watch) ? count : block.add(&watch.grid->ticket, 1);
  }
  block.sync();
  *ticket = shared.next;
  return *ticket < count;
}

// For one thread of a block, when it has nothing more to do. True for the last of `num_blocks`, which leaves the words
// as it found them.
template <class Block>
MOE_EFA_DEVICE bool leave_grid(Block& block, const Watch& watch, std::uint32_t num_blocks) {
  if (block.add_acq_rel(&watch.grid->exited, 1) + 1 != num_blocks) return false;
  watch.grid->ticket = 0;
  watch.grid->exited = 0;
  return true;
}

// For one thread. Takes the next chunk of some ring for which `ready(ring, chunk)`: rings that cannot move hold up no
// other, as fixed numbers would. `next` [num_rings] are the first chunks not taken. False where all are taken, after a
// fault, or when none was ready in time, which `about(ring, chunk)` then tells of.
template <class Block, class NumChunks, class Ready, class About>
MOE_EFA_DEVICE bool claim_chunk(Block& block, const Watch& watch, std::uint32_t* next, std::uint32_t num_rings,
                                NumChunks num_chunks, Ready ready, About about, std::uint32_t* ring,
                                std::uint32_t* chunk) {
  std::uint64_t start = 0;
  for (;;) {
    std::uint32_t waiting = num_rings;  // a ring with chunks left
    MOE_EFA_NO_UNROLL
    for (std::uint32_t step = 0; step < num_rings; ++step) {
      std::uint32_t i = (step + block.block()) % num_rings;
      std::uint32_t first = block.load_relaxed(next + i);
      if (first >= num_chunks(i)) continue;
      waiting = i;
      if (!ready(i, first) || !block.compare_swap(next + i, first, first + 1)) continue;
      *ring = i;
      *chunk = first;
      return true;
    }
    if (waiting == num_rings || must_leave(block, watch)) return false;
    std::uint64_t now = block.now_ns();
    if (start == 0) start = now;
    if (now - start > watch.timeout_ns) {
      report(block, watch, about(waiting, block.load_relaxed(next + waiting)));
      return false;
    }
    block.pause();
  }
}

// One arrival at a chunk that waits for `needed` of them. True for the last, to whom all that the threads before it
// wrote or read is ordered. For one thread, after a sync of those it speaks for. The word is 0 again afterwards.
template <class Block>
MOE_EFA_DEVICE bool arrive(Block& block, std::uint32_t* arrivals, std::uint32_t needed) {
  if (block.add_acq_rel(arrivals, 1) + 1 != needed) return false;
  *arrivals = 0;
  return true;
}

// One arrival at `chunk` of a ring whose chunks are finished in any order: on_done(chunk) runs once for each chunk, in
// chunk order. That the chunk before is done counts as one more arrival, so nobody waits and no word goes back.
template <class Block, class Needed, class OnDone>
MOE_EFA_DEVICE void arrive_in_order(Block& block, std::uint32_t* arrivals, std::uint32_t chunk,
                                    std::uint32_t num_chunks, Needed needed, OnDone on_done) {
  for (; chunk < num_chunks; ++chunk) {
    if (!arrive(block, arrivals + chunk, needed(chunk) + (chunk > 0 ? 1 : 0))) return;
    on_done(chunk);
  }
}

// A barrier of all blocks, which are resident together. False when one of them did not come in time or found a fault.
template <class Block>
MOE_EFA_DEVICE bool sync_grid(Block& block, const Watch& watch, std::uint32_t num_blocks, Tickets& shared) {
  block.sync();
  if (block.thread() == 0) {
    GridState* grid = watch.grid;
    std::uint32_t generation = block.add_acq_rel(&grid->generation, 0);
    bool passed = true;
    if (block.add_acq_rel(&grid->waiting, 1) + 1 == num_blocks) {
      grid->waiting = 0;
      block.add_acq_rel(&grid->generation, 1);  // publishes what all blocks wrote before
    } else {
      Fault about{};
      about.what = What::kGrid;
      passed = wait_at_least(block, watch, 1, about,
                             [&] { return std::uint64_t{block.add_acq_rel(&grid->generation, 0) != generation}; });
    }
    shared.go = passed;
  }
  block.sync();
  return shared.go != 0;
}

}  // namespace moe_efa::kernels::cuda
