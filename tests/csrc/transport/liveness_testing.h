// What the tests of Liveness share: time, configurations. No state.
#pragma once

#include <chrono>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "common/status.h"
#include "transport/liveness.h"

namespace moe_efa::transport {

using common::Status;
using common::StatusCode;
using common::StatusError;
using Clock = std::chrono::steady_clock;

inline constexpr double kConnectTimeout = 20.0;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}
inline void nap(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }
inline bool wait_for(const std::function<bool()>& condition, double timeout_s = 10.0) {
  auto start = Clock::now();
  while (!condition()) {
    if (seconds_since(start) > timeout_s) return false;
    nap(0.002);
  }
  return true;
}

inline LivenessConfig config_of(int rank, double heartbeat_timeout_s, const std::string& key = "key") {
  return {rank, "127.0.0.1", key, heartbeat_timeout_s};
}
inline std::vector<int> others(int rank, int num_ranks) {
  std::vector<int> list;
  for (int i = 0; i < num_ranks; ++i) {
    if (i != rank) list.push_back(i);
  }
  return list;
}

}  // namespace moe_efa::transport
