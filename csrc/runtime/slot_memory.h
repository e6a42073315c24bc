// SlotMemory: where this rank's slots lie, in its segment or in memory of a GPU, and how mates, rails and NICs reach
// them. What others have exported is imported here, once each, and stays reachable until this is destroyed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "kernels/device.h"
#include "proto/region.h"
#include "proto/region_memory.h"
#include "runtime/config.h"
#include "transport/libfabric_rail.h"

namespace moe_efa::runtime {

// "host" or "device" for the "auto" of a configuration: memory of the device wherever all who must reach it can.
std::string choose_buffers(const GroupConfig& config, const kernels::Device* device);

class SlotMemory {
 public:
  // Throws StatusError(kConfig) where the configuration and the device do not fit together.
  SlotMemory(const GroupConfig& config, const proto::RegionLayout& layout, std::shared_ptr<kernels::Device> device);
  ~SlotMemory();
  SlotMemory(const SlotMemory&) = delete;
  SlotMemory& operator=(const SlotMemory&) = delete;

  // In memory of their own, which this process's CPU does not read.
  bool apart() const { return slots_ != nullptr; }
  // What the segment has to hold.
  std::uint64_t segment_bytes() const { return apart() ? layout_.slots_begin() : layout_.total_bytes(); }
  // The region whose segment is mapped at `segment`; another rank's, with what it exported, may throw.
  proto::RegionMemory memory(std::byte* segment) const { return memory_of(segment, slots_); }
  proto::RegionMemory memory(std::byte* segment, const std::string& exported) {
    return memory_of(segment, import(exported));
  }

  const std::string& exported() const { return exported_; }  // empty: there is nothing to reach
  std::byte* import(const std::string& exported);
  // When no kernel reads them any more, and before any mate frees what it exported.
  void close_imports();
  // Leaves the memory to kernels that may still run, for ever.
  void abandon();
  transport::MemoryDescriptor descriptor() const;
  // Must landed bytes be flushed before kernels may read them?
  bool wants_flush() const { return apart() && device_->facts().flushes_writes; }
  void flush() { device_->flush_writes(); }

 private:
  proto::RegionMemory memory_of(std::byte* segment, std::byte* slots) const {
    return {segment, slots, layout_.slots_begin(), layout_.total_bytes()};
  }
  void release();

  proto::RegionLayout layout_;
  std::shared_ptr<kernels::Device> device_;
  int index_;
  std::byte* slots_ = nullptr;
  std::string exported_;
  std::map<std::string, std::byte*> imported_;
  int dmabuf_fd_ = -1;
  std::uint64_t dmabuf_offset_ = 0;
};

}  // namespace moe_efa::runtime
