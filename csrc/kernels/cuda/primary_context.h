// The CUDA context of a device that all libraries of a process share, and calls in it from any thread.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/driver_api.h"

namespace moe_efa::kernels::cuda {

// Keeps the context alive. `index` counts the devices that the process sees.
class PrimaryContext {
 public:
  explicit PrimaryContext(int index) {
    check_driver(driver_api().device_get(&device_, index), "cuDeviceGet");
    check_driver(driver_api().primary_context_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
  }
  ~PrimaryContext() { driver_api().primary_context_release(device_); }
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;

  CUdevice device() const { return device_; }
  CUcontext context() const { return context_; }

 private:
  CUdevice device_;
  CUcontext context_;
};

// While it lives, calls of this thread go to that device; then the caller's is current again. By the driver's calls,
// because cudaSetDevice would leave a context on device 0 behind wherever the caller had chosen none.
//
// Another thread may be capturing a graph, in the mode that forbids everybody to allocate, to query events and to wait.
// What is forbidden is a misuse only of the stream that is captured: inside, this thread is excepted from it.
class DeviceScope {
 public:
  explicit DeviceScope(const PrimaryContext& primary) {
    CUcontext current = nullptr;
    check_driver(driver_api().context_get_current(&current), "cuCtxGetCurrent");
    if (current != primary.context()) {
      check_driver(driver_api().context_push(primary.context()), "cuCtxPushCurrent");
      pushed_ = true;
    }
    driver_api().exchange_capture_mode(&mode_);  // fails for a wrong mode only
  }
  ~DeviceScope() {
    driver_api().exchange_capture_mode(&mode_);
    CUcontext popped;
    if (pushed_) driver_api().context_pop(&popped);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
  bool pushed_ = false;
};

}  // namespace moe_efa::kernels::cuda
