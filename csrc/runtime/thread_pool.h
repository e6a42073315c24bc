// The CPU kernels' threads of one rank. width() - 1 workers sleep between runs; with width 1 there is no thread at all.
#pragma once

#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels/executor.h"

namespace moe_efa::runtime {

class ThreadPool final : public kernels::Executor {
 public:
  explicit ThreadPool(std::size_t width);
  ~ThreadPool() override;
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  std::size_t width() const override { return workers_.size() + 1; }
  void run(std::size_t count, const std::function<void(std::size_t)>& item) override;

 private:
  void work();
  void take_items();

  std::mutex mutex_;
  std::condition_variable start_, finished_;
  std::vector<std::thread> workers_;
  const std::function<void(std::size_t)>* item_ = nullptr;
  std::size_t count_ = 0;
  std::atomic<std::size_t> next_{0};
  std::size_t busy_ = 0;
  std::uint64_t round_ = 0;
  bool stop_ = false;
  std::exception_ptr error_;
};

}  // namespace moe_efa::runtime
