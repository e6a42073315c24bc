#include "kernels_shim.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/pack.h"
#include "kernels/cpu/plan.h"
#include "kernels/cuda/combine.h"
#include "kernels/cuda/pack.h"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/plan_view.h"
#include "kernels/cuda/pull.h"
#include "kernels/launch.h"
#include "shim_memory.h"
#include "waits.h"

namespace moe_efa::bench {

namespace {

using kernels::cuda::CallState;
using kernels::cuda::ChunkReady;
using kernels::cuda::Fault;
using kernels::cuda::GridState;
using proto::DType;
using proto::Phase;

constexpr std::uint64_t kEpoch = 5, kPlanId = 3;
constexpr auto kDispatch = Phase::kDispatch;

// Of every wait of a kernel: none has long to wait, but under a tool that slows it down.
std::uint64_t timeout_ns() {
  const char* text = std::getenv("SHIM_TIMEOUT_S");
  std::uint64_t seconds = text == nullptr ? 0 : std::strtoul(text, nullptr, 10);
  return std::uint64_t{1'000'000'000} * (seconds == 0 ? 2 : seconds);
}

[[noreturn]] void fail(const std::string& text) { throw std::runtime_error(text); }

// Memory that somebody else owns, handed out in order. Without a base it only adds up.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<std::byte*>(base)) {}

  template <typename T>
  T* take(std::size_t count) {
    used_ = common::round_up<std::size_t>(used_, 256);
    std::byte* at = base_ == nullptr ? nullptr : base_ + used_;
    used_ += std::max<std::size_t>(count, 1) * sizeof(T);
    return reinterpret_cast<T*>(at);
  }
  std::size_t used() const { return used_; }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

// One rank: with one node all of its experts are its own, and a token goes all the way; with several it packs.
class World {
 public:
  World(const ShimShape& shape, const std::int64_t* topk_idx, const float* topk_weights)
      : shape_(shape),
        topk_idx_(topk_idx, topk_idx + std::size_t{shape.num_tokens} * shape.top_k),
        topk_weights_(topk_weights, topk_weights + topk_idx_.size()) {
    if (shape.num_nodes == 1 && shape.node_size != 1) fail("one node of several ranks: nobody plays the mates");
    proto::LayoutConfig config;
    config.num_nodes = shape.num_nodes;
    config.node_size = shape.node_size;
    config.experts_per_rank = shape.experts_per_rank;
    config.top_k = shape.top_k;
    config.hidden_size = shape.hidden_size;
    config.dispatch_dtypes = static_cast<DType>(shape.wire_dtype);
    config.combine_dtypes = static_cast<DType>(shape.combine_dtype);
    config.chunk_rows = shape.chunk_rows;
    proto::Topology topology{shape.num_nodes * shape.node_size, shape.node_size, 0};
    proto::NodeView unsized{topology, proto::RegionLayout(config, 0), nullptr};
    plan_ = kernels::cpu::build_send_plan(
        {topk_idx_.data(), topk_weights_.data(), shape.num_tokens, shape.expert_alignment, shape.num_nics}, unsized);
    plan_->plan_id = kPlanId;
    std::uint32_t most_chunks = 2;
    for (const kernels::SendPlan& send : plan_->send) most_chunks = std::max(most_chunks, send.facts.num_chunks);
    config.slots = config.own_slots = most_chunks;  // room for all: nobody gives credits back
    config.publish_slots = 2;
    host_view_ = {topology, proto::RegionLayout(config, 0), nullptr};
    if (shape.num_nodes == 1) expect_own_rows();
    flat_.emplace(*plan_, num_pulls_);
    lay_out(Arena(nullptr), Arena(nullptr));
  }

  ShimFacts facts() const {
    ShimFacts facts{};
    facts.device_bytes = device_bytes_;
    facts.host_bytes = host_bytes_;
    const proto::LayoutConfig& config = host_view_.layout.config();
    std::uint64_t row_bytes = proto::hidden_row_bytes(config.hidden_size, static_cast<DType>(shape_.wire_dtype));
    for (std::uint32_t node = 0; node < shape_.num_nodes; ++node) {
      const kernels::SendPlan& send = plan_->send[node];
      std::uint64_t bytes = 0;
      for (std::uint32_t chunk = 0; chunk < send.facts.num_chunks; ++chunk) {
        std::uint32_t first = send.facts.first_row(chunk), rows = send.facts.rows_in(chunk);
        bytes += proto::dispatch_chunk_bytes(false, rows, send.entry_begin[first + rows] - send.entry_begin[first],
                                             row_bytes);
      }
      facts.rows += send.facts.rows;
      facts.entries += send.entries.size();
      facts.chunks += send.facts.num_chunks;
      facts.chunk_bytes += bytes;
      if (node == 0) continue;
      facts.remote_rows += send.facts.rows;
      facts.remote_bytes += bytes;
    }
    for (std::uint32_t token = 0; token < shape_.num_tokens; ++token) {
      const std::int64_t* ids = topk_idx_.data() + std::size_t{token} * shape_.top_k;
      facts.tokens += std::any_of(ids, ids + shape_.top_k, [](std::int64_t id) { return id >= 0; }) ? 1 : 0;
    }
    facts.output_rows = shape_.num_nodes == 1 ? static_cast<std::uint64_t>(plan_->rows()) : 0;
    return facts;
  }

  void place(void* device, void* host, const ShimTensors& tensors) {
    tensors_ = tensors;
    lay_out(Arena(device), Arena(host));
    std::vector<std::byte*> regions(shape_.node_size, region_);
    transfer(regions_, regions.data(), regions.size() * sizeof(regions[0]));
    plan_view_ = flat_->place(plan_bytes_);
    transfer(plan_bytes_, flat_->bytes().data(), flat_->bytes().size());
    CallState call{kEpoch, kPlanId};
    transfer(call_, &call, sizeof(call));
    std::vector<std::byte> zeros(zeroed_bytes_);
    transfer(zeroed_, zeros.data(), zeros.size());
    std::vector<std::byte> flags(host_view_.layout.flag_bytes());
    transfer(no_flags_, flags.data(), flags.size());
    transfer(region_, flags.data(), flags.size());
    for (std::uint32_t chunk = 0; shape_.num_nodes == 1 && chunk < plan_->send[0].facts.num_chunks; ++chunk) {
      *reinterpret_cast<std::uint64_t*>(flags.data() + host_view_.layout.arrived(kDispatch, 0, chunk)) = chunk + 1;
    }
    transfer(arrived_flags_, flags.data(), flags.size());
    std::memset(static_cast<void*>(ready_), 0, num_ready() * sizeof(ChunkReady));
    std::memset(static_cast<void*>(fault_), 0, sizeof(Fault));
    if (shape_.num_nodes > 1) return;
    transfer(expert_counts_, counts_.data(), counts_.size() * sizeof(counts_[0]));
    transfer(expert_base_, base_.data(), base_.size() * sizeof(base_[0]));
    transfer(tokens_per_expert_, plan_->tokens_per_expert.data(), counts_.size() * sizeof(std::int64_t));
    transfer(offsets_, plan_->offsets.data(), (counts_.size() + 1) * sizeof(std::int64_t));
    kernels::cuda::RingCall ring{0, static_cast<DType>(shape_.wire_dtype)};
    transfer(ring_call_, &ring, sizeof(ring));
  }

  void prepare(std::uint32_t op, void* stream) {
    if (op == kShimPlan) return;
    transfer_on(region_, op == kShimPull ? arrived_flags_ : no_flags_, host_view_.layout.flag_bytes(), stream);
    transfer_on(ready_, no_ready_, num_ready() * sizeof(ChunkReady), stream);
  }

  void launch(std::uint32_t op, std::uint32_t blocks, std::uint32_t more, void* stream) {
    if (op > kShimPack && shape_.num_nodes > 1) fail("a world of several nodes only plans and packs");
    if (op == kShimPlan) {
      kernels::cuda::launch_plan(plan_args(), stream);
    } else if (op == kShimPack) {
      kernels::cuda::launch_pack(pack_args(), blocks, stream);
    } else if (op == kShimPull) {
      kernels::cuda::launch_pull(pull_args(), blocks, nullptr, 0, stream);
    } else {
      kernels::cuda::launch_combine(combine_args(), {0, blocks, more}, stream);
    }
  }

  void finish(void* stream) {
    bench::finish(stream);
    kernels::cuda::raise(*fault_);
  }

  void check_plan() {
    std::vector<kernels::cuda::SendView> sent(shape_.num_nodes);
    transfer(sent.data(), made_.send, sent.size() * sizeof(sent[0]));
    std::uint32_t per_node = shape_.experts_per_rank * shape_.node_size;
    std::vector<std::uint32_t> counts(std::size_t{per_node} * shape_.num_nodes);
    transfer(counts.data(), made_.expert_counts, counts.size() * sizeof(counts[0]));
    for (std::uint32_t node = 0; node < shape_.num_nodes; ++node) {
      const kernels::SendPlan& expected = plan_->send[node];
      if (!(sent[node].facts == expected.facts)) fail("plan: rows or cuts of a node differ");
      same(sent[node].row_token, expected.row_token, "plan: tokens");
      same(sent[node].entry_begin, expected.entry_begin, "plan: entries of rows");
      same(sent[node].entries, expected.entries, "plan: entries");
      if (!std::equal(expected.expert_counts.begin(), expected.expert_counts.end(), counts.begin() + node * per_node)) {
        fail("plan: rows of experts differ");
      }
    }
  }

  void check_pack(const void* x_host) {
    kernels::DispatchArgs dispatch;
    dispatch.x = x_host;
    dispatch.wire_dtype = static_cast<DType>(shape_.wire_dtype);
    dispatch.plan = plan_;
    const proto::RegionLayout& layout = host_view_.layout;
    std::vector<std::byte> found(layout.slot_bytes(kDispatch)), expected;
    std::vector<std::byte> flags(layout.flag_bytes());
    transfer(flags.data(), region_, flags.size());
    for (std::uint32_t node = 0; node < shape_.num_nodes; ++node) {
      for (std::uint32_t chunk = 0; chunk < plan_->send[node].facts.num_chunks; ++chunk) {
        bool own = node == 0;
        transfer(found.data(),
                 region_ + (own ? layout.ring_slot(kDispatch, 0, chunk) : layout.send_slot(kDispatch, node, chunk)),
                 found.size());
        expected = found;  // what lies between metadata and rows is nobody's
        std::uint32_t bytes =
            kernels::cpu::pack_chunk({&dispatch, node, chunk, chunk, kEpoch, expected.data()}, host_view_);
        std::ostringstream where;
        where << "pack: chunk " << chunk << " for node " << node;
        if (found != expected) fail(where.str() + " differs");
        if (own) {
          std::uint64_t word;
          std::memcpy(&word, flags.data() + layout.arrived(kDispatch, 0, chunk), sizeof(word));
          if (word != chunk + 1) fail(where.str() + " was not told of");
        } else {
          const ChunkReady& word = ready_[std::size_t{node} * layout.config().slots + chunk];
          if (word.seq_plus_1 != chunk + 1 || word.bytes != bytes) fail(where.str() + " was told of wrongly");
        }
      }
    }
  }

 private:
  // What the plan of a rank that gets its own rows says before they are pulled.
  void expect_own_rows() {
    const kernels::SendPlan& own = plan_->send[0];
    counts_ = own.expert_counts;
    plan_->rings = {own.facts};
    plan_->pulls.resize(1);
    plan_->pulls[0].resize(own.facts.num_chunks);
    plan_->masks.resize(1);
    plan_->masks[0].assign(own.facts.rows, 0);
    plan_->mask_bytes = 1;
    plan_->offsets = {0};
    plan_->tokens_per_expert.clear();
    for (std::uint32_t count : counts_) {
      base_.push_back(plan_->offsets.back());
      plan_->tokens_per_expert.push_back(count);
      plan_->offsets.push_back(base_.back() + common::round_up<std::int64_t>(count, shape_.expert_alignment));
    }
    num_pulls_ = {static_cast<std::uint32_t>(own.entries.size())};
  }

  std::size_t num_ready() const { return std::size_t{shape_.num_nodes} * host_view_.layout.config().slots; }

  void lay_out(Arena device, Arena host) {
    const proto::LayoutConfig& config = host_view_.layout.config();
    region_ = device.take<std::byte>(host_view_.layout.total_bytes());
    regions_ = device.take<std::byte*>(shape_.node_size);
    plan_bytes_ = device.take<std::byte>(flat_->bytes().size());
    call_ = device.take<CallState>(1);
    no_flags_ = device.take<std::byte>(host_view_.layout.flag_bytes());
    arrived_flags_ = device.take<std::byte>(host_view_.layout.flag_bytes());
    // plan
    std::size_t rows = kernels::cuda::plan_rows(config, shape_.num_tokens);
    made_.send = device.take<kernels::cuda::SendView>(shape_.num_nodes);
    made_.row_token = device.take<std::uint32_t>(rows);
    made_.entry_begin = device.take<std::uint32_t>(rows + shape_.num_nodes);
    made_.entries = device.take<proto::RowEntry>(topk_idx_.size());
    made_.expert_counts =
        device.take<std::uint32_t>(std::size_t{config.experts_per_rank} * config.node_size * config.num_nodes);
    made_.columns = device.take<std::uint32_t>(std::size_t{kernels::cuda::kPlanBlocks} * kernels::cuda::kPlanThreads /
                                               32 * kernels::cuda::plan_columns(config));
    // pull
    std::size_t experts = std::max<std::size_t>(counts_.size(), 1);
    expert_counts_ = device.take<std::uint32_t>(experts);
    expert_base_ = device.take<std::int64_t>(experts);
    tokens_per_expert_ = device.take<std::int64_t>(experts);
    offsets_ = device.take<std::int64_t>(experts + 1);
    ring_call_ = device.take<kernels::cuda::RingCall>(1);
    // Zeros, in one piece.
    std::uint32_t send_chunks = config.slots, chunks = shape_.num_nodes * send_chunks;
    std::size_t begin = device.used();
    zeroed_ = device.take<std::byte>(1);
    grids_ = device.take<GridState>(3);
    faults_ = device.take<std::uint32_t>(1);
    first_seq_ = device.take<std::uint64_t>(shape_.num_nodes);
    arrivals_ = device.take<std::uint32_t>(chunks);
    pulled_ = device.take<std::uint32_t>(1);
    next_ = device.take<std::uint32_t>(2);
    send_arrivals_ = device.take<std::uint32_t>(chunks);
    no_ready_ = device.take<ChunkReady>(num_ready());
    zeroed_bytes_ = device.used() - common::round_up<std::size_t>(begin, 256);
    device_bytes_ = device.used();
    ready_ = host.take<ChunkReady>(num_ready());
    fault_ = host.take<Fault>(1);
    host_bytes_ = host.used();
  }

  proto::NodeView view() const { return {host_view_.topology, host_view_.layout, regions_}; }
  kernels::cuda::Watch watch() const { return {grids_, faults_, fault_, timeout_ns(), 0}; }

  kernels::cuda::PlanArgs plan_args() const {
    kernels::cuda::PlanArgs args = made_;
    args.config = host_view_.layout.config();
    args.topk_idx = tensors_.topk_idx;
    args.topk_weights = tensors_.topk_weights;
    args.num_tokens = shape_.num_tokens;
    args.num_nics = shape_.num_nics;
    args.watch = watch();
    return args;
  }

  kernels::cuda::PackArgs pack_args() const {
    kernels::cuda::PackArgs args{};
    args.view = view();
    args.plan = plan_view_;
    args.x = tensors_.x;
    args.x_dtype = DType::kBf16;
    args.wire_dtype = static_cast<DType>(shape_.wire_dtype);
    args.chunk_end = ~0u;
    args.call = call_;
    args.first_seq = first_seq_;
    args.arrivals = arrivals_;
    args.ready = ready_;
    args.watch = watch();
    return args;
  }

  kernels::cuda::PullArgs pull_args() const {
    kernels::cuda::PullArgs args{};
    args.view = view();
    args.plan = plan_view_;
    args.rings = ring_call_;
    args.out_dtype = static_cast<DType>(shape_.out_dtype);
    args.call = call_;
    args.expert_counts = expert_counts_;
    args.expert_base = expert_base_;
    args.tokens_per_expert = tokens_per_expert_;
    args.offsets = offsets_;
    args.num_rows = plan_->rows();
    args.usable_rows = plan_->usable_rows();
    args.x = tensors_.rows;
    args.weights = tensors_.row_weights;
    args.scales = tensors_.row_scales;
    args.arrivals = arrivals_;
    args.pulled = pulled_;
    args.watch = watch();
    return args;
  }

  kernels::cuda::CombineArgs combine_args() const {
    kernels::cuda::CombineArgs args{};
    args.view = view();
    args.plan = plan_view_;
    args.y = tensors_.y;
    args.y_dtype = DType::kBf16;
    args.wire_dtype = static_cast<DType>(shape_.combine_dtype);
    args.weights = tensors_.row_weights;
    args.out = tensors_.out;
    args.call = call_;
    args.publish_seq = first_seq_;
    args.receive_seq = first_seq_;
    args.next = next_;
    args.ring_arrivals = arrivals_;
    args.send_arrivals = send_arrivals_;
    args.ready = ready_;
    args.grids = grids_;
    args.watch = watch();
    return args;
  }

  // Elements of a device array against those of the CPU.
  template <typename T>
  static void same(const T* device, const std::vector<T>& expected, const char* what) {
    std::vector<T> found(expected.size());
    transfer(found.data(), device, found.size() * sizeof(T));
    if (!found.empty() && std::memcmp(found.data(), expected.data(), found.size() * sizeof(T)) != 0) {
      fail(std::string(what) + " differ");
    }
  }

  ShimShape shape_;
  std::vector<std::int64_t> topk_idx_;
  std::vector<float> topk_weights_;
  std::shared_ptr<kernels::Plan> plan_;
  std::vector<std::uint32_t> counts_, num_pulls_;
  std::vector<std::int64_t> base_;
  proto::NodeView host_view_;  // without regions
  std::optional<kernels::cuda::FlatPlan> flat_;
  ShimTensors tensors_{};
  std::size_t device_bytes_ = 0, host_bytes_ = 0, zeroed_bytes_ = 0;

  // In device memory.
  std::byte *region_ = nullptr, *plan_bytes_ = nullptr, *no_flags_ = nullptr, *arrived_flags_ = nullptr,
            *zeroed_ = nullptr;
  std::byte** regions_ = nullptr;
  kernels::cuda::PlanView plan_view_{};
  CallState* call_ = nullptr;
  kernels::cuda::PlanArgs made_{};  // what plan writes
  std::uint32_t* expert_counts_ = nullptr;
  std::int64_t *expert_base_ = nullptr, *tokens_per_expert_ = nullptr, *offsets_ = nullptr;
  kernels::cuda::RingCall* ring_call_ = nullptr;
  GridState* grids_ = nullptr;
  std::uint32_t *faults_ = nullptr, *arrivals_ = nullptr, *pulled_ = nullptr, *next_ = nullptr,
                *send_arrivals_ = nullptr;
  std::uint64_t* first_seq_ = nullptr;
  ChunkReady* no_ready_ = nullptr;
  // In mapped host memory.
  ChunkReady* ready_ = nullptr;
  Fault* fault_ = nullptr;
};

double flag_latency(void* host, std::uint64_t rounds, void* stream) {
  auto* words = static_cast<std::uint64_t*>(host);  // a line of 128 bytes for each
  std::uint64_t *ping = words, *pong = words + 16, *elapsed_ns = words + 32;
  *ping = *pong = *elapsed_ns = 0;
  FlagLatencyArgs args{ping, pong, elapsed_ns, rounds, 1'000'000'000};
  std::atomic<bool> over{false};
  std::thread answering([&] {
    std::uint64_t seen = 0;
    while (seen < rounds && !over.load(std::memory_order_relaxed)) {
      std::uint64_t now = __atomic_load_n(ping, __ATOMIC_ACQUIRE);
      if (now == seen) continue;
      seen = now;
      __atomic_store_n(pong, seen, __ATOMIC_RELEASE);
    }
  });
  std::string problem;
  try {
    launch_flag_latency(args, stream);
    finish(stream);
  } catch (const std::exception& error) {
    problem = error.what();
  }
  over = true;
  answering.join();
  if (!problem.empty()) fail(problem);
  if (*elapsed_ns == 0) fail("an answer of the host was not seen within a second");
  return static_cast<double>(*elapsed_ns) / 1e3 / static_cast<double>(rounds);
}

thread_local std::string last_error;

template <class Action>
int guarded(const Action& action) {
  try {
    action();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    forget_error();
    return 1;
  }
}

}  // namespace

}  // namespace moe_efa::bench

using moe_efa::bench::guarded;
using moe_efa::bench::World;

extern "C" {

const char* shim_error() { return moe_efa::bench::last_error.c_str(); }

int shim_sizes(std::uint64_t* shape, std::uint64_t* facts, std::uint64_t* tensors) {
  *shape = sizeof(ShimShape);
  *facts = sizeof(ShimFacts);
  *tensors = sizeof(ShimTensors);
  return 0;
}

void* shim_create(const ShimShape* shape, const std::int64_t* topk_idx, const float* topk_weights, ShimFacts* facts) {
  World* world = nullptr;
  guarded([&] {
    world = new World(*shape, topk_idx, topk_weights);
    *facts = world->facts();
  });
  return world;
}

void shim_destroy(void* world) { delete static_cast<World*>(world); }

int shim_place(void* world, void* device, void* host, const ShimTensors* tensors) {
  return guarded([&] { static_cast<World*>(world)->place(device, host, *tensors); });
}

int shim_prepare(void* world, std::uint32_t op, void* stream) {
  return guarded([&] { static_cast<World*>(world)->prepare(op, stream); });
}

int shim_launch(void* world, std::uint32_t op, std::uint32_t blocks, std::uint32_t more, void* stream) {
  return guarded([&] { static_cast<World*>(world)->launch(op, blocks, more, stream); });
}

int shim_finish(void* world, void* stream) {
  return guarded([&] { static_cast<World*>(world)->finish(stream); });
}

int shim_check(void* world, std::uint32_t op, const void* x_host) {
  return guarded([&] {
    if (op == kShimPlan) {
      static_cast<World*>(world)->check_plan();
    } else {
      static_cast<World*>(world)->check_pack(x_host);
    }
  });
}

int shim_flag_latency(void* host, std::uint64_t rounds, void* stream, double* round_trip_us) {
  return guarded([&] { *round_trip_us = moe_efa::bench::flag_latency(host, rounds, stream); });
}

int shim_pause(std::uint64_t nanoseconds, void* stream) {
  return guarded([&] { moe_efa::bench::launch_pause(nanoseconds, stream); });
}

}  // extern "C"
