// StartedCall: a dispatch or a combine that goes on while its caller does something else. It owns what a dispatch
// gives; what it reads, and where a combine writes, stays the caller's and unchanged until the call is done. Steps are
// serialised by the group; done() may be asked by any thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "kernels/cpu/combine_call.h"
#include "kernels/cpu/dispatch_call.h"
#include "kernels/launch.h"
#include "runtime/host_pool.h"

namespace moe_efa::runtime {

class StartedCall {
 public:
  StartedCall(proto::Phase phase, proto::DType wire_dtype, std::shared_ptr<const kernels::Plan> plan)
      : phase_(phase), wire_dtype_(wire_dtype), plan_(std::move(plan)) {}
  virtual ~StartedCall() = default;
  StartedCall(const StartedCall&) = delete;
  StartedCall& operator=(const StartedCall&) = delete;

  virtual bool step() = 0;  // true when anything moved; throws
  virtual kernels::Waiting waiting() const = 0;
  virtual std::uint64_t epoch() const = 0;

  bool done() const { return done_.load(std::memory_order_acquire); }
  proto::Phase phase() const { return phase_; }
  proto::DType wire_dtype() const { return wire_dtype_; }
  const kernels::Plan& plan() const { return *plan_; }
  std::uint64_t number = 0;  // among all calls of the group (I14)
  std::uint64_t ticket = 0;  // of a call that somebody finishes
  bool replayed = false;     // by a graph: nobody finishes it
  double begin_s = 0;        // of such a call

 protected:
  // Publishes the results to whoever finishes the call.
  void set_done() { done_.store(true, std::memory_order_release); }

 private:
  proto::Phase phase_;
  proto::DType wire_dtype_;
  std::shared_ptr<const kernels::Plan> plan_;
  std::atomic<bool> done_{false};
};

// " on rank 1 for counts", for messages.
std::string describe_wait(const kernels::Waiting& waiting);

struct DispatchBuffers {
  std::shared_ptr<kernels::Plan> plan;
  std::shared_ptr<HostBuffer> x;        // [rows, hidden_size]
  std::shared_ptr<HostBuffer> weights;  // [rows] fp32; of a fresh dispatch only
  std::shared_ptr<HostBuffer> scales;   // [rows, blocks] fp32; of FP8 rows only
};

class StartedDispatch final : public StartedCall {
 public:
  // Takes memory for its results from `pool` when their size is known: with a capacity at once, before anything is
  // announced.
  StartedDispatch(const kernels::CallContext& context, const kernels::DispatchArgs& args,
                  std::shared_ptr<HostPool> pool, std::uint64_t cache_share_bytes);

  bool step() override;
  kernels::Waiting waiting() const override { return call_.waiting(); }
  std::uint64_t epoch() const override { return call_.epoch(); }
  DispatchBuffers take_results() { return std::move(results_); }  // once, when done

 private:
  DispatchBuffers results_of(const std::shared_ptr<kernels::Plan>& plan) const;
  void allocate(DispatchBuffers& results) const;
  void set_output();

  std::uint32_t hidden_size_;
  proto::DType out_dtype_;
  std::shared_ptr<HostPool> pool_;
  std::uint64_t cache_share_bytes_;
  bool replay_, output_set_ = false;
  DispatchBuffers results_;
  kernels::cpu::DispatchCall call_;
};

class StartedCombine final : public StartedCall {
 public:
  StartedCombine(const kernels::CallContext& context, const kernels::CombineArgs& args)
      : StartedCall(proto::Phase::kCombine, args.wire_dtype, args.plan), call_(context, args) {}

  bool step() override;
  kernels::Waiting waiting() const override { return call_.waiting(); }
  std::uint64_t epoch() const override { return call_.epoch(); }

 private:
  kernels::cpu::CombineCall call_;
};

}  // namespace moe_efa::runtime
