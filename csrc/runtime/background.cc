#include "runtime/background.h"

#include <sched.h>

#include <csignal>

#include "runtime/backoff.h"

namespace moe_efa::runtime {

Background::Background(FutexDoorbell& doorbell, long longest_us, std::function<bool()> step)
    : doorbell_(doorbell), longest_us_(longest_us), step_(std::move(step)) {}

Background::~Background() { stop(); }

void Background::want(bool wanted) {
  {
    std::lock_guard lock(mutex_);
    if (wanted_ == wanted || stop_) return;
    wanted_ = wanted;
    if (wanted && !thread_.joinable()) {
      sigset_t all, before;  // signals are the interpreter's business
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
      thread_ = std::thread([this] { loop(); });
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
  }
  changed_.notify_one();
}

void Background::stop() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void Background::loop() {
  constexpr bool kCrowded = true;  // whoever computes meanwhile has more use for the core than a thread that spins
  Backoff backoff(doorbell_, kCrowded, longest_us_);
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stop_ || wanted_; });
    if (stop_) return;
    lock.unlock();
    backoff.before_look();
    if (step_()) {
      backoff.reset();
    } else if (awake_.load(std::memory_order_relaxed)) {
      sched_yield();
    } else {
      backoff.pause();
    }
    lock.lock();
  }
}

}  // namespace moe_efa::runtime
