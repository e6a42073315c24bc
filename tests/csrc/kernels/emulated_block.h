// EmulatedBlock: the Block of kernels/cuda/block.h on the host. A block is a host thread, its threads are fibers that
// take turns, in an order that a seed shuffles at every barrier, so a missing barrier shows as a wrong result.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "kernels/cuda/block.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace moe_efa::testing {

using kernels::cuda::kWarpSize;
using kernels::cuda::Vec16;

// A barrier of fibers: who arrives last opens it.
struct FiberBarrier {
  std::uint32_t size = 0, arrived = 0, generation = 0;
};

struct EmulatedWarp {
  FiberBarrier barrier;
  std::uint32_t values[2][kWarpSize];  // of the exchange under way and the one before
};

struct EmulatedGrid {
  std::uint32_t num_blocks, num_threads;
};

class EmulatedScheduler {
 public:
  static constexpr std::size_t kStackBytes = 256 * 1024;

  EmulatedScheduler(EmulatedGrid& grid, std::uint32_t block, std::uint64_t seed)
      : grid(grid), block(block), random_(seed) {
    all.size = grid.num_threads;
    warps.resize(grid.num_threads / kWarpSize);
    for (EmulatedWarp& warp : warps) warp.barrier.size = kWarpSize;
  }

  void run(const std::function<void(std::uint32_t)>& body) {
    body_ = &body;
    fibers_ = std::vector<Fiber>(grid.num_threads);
    enter_scheduler();
    for (std::uint32_t i = 0; i < grid.num_threads; ++i) {
      Fiber& fiber = fibers_[i];
      fiber.stack.reset(new char[kStackBytes]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &EmulatedScheduler::start, 0);
#if defined(__SANITIZE_THREAD__)
      fiber.tsan = __tsan_create_fiber(0);
#endif
      order_.push_back(i);
    }
    current_scheduler = this;
    std::uint32_t left = grid.num_threads;
    while (left > 0) {
      std::shuffle(order_.begin(), order_.end(), random_);
      for (std::uint32_t i : order_) {
        if (fibers_[i].done) continue;
        current = i;
        resume(fibers_[i]);
        if (fibers_[i].done) --left;
      }
    }
#if defined(__SANITIZE_THREAD__)
    for (Fiber& fiber : fibers_) __tsan_destroy_fiber(fiber.tsan);
#endif
  }

  // To the scheduler and back, later.
  void yield() { leave(fibers_[current], false); }

  void wait(FiberBarrier& barrier) {
    std::uint32_t generation = barrier.generation;
    if (++barrier.arrived == barrier.size) {
      barrier.arrived = 0;
      ++barrier.generation;
    }
    while (barrier.generation == generation) yield();
  }

  EmulatedGrid& grid;
  std::uint32_t block, current = 0;
  FiberBarrier all;
  std::vector<EmulatedWarp> warps;

 private:
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
    void* tsan = nullptr;
    void* fake_stack = nullptr;
  };

  static void start() {
    EmulatedScheduler& self = *current_scheduler;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &self.stack_bottom_, &self.stack_size_);
#endif
    std::uint32_t index = self.current;
    (*self.body_)(index);
    self.fibers_[index].done = true;
    self.leave(self.fibers_[index], true);
  }

  void enter_scheduler() {
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  void resume(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack_, fiber.stack.get(), kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(fiber.tsan, 0);
#endif
    swapcontext(&context_, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

  void leave(Fiber& fiber, bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, stack_bottom_, stack_size_);
#else
    (void)for_good;
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(tsan_, 0);
#endif
    swapcontext(&fiber.context, &context_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &stack_bottom_, &stack_size_);
#endif
  }

  static inline thread_local EmulatedScheduler* current_scheduler = nullptr;

  std::mt19937_64 random_;
  const std::function<void(std::uint32_t)>* body_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<std::uint32_t> order_;
  ucontext_t context_;
  void* tsan_ = nullptr;
  void* fake_stack_ = nullptr;
  const void* stack_bottom_ = nullptr;
  std::size_t stack_size_ = 0;
};

class EmulatedBlock {
 public:
  EmulatedBlock(EmulatedScheduler& scheduler, std::uint32_t thread) : scheduler_(scheduler), thread_(thread) {}

  std::uint32_t thread() const { return thread_; }
  std::uint32_t num_threads() const { return scheduler_.grid.num_threads; }
  std::uint32_t block() const { return scheduler_.block; }
  std::uint32_t num_blocks() const { return scheduler_.grid.num_blocks; }

  void sync() { scheduler_.wait(scheduler_.all); }
  void sync_warp() { scheduler_.wait(warp().barrier); }

  std::uint32_t shuffle(std::uint32_t value, std::uint32_t lane) { return exchange(value)[lane % kWarpSize]; }
  std::uint32_t shuffle_xor(std::uint32_t value, std::uint32_t mask) { return exchange(value)[lane() ^ mask]; }
  std::uint32_t ballot(bool value) {
    const std::uint32_t* values = exchange(value);
    std::uint32_t mask = 0;
    for (std::uint32_t i = 0; i < kWarpSize; ++i) mask |= values[i] << i;
    return mask;
  }
  std::uint32_t match_any(std::uint32_t value) {
    const std::uint32_t* values = exchange(value);
    std::uint32_t mask = 0;
    for (std::uint32_t i = 0; i < kWarpSize; ++i) mask |= std::uint32_t{values[i] == value} << i;
    return mask;
  }

  std::uint32_t add(std::uint32_t* word, std::uint32_t count) {
    return __atomic_fetch_add(word, count, __ATOMIC_RELAXED);
  }
  std::uint32_t add_acq_rel(std::uint32_t* word, std::uint32_t count) {
    return __atomic_fetch_add(word, count, __ATOMIC_ACQ_REL);
  }
  bool compare_swap(std::uint32_t* word, std::uint32_t from, std::uint32_t to) {
    return __atomic_compare_exchange_n(word, &from, to, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
  }
  std::uint32_t load_relaxed(const std::uint32_t* word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
  void raise(std::uint64_t* word, std::uint64_t value) {
    std::uint64_t old = __atomic_load_n(word, __ATOMIC_RELAXED);
    while (old < value && !__atomic_compare_exchange_n(word, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
  std::uint64_t load_acquire(const std::uint64_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
  // Words that others wait for only grow, one step each: a chunk told of twice was told of too early.
  void store_release(std::uint64_t* word, std::uint64_t value) {
    if (__atomic_load_n(word, __ATOMIC_RELAXED) >= value) {
      std::fprintf(stderr, "a word that is %llu already is set to %llu\n",
                   static_cast<unsigned long long>(__atomic_load_n(word, __ATOMIC_RELAXED)),
                   static_cast<unsigned long long>(value));
      std::abort();
    }
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
  }

  // As the hardware does: an unaligned 16-byte access is an error (the sanitizer's).
  Vec16 load(const Vec16* from) { return *from; }
  Vec16 load_fresh(const Vec16* from) { return *from; }
  void store(Vec16* to, const Vec16& value) { *to = value; }

  std::uint64_t now_ns() {
    return static_cast<std::uint64_t>(
        std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count());
  }
  void pause() {
    scheduler_.yield();
    std::this_thread::yield();
  }

 private:
  std::uint32_t lane() const { return thread_ % kWarpSize; }
  EmulatedWarp& warp() { return scheduler_.warps[thread_ / kWarpSize]; }

  // What every lane brought. The values stay until the exchange after the next, which no lane reaches before all have
  // read these.
  const std::uint32_t* exchange(std::uint32_t value) {
    std::uint32_t turn = warp().barrier.generation % 2;
    warp().values[turn][lane()] = value;
    scheduler_.wait(warp().barrier);
    return warp().values[turn];
  }

  EmulatedScheduler& scheduler_;
  std::uint32_t thread_;
};

// Runs body(block, shared) for every thread of a grid. Each block is a host thread of its own and has a `Shared`.
template <class Shared, class Body>
void run_grid(std::uint32_t num_blocks, std::uint32_t num_threads, std::uint64_t seed, const Body& body) {
  EmulatedGrid grid{num_blocks, num_threads};
  std::vector<std::thread> threads;
  for (std::uint32_t i = 0; i < num_blocks; ++i) {
    threads.emplace_back([&, i] {
      auto shared = std::make_unique<Shared>();
      EmulatedScheduler scheduler(grid, i, seed + i);
      scheduler.run([&](std::uint32_t thread) {
        EmulatedBlock block(scheduler, thread);
        body(block, *shared);
      });
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace moe_efa::testing
