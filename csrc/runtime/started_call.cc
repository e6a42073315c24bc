#include "runtime/started_call.h"

#include <sstream>

namespace moe_efa::runtime {

std::string describe_wait(const kernels::Waiting& waiting) {
  std::ostringstream text;
  if (waiting.rank >= 0) text << " on rank " << waiting.rank;
  if (*waiting.what != '\0') text << ' ' << waiting.what;
  if (waiting.chunk >= 0) text << " (chunk " << waiting.chunk << ")";
  return text.str();
}

StartedDispatch::StartedDispatch(const kernels::CallContext& context, const kernels::DispatchArgs& args,
                                 std::shared_ptr<HostPool> pool, std::uint64_t cache_share_bytes)
    : StartedCall(proto::Phase::kDispatch, args.wire_dtype, args.plan),
      hidden_size_(context.view.layout.config().hidden_size),
      out_dtype_(args.out_dtype),
      pool_(std::move(pool)),
      cache_share_bytes_(cache_share_bytes),
      replay_(args.plan->complete),
      results_(results_of(args.plan)),
      call_(context, args) {}

DispatchBuffers StartedDispatch::results_of(const std::shared_ptr<kernels::Plan>& plan) const {
  DispatchBuffers results;
  results.plan = plan;
  if (!replay_ && plan->is_static()) allocate(results);
  return results;
}

void StartedDispatch::allocate(DispatchBuffers& results) const {
  auto rows = static_cast<std::size_t>(results.plan->rows());
  results.x = std::make_shared<HostBuffer>(pool_, rows * hidden_size_ * proto::dtype_bytes(out_dtype_));
  if (!replay_) results.weights = std::make_shared<HostBuffer>(pool_, rows * sizeof(float));
  if (out_dtype_ == proto::DType::kFp8) {
    results.scales = std::make_shared<HostBuffer>(pool_, rows * proto::fp8_blocks(hidden_size_) * sizeof(float));
  }
}

void StartedDispatch::set_output() {
  if (!results_.x) allocate(results_);
  kernels::DispatchOutput output{results_.x->data()};
  if (results_.weights) output.weights = static_cast<float*>(results_.weights->data());
  if (results_.scales) output.scales = static_cast<float*>(results_.scales->data());
  std::uint64_t row_bytes = std::uint64_t{hidden_size_} * proto::dtype_bytes(out_dtype_);
  output.stream = static_cast<std::uint64_t>(results_.plan->rows()) * row_bytes > cache_share_bytes_;
  call_.set_output(output);
}

bool StartedDispatch::step() {
  bool moved = call_.step();
  if (call_.sizes_known() && !output_set_) {
    output_set_ = moved = true;
    set_output();
  }
  if (call_.done()) set_done();
  return moved;
}

bool StartedCombine::step() {
  bool moved = call_.step();
  if (call_.done()) set_done();
  return moved;
}

}  // namespace moe_efa::runtime
