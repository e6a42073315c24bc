// Where a region lies: one block, or words and counts in host memory and the slots in memory of their own. Rails copy
// and register by offset and need no more than this.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe_efa::proto {

struct RegionMemory {
  std::byte* region = nullptr;
  std::byte* slots = nullptr;  // what lies at offset slots_begin; null: all is in `region`
  std::uint64_t slots_begin = 0;
  std::uint64_t bytes = 0;  // of both together
  // Where the offsets of words count from that only kernels read, and no rail touches; null: they are in `region`.
  std::byte* kernel_words = nullptr;

  // Where the part ends that `offset` is in.
  std::uint64_t end_of(std::uint64_t offset) const {
    return slots != nullptr && offset < slots_begin ? slots_begin : bytes;
  }
  // Is a range of `count` bytes within one part?
  bool contains(std::uint64_t offset, std::uint64_t count) const {
    std::uint64_t end = end_of(offset);
    return offset <= end && count <= end - offset;
  }
  // What lies at `offset`.
  std::byte* at(std::uint64_t offset) const {
    return slots == nullptr || offset < slots_begin ? region + offset : slots + (offset - slots_begin);
  }
  // Where the offsets of slots count from.
  std::byte* slot_base() const {
    if (slots == nullptr) return region;
    return reinterpret_cast<std::byte*>(reinterpret_cast<std::uintptr_t>(slots) - slots_begin);
  }
  std::byte* kernel_word_base() const { return kernel_words == nullptr ? region : kernel_words; }
};

}  // namespace moe_efa::proto
