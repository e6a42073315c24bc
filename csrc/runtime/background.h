// Background: a thread that stands in for a caller who is busy with something else. It sleeps until it is wanted, looks
// for work, and between two looks sleeps until a mate or the driver rings. What there is to do, it does not know.
#pragma once

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
  void stop();  // idempotent; joins

 private:
  void loop();

  FutexDoorbell& doorbell_;
  long longest_us_;
  std::function<bool()> step_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool wanted_ = false, stop_ = false;
  std::thread thread_;
};

}  // namespace moe_efa::runtime
