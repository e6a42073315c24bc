// What a waiting call does between two looks: spin, yield, then sleep until a mate or the driver rings. Where the ranks
// of a host outnumber its cores a waiting rank stands in the way of those it waits for, so it sleeps almost at once.
#pragma once

#include <sched.h>
#include <time.h>

#include <cstdint>

#include "runtime/futex_doorbell.h"

namespace moe_efa::runtime {

inline void sleep_us(long microseconds) {
  timespec pause{microseconds / 1'000'000, microseconds % 1'000'000 * 1000};
  nanosleep(&pause, nullptr);
}

class Backoff {
 public:
  Backoff(FutexDoorbell& doorbell, bool crowded, long longest_us)
      : doorbell_(doorbell), crowded_(crowded), longest_us_(longest_us) {}

  void reset() { turns_ = 0; }
  std::uint32_t turns() const { return turns_; }  // without progress
  // Before every look: what is rung for from here on cuts the pause short.
  void before_look() { rings_ = doorbell_.rings(); }

  // True when it slept, so that there is time for a look at the clock.
  bool pause() {
    ++turns_;
    if (turns_ <= (crowded_ ? 4u : 64u)) return false;
    if (turns_ <= (crowded_ ? 8u : 128u)) {
      sched_yield();
      return false;
    }
    doorbell_.sleep(rings_, longest_us_);
    return true;
  }

 private:
  FutexDoorbell& doorbell_;
  bool crowded_;
  long longest_us_;
  std::uint32_t turns_ = 0;
  std::uint32_t rings_ = 0;
};

}  // namespace moe_efa::runtime
