#include "runtime/started_call.h"

namespace moe_efa::runtime {

StartedDispatch::StartedDispatch(const kernels::CallContext& context, const kernels::DispatchArgs& args,
                                 std::shared_ptr<HostPool> pool, std::uint64_t cache_share_bytes)
    : StartedCall(proto::Phase::kDispatch, args.wire_dtype, args.plan),
      hidden_size_(context.view.layout.config().hidden_size),
      out_dtype_(args.out_dtype),
      pool_(std::move(pool)),
      cache_share_bytes_(cache_share_bytes),
      replay_(args.plan->complete),
      call_(context, args) {
  results_.plan = args.plan;
}

void StartedDispatch::allocate() {
  auto rows = static_cast<std::size_t>(results_.plan->rows());
  std::size_t bytes = rows * hidden_size_ * proto::dtype_bytes(out_dtype_);
  results_.x = std::make_shared<HostBuffer>(pool_, bytes);
  kernels::DispatchOutput output{results_.x->data()};
  if (!replay_) {
    results_.weights = std::make_shared<HostBuffer>(pool_, rows * sizeof(float));
    output.weights = static_cast<float*>(results_.weights->data());
  }
  if (out_dtype_ == proto::DType::kFp8) {
    results_.scales = std::make_shared<HostBuffer>(pool_, rows * proto::fp8_blocks(hidden_size_) * sizeof(float));
    output.scales = static_cast<float*>(results_.scales->data());
  }
  output.stream = bytes > cache_share_bytes_;
  call_.set_output(output);
}

bool StartedDispatch::step() {
  bool moved = call_.step();
  if (call_.sizes_known() && !allocated_) {
    allocated_ = moved = true;
    allocate();
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
