#include "kernels/device/state.h"

#include <algorithm>

#include "common/check.h"
#include "common/math.h"
#include "common/status.h"
#include "kernels/device/launch.h"
#include "kernels/device/plan_memory.h"
#include "kernels/device/upload.h"

namespace moe_efa::kernels::device {

using proto::Phase;

namespace {

constexpr double kKernelPatienceS = 2;  // more than the host's, which knows more to say
constexpr double kCopyPatienceS = 60;   // for a few bytes

}  // namespace

State::State(std::shared_ptr<Device> device, const proto::NodeView& view,
             const std::vector<proto::RegionMemory>& memory, const StateConfig& config)
    : device_(std::move(device)),
      config_(config),
      device_view_(view),
      most_chunks_(cuda::most_send_chunks(view.layout.config(), config.max_tokens, config.num_nics)) {
  const proto::LayoutConfig& layout = view.layout.config();
  if (!cuda::can_plan(layout)) {
    throw common::StatusError(
        {common::StatusCode::kConfig, -1, -1, -1, -1,
         "on a GPU top_k may be up to " + std::to_string(cuda::kWarpSize) + " and experts + 2 nodes up to " +
             std::to_string(cuda::most_plan_columns(layout.num_nodes)) + ", not " + std::to_string(layout.top_k) +
             " and " + std::to_string(cuda::plan_columns(layout))});
  }
  std::size_t nodes = layout.num_nodes, rings = num_rings();
  std::size_t num_experts = rings * layout.experts_per_rank;
  for (PhaseState& phase : phases_) {
    bool dispatch = &phase == phases_;
    phase.arguments_bytes = aligned(sizeof(cuda::CallState)) + aligned(rings * 8) + aligned(nodes * 8);
    if (!dispatch) phase.arguments_bytes += aligned(sizeof(cuda::CombineArgs));
    phase.staging_bytes = phase.arguments_bytes;
    std::size_t words = (nodes + rings) * most_chunks_ + 2 * rings;
    if (dispatch) {
      phase.arguments_bytes += aligned(sizeof(cuda::PackArgs)) + aligned(sizeof(cuda::RecordedPull)) +
                               aligned((layout.experts_per_rank + 1) * 4);  // of recordings
      phase.arguments_bytes += aligned(rings * sizeof(cuda::RingCall)) + aligned(num_experts * 4) +
                               aligned(num_experts * 8) + 2 * aligned((layout.experts_per_rank + 1) * 8) +
                               aligned(num_experts * 4) + aligned(layout.node_size * 8);
      // Beside the arguments: the tables of a plan.
      phase.staging_bytes = phase.arguments_bytes + table_bytes(layout);
    }
    phase.staging = take_host<std::byte>(phase.staging_bytes);
    phase.arguments = take_device<std::byte>(phase.arguments_bytes);
    phase.grids = take_device<cuda::GridState>(3);
    phase.faults = take_device<std::uint32_t>(1);
    phase.fault = take_host<cuda::Fault>(1);
    phase.words = take_device<std::uint32_t>(words);
    phase.ready_words = take_host<cuda::ChunkReady>(nodes * layout.slots);
    phase.ready = std::make_unique<cuda::ReadyQueue>(dispatch ? Phase::kDispatch : Phase::kCombine, layout.num_nodes,
                                                     layout.slots, phase.ready_words);
  }
  std::size_t rows = cuda::plan_rows(layout, config.max_tokens);
  scratch_.entry_begin = take_device<std::uint32_t>(rows + nodes);
  scratch_.entries = take_device<proto::RowEntry>(std::size_t{config.max_tokens} * layout.top_k);
  scratch_.expert_counts = take_device<std::uint32_t>(num_experts);
  std::size_t warps = std::size_t{cuda::kPlanBlocks} * (cuda::kPlanThreads / cuda::kWarpSize);
  scratch_.columns = take_device<std::uint32_t>(warps * cuda::plan_columns(layout));
  sizes_ = take_host<std::byte>(nodes * sizeof(cuda::SendView) + num_experts * 4);
  stop_ = take_host<std::uint64_t>(1);
  add_gates();

  std::size_t mates = memory.size();
  std::byte** bases = take_host<std::byte*>(3 * mates);
  for (std::size_t mate = 0; mate < mates; ++mate) {
    bases[mate] = memory[mate].region;
    bases[mates + mate] = memory[mate].slot_base();
    bases[2 * mates + mate] = memory[mate].kernel_word_base();
  }
  std::byte** placed = take_device<std::byte*>(3 * mates);
  Launch copied(*device_, Phase::kDispatch, device_->own_stream(0), true);
  device_->copy(placed, bases, 3 * mates * sizeof(*bases), copied.stream());
  copied.queued();
  MOE_EFA_CHECK(copied.wait_quiet(kCopyPatienceS),
                "the GPU did not copy " << mates << " addresses in " << kCopyPatienceS << " s");
  device_view_.regions = placed;
  device_view_.slot_bases = placed + mates;
  device_view_.kernel_word_bases = placed + 2 * mates;
}

State::~State() {
  for (void* memory : device_memory_) quietly([&] { device_->free(memory); });
  for (void* memory : host_memory_) quietly([&] { device_->free_host(memory); });
}

template <typename T>
T* State::take_device(std::size_t count) {
  device_memory_.push_back(device_->allocate(std::max<std::size_t>(1, count) * sizeof(T)));
  return static_cast<T*>(device_memory_.back());
}

template <typename T>
T* State::take_host(std::size_t count) {
  host_memory_.push_back(device_->allocate_host(std::max<std::size_t>(1, count) * sizeof(T)));
  return static_cast<T*>(host_memory_.back());
}

void State::add_gates() {
  gates_ = {take_host<GateWords>(kGatesAtOnce), take_device<std::uint64_t>(kGatesAtOnce)};
  gates_left_ = kGatesAtOnce;
}

State::Gates State::take_gates() {
  if (gates_left_ == 0) add_gates();
  gates_taken_ = true;
  std::uint32_t next = kGatesAtOnce - gates_left_--;
  return {gates_.words + next, gates_.run + next};
}

std::uint32_t State::num_rings() const {
  const proto::LayoutConfig& config = device_view_.layout.config();
  return config.node_size * config.num_nodes;
}

GridSizes State::grids(bool alone) const {
  // Beside a layer's products a call takes what keeps a link of 50 GB/s and the node's links busy; a call that its
  // stream waits for takes half of the device, so that a dispatch and a combine are always resident together.
  std::uint32_t sms = device_->facts().num_sms, most = std::max(4u, alone ? sms / 2 : std::min(sms / 2, 24u));
  GridSizes sizes{};
  sizes.pack = std::min(cuda::kPackBlocks, most);
  sizes.pack_rest = std::max(1u, std::min(cuda::kPackBlocks, most / 2));
  sizes.pull_and_rest = most;
  sizes.combine = {std::max(1u, most / 4), std::max(1u, most / 4), std::max(1u, most - 2 * (most / 4))};
  return sizes;
}

cuda::Watch State::watch(Phase which, std::uint32_t grid) {
  const PhaseState& state = phase(which);
  auto timeout_ns = static_cast<std::uint64_t>((config_.timeout_s + kKernelPatienceS) * 1e9);
  return {state.grids + grid, state.faults, state.fault, timeout_ns, device_view_.topology.rank, stop_};
}

void State::check(Phase phase) const {
  const cuda::Fault& fault = *phases_[static_cast<int>(phase)].fault;
  if (common::load_acquire(&fault.set) == 0) return;  // pairs with the release in report()
  try {
    cuda::raise(fault);
  } catch (const common::StatusError& error) {
    common::Status status = error.status();
    if (status.code != common::StatusCode::kInvalid) throw;
    // A kernel has seen a wrong argument, too late to refuse the call: the others have entered it.
    status.code = common::StatusCode::kTransport;
    status.rank = static_cast<int>(device_view_.topology.rank);
    status.phase = static_cast<int>(phase);
    status.message = "rank " + std::to_string(status.rank) + ": " + status.message;
    throw common::StatusError(status);
  }
}

bool State::feed(engine::DescriptorRing* descriptors) {
  if (descriptors == nullptr) return false;
  std::lock_guard lock(ready_mutex_);
  bool moved = false;
  for (PhaseState& phase : phases_) moved |= phase.ready->poll(*descriptors);
  return moved;
}

bool State::all_fed(Phase which) {
  std::lock_guard lock(ready_mutex_);
  return phase(which).ready->empty();
}

}  // namespace moe_efa::kernels::device
