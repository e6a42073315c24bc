// The body of gate, for any Block (block.h).
#pragma once

#include "kernels/cuda/columns.h"
#include "kernels/cuda/gate.h"

namespace moe_efa::kernels::cuda {

template <class Block>
MOE_EFA_DEVICE void copy_at_gate(Block& block, const GateCopy& copy) {
  bool wide = is_aligned(copy.to) && is_aligned(copy.from);
  std::uint32_t whole = wide ? copy.bytes / sizeof(Vec16) : 0;
  for (std::uint32_t i = block.thread(); i < whole; i += block.num_threads()) {
    block.store(static_cast<Vec16*>(copy.to) + i, block.load_fresh(static_cast<const Vec16*>(copy.from) + i));
  }
  auto* to = static_cast<std::uint32_t*>(copy.to);
  const auto* from = static_cast<const std::uint32_t*>(copy.from);
  for (std::uint32_t i = whole * 4 + block.thread(); i < copy.bytes / 4; i += block.num_threads()) {
    to[i] = block.load_relaxed(from + i);
  }
}

template <class Block>
MOE_EFA_DEVICE void gate_body(Block& block, const GateArgs& args, Tickets& shared) {
  MOE_EFA_NO_UNROLL
  for (std::uint32_t i = 0; i < GateArgs::kCopies; ++i) copy_at_gate(block, args.before[i]);
  block.sync();
  if (block.thread() == 0) {
    std::uint64_t run = *args.run + (args.enters ? 1 : 0);
    if (args.enters) *args.run = run;
    // Publishes what was copied, and what earlier kernels of the stream wrote, to the host.
    block.store_release(args.knocked, run);
    Fault about{};
    about.what = What::kGate;
    about.phase = args.phase;
    about.peer = args.watch.rank;
    about.chunk = run;
    // Pairs with the host's release: what it has written for this replay is copied after it.
    shared.go = args.opened == nullptr ||
                wait_at_least(block, args.watch, run, about, [&] { return block.load_acquire(args.opened); });
  }
  block.sync();
  if (shared.go == 0) return;  // what follows on the stream sees the fault, or the stop, too
  MOE_EFA_NO_UNROLL
  for (std::uint32_t i = 0; i < GateArgs::kCopies; ++i) copy_at_gate(block, args.after[i]);
}

// What a captured kernel is to do: in device memory, where a gate has put it for this replay, and then here.
template <class Args>
struct Fetched {
  static constexpr std::uint32_t kVecs = (sizeof(Args) + sizeof(Vec16) - 1) / sizeof(Vec16);
  Vec16 vecs[kVecs];  // no constructor runs on the memory of a block
  MOE_EFA_DEVICE const Args& args() const { return *reinterpret_cast<const Args*>(vecs); }
};

// False for all threads of the block where the gate was not passed: then nothing is there.
template <class Block, class Args>
MOE_EFA_DEVICE bool fetch(Block& block, const Watch& watch, const Args* from, Fetched<Args>& to, Tickets& shared) {
  if (block.thread() == 0) shared.go = !faulted(block, watch);
  block.sync();
  if (shared.go == 0) return false;
  const auto* vecs = reinterpret_cast<const Vec16*>(from);
  for (std::uint32_t i = block.thread(); i < to.kVecs; i += block.num_threads())
    to.vecs[i] = block.load_fresh(vecs + i);
  block.sync();
  return true;
}

}  // namespace moe_efa::kernels::cuda
