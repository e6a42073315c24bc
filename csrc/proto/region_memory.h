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

  // What lies at `offset`; a range never crosses into the slots.
  std::byte* at(std::uint64_t offset) const {
    return slots == nullptr || offset < slots_begin ? region + offset : slots + (offset - slots_begin);
  }
  // Where the offsets of slots count from.
  std::byte* slot_base() const {
    if (slots == nullptr) return region;
    return reinterpret_cast<std::byte*>(reinterpret_cast<std::uintptr_t>(slots) - slots_begin);
  }
};

}  // namespace moe_efa::proto
