// Background: a thread that stands in for a caller who is busy with something else. It sleeps until it is wanted, looks
// for work, and between two looks sleeps until a mate or the driver rings. What there is to do, it does not know.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

#include "runtime/futex_doorbell.h"

namespace moe_efa::runtime {

class Background {
 public:
  // `step` does what can be done now; true when anything moved. It may call want(). The thread begins with the first
  // want(true). `longest_us`: between two looks.
  Background(FutexDoorbell& doorbell, long longest_us, std::function<bool()> step);
  ~Background();
  Background(const Background&) = delete;
  Background& operator=(const Background&) = delete;

  void want(bool wanted);
  // Between two looks it gives way to others, but does not sleep: for who does not ring and should not wait.
  void stay_awake(bool awake) { awake_.store(awake, std::memory_order_relaxed); }
  void stop();  // idempotent; joins

 private:
  void loop();

  FutexDoorbell& doorbell_;
  long longest_us_;
  std::function<bool()> step_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool wanted_ = false, stop_ = false;
  std::atomic<bool> awake_{false};
  std::thread thread_;
};

}  // namespace moe_efa::runtime
