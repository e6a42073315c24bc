#include "runtime/host_pool.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <new>

#include "common/math.h"
#include "runtime/huge_pages.h"

namespace moe_efa::runtime {

namespace {

constexpr std::size_t kLeastPooled = 1 << 20;
constexpr std::align_val_t kHeapAlign{64};

// The number of rows differs a little from round to round: sizes in steps of an eighth meet again.
std::size_t rounded(std::size_t bytes) {
  std::size_t step = kHugePage;
  while (step * 16 <= bytes) step *= 2;
  return common::round_up(bytes, step);
}

}  // namespace

HostPool::Block HostPool::take(std::size_t bytes) {
  std::size_t size = rounded(std::max<std::size_t>(bytes, 1));
  {
    std::lock_guard lock(mutex_);
    auto best = idle_.end();
    for (auto block = idle_.begin(); block != idle_.end(); ++block) {
      if (block->bytes < size || block->bytes > size + size / 4) continue;
      if (best == idle_.end() || block->bytes < best->bytes) best = block;
    }
    if (best != idle_.end()) {
      Block block = *best;
      idle_bytes_ -= block.bytes;
      idle_.erase(best);
      return block;
    }
  }
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  prefer_huge_pages(data, size);
  return {data, size};
}

void HostPool::give_back(Block block) {
  std::lock_guard lock(mutex_);
  if (block.bytes > max_idle_bytes_) {  // would push everything else out and not stay either
    munmap(block.data, block.bytes);
    return;
  }
  idle_.push_front(block);
  idle_bytes_ += block.bytes;
  trim_locked(max_idle_bytes_);
}

void HostPool::trim(std::size_t max_idle_bytes) {
  std::lock_guard lock(mutex_);
  trim_locked(max_idle_bytes);
}

void HostPool::trim_locked(std::size_t max_idle_bytes) {
  while (idle_bytes_ > max_idle_bytes) {
    Block oldest = idle_.back();
    munmap(oldest.data, oldest.bytes);
    idle_bytes_ -= oldest.bytes;
    idle_.pop_back();
  }
}

std::size_t HostPool::idle_bytes() const {
  std::lock_guard lock(mutex_);
  return idle_bytes_;
}

HostBuffer::HostBuffer(std::shared_ptr<HostPool> pool, std::size_t bytes) : bytes_(bytes) {
  if (bytes < kLeastPooled) {
    block_ = {::operator new(std::max<std::size_t>(bytes, 1), kHeapAlign), bytes};
  } else {
    block_ = pool->take(bytes);
    pool_ = std::move(pool);
  }
}

HostBuffer::~HostBuffer() {
  if (!pool_) {
    ::operator delete(block_.data, kHeapAlign);
  } else if (getpid() == pid_) {  // a child of fork() leaves the pool alone: its lock may be held for ever
    pool_->give_back(block_);
  }
}

}  // namespace moe_efa::runtime
