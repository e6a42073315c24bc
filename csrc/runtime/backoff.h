// What a waiting call does between two looks: spin, yield, then sleep. Where the ranks of a host outnumber its cores a
// waiting rank stands in the way of those it waits for, so it gives its core away almost at once.
#pragma once

#include <sched.h>
#include <time.h>

#include <cstdint>

namespace moe_efa::runtime {

inline void sleep_us(long microseconds) {
  timespec pause{microseconds / 1'000'000, microseconds % 1'000'000 * 1000};
  nanosleep(&pause, nullptr);
}

class Backoff {
 public:
  explicit Backoff(bool crowded) : crowded_(crowded) {}

  void reset() { turns_ = 0; }
  std::uint32_t turns() const { return turns_; }  // without progress

  void pause() {
    ++turns_;
    if (turns_ <= (crowded_ ? 4u : 64u)) return;
    if (turns_ <= (crowded_ ? 8u : 16384u)) {
      sched_yield();
    } else {
      sleep_us(turns_ < 200 ? 20 : 100);
    }
  }

 private:
  bool crowded_;
  std::uint32_t turns_ = 0;
};

}  // namespace moe_efa::runtime
