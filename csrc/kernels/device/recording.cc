#include "kernels/device/recording.h"

namespace moe_efa::kernels::device {

cuda::GateArgs Recording::gate(Point point, bool waits) const {
  cuda::GateArgs args{};
  args.run = gates_.run;
  args.enters = point == kEnter;
  args.knocked = gates_.words->knocked + point;
  args.opened = waits ? gates_.words->opened + point : nullptr;
  args.phase = static_cast<std::uint32_t>(phase_);
  args.watch = state_.watch(phase_, 0);
  return args;
}

}  // namespace moe_efa::kernels::device
