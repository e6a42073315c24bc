// How a kernel's independent items are spread over threads. The runtime gives a pool, tests and the simulator a loop.
#pragma once

#include <cstddef>
#include <functional>

namespace moe_efa::kernels {

class Executor {
 public:
  virtual ~Executor() = default;
  virtual std::size_t width() const = 0;
  // Runs item(0) ... item(count - 1), in any order, and returns when all are done. Rethrows the first exception.
  virtual void run(std::size_t count, const std::function<void(std::size_t)>& item) = 0;
};

class SerialExecutor final : public Executor {
 public:
  std::size_t width() const override { return 1; }
  void run(std::size_t count, const std::function<void(std::size_t)>& item) override {
    for (std::size_t i = 0; i < count; ++i) item(i);
  }
};

}  // namespace moe_efa::kernels
