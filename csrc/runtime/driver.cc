#include "runtime/driver.h"

#include <sched.h>

#include <chrono>
#include <csignal>

#include "runtime/backoff.h"

namespace moe_efa::runtime {

double monotonic_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Driver::Driver(engine::Engine& engine, transport::Pump& pump, bool spin,
               std::function<void(const common::Status&)> on_failure)
    : engine_(engine), pump_(pump), spin_(spin), on_failure_(std::move(on_failure)) {}

Driver::~Driver() { stop(); }

void Driver::start() {
  sigset_t all, before;  // signals are the interpreter's business
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { loop(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Driver::stop() {
  stop_.store(true);
  if (thread_.joinable()) thread_.join();
}

bool Driver::step_locked() {
  if (reported_) return false;
  bool moved = false;
  try {
    if (feed_) moved = feed_();
    moved |= pump_.step(monotonic_s());
  } catch (const common::StatusError& error) {
    engine_.on_failure(error.status());
  } catch (const std::exception& error) {
    engine_.on_failure({common::StatusCode::kInternal, -1, -1, -1, -1, error.what()});
  }
  if (engine_.failed() && !reported_) {
    reported_ = true;
    on_failure_(engine_.failure());
  }
  return moved;
}

bool Driver::try_step() {
  std::unique_lock lock(mutex_, std::try_to_lock);
  return lock.owns_lock() && step_locked();
}

void Driver::inspect(const std::function<void(engine::Engine&)>& look) {
  std::lock_guard lock(mutex_);
  look(engine_);
}

void Driver::loop() {
  constexpr double kAwakeS = 0.1;  // after the last movement: more traffic is likely
  double last_moved = monotonic_s();
  while (!stop_.load(std::memory_order_relaxed)) {
    bool moved;
    {
      std::lock_guard lock(mutex_);
      moved = step_locked();
    }
    if (moved) {
      last_moved = monotonic_s();
      continue;
    }
    bool active = active_.load(std::memory_order_relaxed) > 0;
    if (spin_ && active) {
      sched_yield();
      continue;
    }
    // A caller that waits steps the pump itself; this thread stands in for one that is busy with rows.
    bool awake = monotonic_s() - last_moved < kAwakeS;
    sleep_us(active ? 500 : awake ? 50 : 1000);
  }
}

}  // namespace moe_efa::runtime
