// SlotMemory: where this rank's slots lie, in its segment or in memory of a GPU, and how mates, rails and NICs reach
// them. What others have exported is imported here, once each, and stays reachable until this is destroyed. Behind
// slots in a GPU's memory is room for the words that only kernels read, which the driver writes through a window.
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
#include "runtime/gdrcopy.h"
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

  // May this rank's words that only kernels read lie behind its slots? Not if a driver has to write some of them and
  // has no window; then no_window() says why, or is empty where none was wanted.
  bool has_kernel_words() const { return apart() && (!wants_window_ || window_); }
  const std::string& no_window() const { return no_window_; }
  // Where their offsets count from: for kernels, by RegionMemory::slot_base() of any rank of the node, and for the CPU,
  // which has it of its own rank only; null: it writes none of them.
  std::byte* kernel_words(std::byte* slot_base) const {
    return shifted(slot_base, layout_.slots_begin() + layout_.kernel_words_at() - layout_.kernel_words_begin());
  }
  std::byte* kernel_words_window() const {
    return window_ ? shifted(window_->data(), std::uint64_t{0} - layout_.kernel_words_begin()) : nullptr;
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
  // Bases lie outside of what they belong to.
  static std::byte* shifted(std::byte* base, std::uint64_t bytes) {
    return reinterpret_cast<std::byte*>(reinterpret_cast<std::uintptr_t>(base) + bytes);
  }
  void open_window(const std::string& library);
  void release();

  proto::RegionLayout layout_;
  std::shared_ptr<kernels::Device> device_;
  int index_;
  std::byte* slots_ = nullptr;  // behind them, at kernel_words_at(), words that only kernels read
  bool wants_window_ = false;
  std::unique_ptr<GdrWindow> window_;
  std::string no_window_;
  std::string exported_;
  std::map<std::string, std::byte*> imported_;
  int dmabuf_fd_ = -1;
  std::uint64_t dmabuf_offset_ = 0;
};

}  // namespace moe_efa::runtime
