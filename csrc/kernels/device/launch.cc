#include "kernels/device/launch.h"

#include <chrono>
#include <thread>

#include "kernels/device/state.h"

namespace moe_efa::kernels::device {

Launch::Launch(Device& device, proto::Phase phase, Device::Stream caller, bool alone, Recording* recording)
    : device_(device),
      caller_(caller),
      stream_(alone ? caller : device.own_stream(static_cast<std::uint32_t>(phase))),
      alone_(alone),
      recording_(recording),
      entered_(alone ? 0 : device.mark(caller)) {}

Launch::~Launch() {
  for (Device::Mark mark : {entered_, copies_, last_}) {
    if (mark != 0) quietly([&] { device_.release(mark); });
  }
}

void Launch::enter() {
  if (entered_ != 0) device_.wait_for(stream_, entered_);
}

void Launch::leave(Device::Stream current) {
  if (last_ == 0) return;
  if (!alone_) device_.wait_for(caller_, last_);
  if (current != caller_) device_.wait_for(current, last_);
}

bool Launch::wait_quiet(double most_s) const {
  auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(most_s);
  while (!quiet()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  return true;
}

void Launch::replace(Device::Mark& mark) {
  Device::Mark made = device_.mark(stream_);
  if (mark != 0) device_.release(mark);
  mark = made;
}

}  // namespace moe_efa::kernels::device
