// Calls of ranks whose tensors are on a device, as started calls: their kernels are queued on a stream, and flags tell
// when they have run. The caller goes on when they are queued, or, where it has no stream, when they are done.
#pragma once

#include "kernels/device/combine_call.h"
#include "kernels/device/dispatch_call.h"
#include "runtime/started_call.h"

namespace moe_efa::runtime {

class DeviceCall : public StartedCall {
 public:
  using StartedCall::StartedCall;
  // What the caller gets, or writes over, is ready on its stream, or at once where there is none.
  bool returns(const kernels::Device& device) const { return device.facts().stream_ordered ? launched() : done(); }
  virtual bool launched() const = 0;
  virtual void leave() = 0;  // the caller's stream waits for the kernels
};

class DeviceDispatch final : public DeviceCall {
 public:
  DeviceDispatch(const kernels::CallContext& context, kernels::device::State& state, const kernels::DispatchArgs& args,
                 const kernels::device::DispatchOptions& options)
      : DeviceCall(proto::Phase::kDispatch, args.wire_dtype, args.plan),
        made_plan_(args.plan),
        fresh_(!args.plan->complete),
        out_dtype_(args.out_dtype),
        call_(context, state, args, options) {}

  bool step() override {
    bool moved = call_.step();
    if (call_.done()) set_done();
    return moved;
  }
  kernels::Waiting waiting() const override { return call_.waiting(); }
  std::uint64_t epoch() const override { return call_.epoch(); }
  bool launched() const override { return call_.launched(); }
  void leave() override { call_.leave(); }

  bool sizes_known() const { return call_.sizes_known(); }
  std::size_t plan_bytes() const { return call_.plan_bytes(); }
  void set_output(const kernels::DispatchOutput& output, void* plan_memory) { call_.set_output(output, plan_memory); }
  const std::shared_ptr<kernels::Plan>& made_plan() const { return made_plan_; }
  bool fresh() const { return fresh_; }
  proto::DType out_dtype() const { return out_dtype_; }

 private:
  std::shared_ptr<kernels::Plan> made_plan_;
  bool fresh_;
  proto::DType out_dtype_;
  kernels::device::DispatchCall call_;
};

class DeviceCombine final : public DeviceCall {
 public:
  DeviceCombine(const kernels::CallContext& context, kernels::device::State& state, const kernels::CombineArgs& args,
                kernels::Device::Stream stream, bool alone)
      : DeviceCall(proto::Phase::kCombine, args.wire_dtype, args.plan), call_(context, state, args, stream, alone) {}

  bool step() override {
    bool moved = call_.step();
    if (call_.done()) set_done();
    return moved;
  }
  kernels::Waiting waiting() const override { return call_.waiting(); }
  std::uint64_t epoch() const override { return call_.epoch(); }
  bool launched() const override { return call_.launched(); }
  void leave() override { call_.leave(); }

 private:
  kernels::device::CombineCall call_;
};

}  // namespace moe_efa::runtime
