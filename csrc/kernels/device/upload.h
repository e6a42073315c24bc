// Upload: arrays laid out in host memory that a device copies from, and the addresses that they will have there. One
// copy brings them over.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/check.h"
#include "common/math.h"
#include "kernels/device.h"

namespace moe_efa::kernels::device {

inline constexpr std::size_t kAlign = 16;  // of every array

constexpr std::size_t aligned(std::size_t bytes) { return common::round_up<std::size_t>(bytes, kAlign); }

class Upload {
 public:
  // `host`: of Device::allocate_host(), left alone until the copy is done; `device`: where its bytes go.
  Upload(std::byte* host, std::byte* device, std::size_t capacity)
      : host_(host), device_(device), capacity_(capacity) {}

  // Room for `count` values; what it will be on the device is in *placed.
  template <typename T>
  T* add(std::size_t count, T** placed) {
    std::size_t at = used_;
    used_ += aligned(count * sizeof(T));
    MOE_EFA_CHECK(used_ <= capacity_, "an upload of " << used_ << " bytes where " << capacity_ << " were planned");
    *placed = reinterpret_cast<T*>(device_ + at);
    return reinterpret_cast<T*>(host_ + at);
  }
  template <typename T>
  T* add(const T* values, std::size_t count) {
    T* placed;
    T* to = add<T>(count, &placed);
    if (count > 0) std::memcpy(to, values, count * sizeof(T));
    return placed;
  }
  void queue(Device& device, Device::Stream stream) {
    if (used_ > 0) device.copy(device_, host_, used_, stream);
  }

 private:
  std::byte* host_;
  std::byte* device_;
  std::size_t capacity_, used_ = 0;
};

}  // namespace moe_efa::kernels::device
