// Driver: the thread that keeps a rank's rails moving, also while no call is in progress (I13). A caller that waits may
// step the pump itself, so that no context switch stands between an arrival and its reader.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <thread>

#include "common/status.h"
#include "engine/engine.h"
#include "transport/pump.h"

namespace moe_efa::runtime {

double monotonic_s();

class Driver {
 public:
  // `on_failure` is called once, from whichever thread meets the first error. `spin`: there is a core to spare.
  Driver(engine::Engine& engine, transport::Pump& pump, bool spin,
         std::function<void(const common::Status&)> on_failure);
  ~Driver();
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  // Before start(): what every turn does first. True when anything moved.
  void set_feed(std::function<bool()> feed) { feed_ = std::move(feed); }
  void start();
  void stop();  // idempotent; joins
  // One turn on the caller's thread, unless the driver is at it. True when anything moved.
  bool try_step();
  // Calls in progress keep the thread awake.
  void enter() { active_.fetch_add(1, std::memory_order_relaxed); }
  void leave() { active_.fetch_sub(1, std::memory_order_relaxed); }
  // Runs `look` with the engine at rest.
  void inspect(const std::function<void(engine::Engine&)>& look);

 private:
  bool step_locked();
  void loop();

  engine::Engine& engine_;
  transport::Pump& pump_;
  bool spin_;
  std::function<void(const common::Status&)> on_failure_;
  std::function<bool()> feed_;
  std::mutex mutex_;
  std::atomic<bool> stop_{false};
  std::atomic<int> active_{0};
  bool reported_ = false;
  std::thread thread_;
};

}  // namespace moe_efa::runtime
