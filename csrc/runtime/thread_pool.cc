#include "runtime/thread_pool.h"

#include <csignal>

namespace moe_efa::runtime {

ThreadPool::ThreadPool(std::size_t width) {
  // Signals are the interpreter's business: workers inherit a mask that blocks them all.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (std::size_t i = 1; i < width; ++i) workers_.emplace_back([this] { work(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  start_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::take_items() {
  for (std::size_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) {
    try {
      (*item_)(i);
    } catch (...) {
      std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }
}

void ThreadPool::run(std::size_t count, const std::function<void(std::size_t)>& item) {
  if (workers_.empty() || count <= 1) {
    for (std::size_t i = 0; i < count; ++i) item(i);
    return;
  }
  {
    std::lock_guard lock(mutex_);
    item_ = &item;
    count_ = count;
    next_.store(0);
    error_ = nullptr;
    busy_ = workers_.size();
    ++round_;
  }
  start_.notify_all();
  take_items();
  std::unique_lock lock(mutex_);
  finished_.wait(lock, [this] { return busy_ == 0; });
  item_ = nullptr;
  if (error_) std::rethrow_exception(error_);
}

void ThreadPool::work() {
  std::uint64_t seen = 0;
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      start_.wait(lock, [&] { return stop_ || round_ != seen; });
      if (stop_) return;
      seen = round_;
    }
    take_items();
    std::lock_guard lock(mutex_);
    if (--busy_ == 0) finished_.notify_one();
  }
}

}  // namespace moe_efa::runtime
