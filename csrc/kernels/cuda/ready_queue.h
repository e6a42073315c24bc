// ReadyQueue: the driver's side of the ready words of one phase: what kernels finish in any order becomes descriptors
// in posting order, each once. It reads no chunk and knows no slot but its word.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/atomic.h"
#include "engine/descriptor_ring.h"
#include "kernels/cuda/pack.h"

namespace moe_efa::kernels::cuda {

class ReadyQueue {
 public:
  // `words` [num_nodes * slots] are what the kernels write: host memory, zeros, which keeps its values between calls.
  ReadyQueue(proto::Phase phase, std::uint32_t num_nodes, std::uint32_t slots, ChunkReady* words)
      : phase_(phase), slots_(slots), words_(words), rings_(num_nodes) {}

  // An epoch sends `num_chunks` to a node from `first_seq` on. What went before is done.
  void expect(std::uint32_t node, std::uint64_t epoch, std::uint64_t first_seq, std::uint32_t num_chunks) {
    rings_[node] = {epoch, first_seq, first_seq + num_chunks};
  }

  bool empty() const {
    return std::all_of(rings_.begin(), rings_.end(), [](const Ring& ring) { return ring.next == ring.end; });
  }

  // Hands on what has become ready. True when something was.
  bool poll(engine::DescriptorRing& descriptors) {
    bool moved = false;
    for (std::uint32_t node = 0; node < rings_.size(); ++node) {
      Ring& ring = rings_[node];
      for (; ring.next < ring.end; ++ring.next, moved = true) {
        const ChunkReady& word = words_[std::size_t{node} * slots_ + ring.next % slots_];
        // Pairs with the release of the chunk's last part.
        if (common::load_acquire(&word.seq_plus_1) != ring.next + 1) break;
        descriptors.push({static_cast<std::uint16_t>(node), static_cast<std::uint8_t>(phase_),
                          ring.next + 1 == ring.end ? engine::Descriptor::kLast : std::uint8_t{0}, word.rows,
                          word.bytes, static_cast<std::uint32_t>(ring.epoch)});
      }
    }
    return moved;
  }

 private:
  struct Ring {
    std::uint64_t epoch = 0, next = 0, end = 0;
  };

  proto::Phase phase_;
  std::uint32_t slots_;
  ChunkReady* words_;
  std::vector<Ring> rings_;
};

}  // namespace moe_efa::kernels::cuda
