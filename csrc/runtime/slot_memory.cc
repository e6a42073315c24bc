#include "runtime/slot_memory.h"

#include <unistd.h>

#include "common/check.h"
#include "common/status.h"
#include "kernels/device/launch.h"
#include "kernels/device/state.h"

namespace moe_efa::runtime {

namespace {

constexpr char kCuda[] = "cuda";
constexpr double kCopyPatienceS = 60;  // for a word

[[noreturn]] void refuse(const std::string& text) {
  throw common::StatusError({common::StatusCode::kConfig, -1, -1, -1, -1, text});
}

void check(const GroupConfig& config, const kernels::Device* device) {
  if (config.buffers != "host" && config.buffers != "device") {
    refuse("buffers=\"" + config.buffers + "\": use \"host\" or \"device\"");
  }
  if (config.buffers == "host") return;
  if (device == nullptr) refuse("buffers=\"device\" needs a GPU: use buffers=\"host\"");
  const kernels::DeviceFacts& facts = device->facts();
  bool shares = config.topology.node_size > 1 || config.transport == "shm";
  if (shares && !facts.shares_memory) {
    refuse("buffers=\"device\": the ranks of a node cannot read each other's memory of " + facts.name +
           " here: use buffers=\"host\"");
  }
  if (!facts.sees_writes && config.transport == "libfabric") {
    refuse("buffers=\"device\": kernels of " + facts.name +
           " may not see what a NIC has written: use buffers=\"host\"");
  }
  if (facts.kind == kCuda && config.transport == "shm") {
    refuse("transport 'shm' copies with the CPU, which does not reach memory of a GPU: use buffers=\"host\"");
  }
}

}  // namespace

std::string choose_buffers(const GroupConfig& config, const kernels::Device* device) {
  if (config.buffers != "auto") return config.buffers;
  if (device == nullptr || (config.topology.node_size > 1 && !device->facts().shares_memory)) return "host";
  if (config.topology.num_nodes() == 1) return "device";
  // A flush is a call of the driver, which may wait for kernels that wait for what is to be flushed.
  const kernels::DeviceFacts& facts = device->facts();
  if (config.transport != "libfabric" || !facts.dma_buf || !facts.sees_writes || facts.flushes_writes) return "host";
  // Other providers copy with the CPU.
  std::string provider = config.provider;
  if (provider.empty()) provider = transport::default_provider({config.libfabric, config.libfabric_hints});
  return provider.starts_with("efa") ? "device" : "host";
}

SlotMemory::SlotMemory(const GroupConfig& config, const proto::RegionLayout& layout,
                       std::shared_ptr<kernels::Device> device)
    : layout_(layout), device_(std::move(device)), index_(config.device_index) {
  check(config, device_.get());
  if (config.buffers == "host") return;
  std::uint64_t bytes = layout_.total_bytes() - layout_.slots_begin();
  slots_ = static_cast<std::byte*>(device_->allocate(layout_.kernel_words_at() + layout_.kernel_words_bytes()));
  wants_window_ = config.topology.num_nodes() > 1;
  try {
    if (device_->facts().shares_memory) exported_ = device_->export_memory(slots_);
    if (config.transport == "libfabric" && device_->facts().dma_buf) {
      dmabuf_fd_ = device_->dma_buf(slots_, bytes, &dmabuf_offset_);
    }
    if (wants_window_ && config.gdrcopy != kNoGdrcopy) open_window(config.gdrcopy);
  } catch (...) {
    release();
    throw;
  }
}

SlotMemory::~SlotMemory() { release(); }

// A window that leads elsewhere would let every wait of a kernel run into its deadline, so that the device leaves a
// mark, where a word's line has nothing else, and it has to be seen through the window.
void SlotMemory::open_window(const std::string& library) {
  constexpr std::size_t kMarkAt = sizeof(std::uint64_t);
  std::byte* words = slots_ + layout_.kernel_words_at();
  try {
    auto* mark = static_cast<std::uint64_t*>(device_->allocate_host(sizeof(std::uint64_t)));
    const std::uint64_t value = *mark = reinterpret_cast<std::uintptr_t>(words) ^ 0x6d6f655f656661;
    {
      kernels::device::Launch copied(*device_, proto::Phase::kDispatch, device_->own_stream(0), true);
      device_->copy(words + kMarkAt, mark, sizeof(value), copied.stream());
      copied.queued();
      MOE_EFA_CHECK(copied.wait_quiet(kCopyPatienceS), "the GPU did not copy a word in " << kCopyPatienceS << " s");
    }
    device_->free_host(mark);  // not where the copy may still come
    auto window = std::make_unique<GdrWindow>(library, words, layout_.flag_bytes() - layout_.kernel_words_begin());
    if (common::load_acquire(reinterpret_cast<std::uint64_t*>(window->data() + kMarkAt)) != value) {
      refuse("GDRCopy maps other memory than it was given");
    }
    window_ = std::move(window);
  } catch (const common::StatusError& error) {
    no_window_ = error.what();
  }
}

void SlotMemory::release() {
  window_.reset();
  close_imports();
  if (dmabuf_fd_ >= 0) ::close(dmabuf_fd_);
  if (slots_ != nullptr) kernels::device::quietly([&] { device_->free(slots_); });
  slots_ = nullptr;
}

std::byte* SlotMemory::import(const std::string& exported) {
  if (!apart()) return nullptr;
  if (exported.empty()) refuse("a rank of this host exports no memory of its GPU: use buffers=\"host\"");
  auto known = imported_.find(exported);
  if (known != imported_.end()) return known->second;
  try {
    return imported_[exported] = static_cast<std::byte*>(device_->import_memory(exported));
  } catch (const common::StatusError& error) {
    imported_.erase(exported);
    refuse(std::string(error.what()) + ": this GPU cannot read the memory of another rank's; use buffers=\"host\"");
  }
}

void SlotMemory::close_imports() {
  for (const auto& [exported, memory] : imported_) {
    std::byte* mapped = memory;
    kernels::device::quietly([&] { device_->close_memory(mapped); });
  }
  imported_.clear();
}

void SlotMemory::abandon() {
  imported_.clear();
  slots_ = nullptr;
}

transport::MemoryDescriptor SlotMemory::descriptor() const {
  transport::MemoryDescriptor descriptor;
  if (!apart() || device_->facts().kind != kCuda) return descriptor;
  descriptor.kind = transport::MemoryDescriptor::Kind::kCuda;
  descriptor.device = index_;
  descriptor.dmabuf_fd = dmabuf_fd_;
  descriptor.dmabuf_offset = dmabuf_offset_;
  return descriptor;
}

}  // namespace moe_efa::runtime
