// Calls of ranks whose tensors are on a device, as started calls: their kernels are queued on a stream, and flags tell
// when they have run. The caller goes on when they are queued, or, where it has no stream, when they are done.
#pragma once

#include <utility>

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
  virtual bool wait_quiet(double most_s) const = 0;         // until no kernel of it runs or is queued
  virtual void leave(kernels::Device::Stream current) = 0;  // what `current` does from here on comes after the kernels
};

// Of a call of kernels/device.
template <class Call>
class DeviceCallOf : public DeviceCall {
 public:
  template <class... Args>
  DeviceCallOf(proto::Phase phase, proto::DType wire_dtype, std::shared_ptr<const kernels::Plan> plan, Args&&... args)
      : DeviceCall(phase, wire_dtype, std::move(plan)), call_(std::forward<Args>(args)...) {}

  bool step() override {
    bool moved = call_.step();
    if (call_.done()) set_done();
    return moved;
  }
  kernels::Waiting waiting() const override { return call_.waiting(); }
  std::uint64_t epoch() const override { return call_.epoch(); }
  bool launched() const override { return call_.launched(); }
  bool wait_quiet(double most_s) const override { return call_.launch().wait_quiet(most_s); }
  void leave(kernels::Device::Stream current) override { call_.leave(current); }

 protected:
  Call call_;
};

class DeviceDispatch final : public DeviceCallOf<kernels::device::DispatchCall> {
 public:
  DeviceDispatch(const kernels::CallContext& context, kernels::device::State& state, const kernels::DispatchArgs& args,
                 const kernels::device::DispatchOptions& options)
      : DeviceCallOf(proto::Phase::kDispatch, args.wire_dtype, args.plan, context, state, args, options),
        made_plan_(args.plan),
        fresh_(options.send_memory != nullptr),
        out_dtype_(args.out_dtype) {}

  kernels::Waiting waiting() const override {
    return claimed_ && !placed_ ? kernels::Waiting{-1, -1, "for memory for its rows"} : call_.waiting();
  }
  // True once, when the sizes are known: for who then gives it memory.
  bool claim() {
    if (claimed_ || placed_ || !call_.sizes_known()) return false;
    return claimed_ = true;
  }
  std::size_t plan_bytes() const { return call_.plan_bytes(); }
  void set_output(const kernels::DispatchOutput& output, void* plan_memory) {
    call_.set_output(output, plan_memory);
    placed_ = true;
  }
  const std::shared_ptr<kernels::Plan>& made_plan() const { return made_plan_; }
  bool fresh() const { return fresh_; }
  proto::DType out_dtype() const { return out_dtype_; }

 private:
  std::shared_ptr<kernels::Plan> made_plan_;
  bool fresh_, claimed_ = false, placed_ = false;
  proto::DType out_dtype_;
};

class DeviceCombine final : public DeviceCallOf<kernels::device::CombineCall> {
 public:
  DeviceCombine(const kernels::CallContext& context, kernels::device::State& state, const kernels::CombineArgs& args,
                kernels::Device::Stream stream, bool alone, kernels::device::Recording* recording = nullptr)
      : DeviceCallOf(proto::Phase::kCombine, args.wire_dtype, args.plan, context, state, args, stream, alone,
                     recording) {}
};

}  // namespace moe_efa::runtime
