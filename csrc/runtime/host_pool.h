// HostPool: memory of results that died, kept for the next ones. A fresh large tensor costs a page fault and a zeroed
// page for every page; memory that was touched before costs neither. Thread-safe; knows no tensors.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>

namespace moe_efa::runtime {

class HostPool {
 public:
  // Keeps at most `max_idle_bytes` that nobody uses: those that were used last.
  explicit HostPool(std::size_t max_idle_bytes) : max_idle_bytes_(max_idle_bytes) {}
  ~HostPool() { trim(0); }
  HostPool(const HostPool&) = delete;
  HostPool& operator=(const HostPool&) = delete;

  struct Block {
    void* data = nullptr;
    std::size_t bytes = 0;  // at least what was asked for
  };

  // Contents are whatever was there. Throws std::bad_alloc.
  Block take(std::size_t bytes);
  void give_back(Block block);
  void trim(std::size_t max_idle_bytes);  // returns memory to the system until so much is idle
  std::size_t idle_bytes() const;

 private:
  void trim_locked(std::size_t max_idle_bytes);

  std::size_t max_idle_bytes_;
  mutable std::mutex mutex_;
  std::size_t idle_bytes_ = 0;
  std::list<Block> idle_;  // a few; the last used first
};

// A block that goes back to its pool with its owner. Small ones come from the heap, which reuses them anyway.
class HostBuffer {
 public:
  HostBuffer(std::shared_ptr<HostPool> pool, std::size_t bytes);
  ~HostBuffer();
  HostBuffer(const HostBuffer&) = delete;
  HostBuffer& operator=(const HostBuffer&) = delete;

  void* data() const { return block_.data; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<HostPool> pool_;  // null: from the heap
  std::size_t bytes_;
  pid_t pid_ = getpid();
  HostPool::Block block_;
};

}  // namespace moe_efa::runtime
