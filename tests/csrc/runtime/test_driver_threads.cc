// Ranks as threads of one process: the real driver threads, pumps, engines and calls, with callers that pack and pull
// beside them, over rails within the process. Built with a thread sanitizer; every result is compared bit by bit.
// Workloads and expected results are the simulator's. A rank's kernels are those of the CPU, or those of a GPU on
// fibers.
#include <doctest/doctest.h>
#include <sched.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../device/emulated_device.h"
#include "../kernels/cuda_testing.h"
#include "inproc_rail.h"
#include "kernels/cpu/combine_call.h"
#include "kernels/cpu/dispatch_call.h"
#include "kernels/cpu/plan.h"
#include "kernels/device/combine_call.h"
#include "kernels/device/dispatch_call.h"
#include "kernels/device/plan_memory.h"
#include "runtime/driver.h"
#include "runtime/thread_pool.h"
#include "simulator/reference.h"
#include "simulator/workload.h"
#include "transport/reorder_rail.h"

using namespace moe_efa;
using simulator::Reference;
using simulator::ScriptCall;
using simulator::Workload;

namespace {

constexpr double kPatienceS = 60;
constexpr std::uint64_t kAlign = 128;

struct Options {
  bool reorder = false;
  std::size_t pool_threads = 1;
  std::uint32_t device_ranks = 0;  // the first so many have CUDA kernels
  bool one_node = false;           // instead of several
};

// The memory of all ranks, as a world wants it: each region in one block or in two.
struct Regions {
  std::vector<std::vector<std::byte>> memory;
  std::vector<proto::RegionMemory> all;
  std::vector<std::byte*> words, slots, kernel_words;  // of NodeView

  explicit Regions(const Workload& work) {
    const proto::RegionLayout layout(work.layout, 0);
    for (std::uint32_t rank = 0; rank < work.num_ranks; ++rank) {
      proto::RegionMemory& one = all.emplace_back();
      one.slots_begin = layout.slots_begin();
      one.bytes = layout.total_bytes();
      one.region = allocate(work.slots_apart ? one.slots_begin : one.bytes);
      std::memset(one.region, 0, layout.flag_bytes());
      if (work.slots_apart) {
        one.slots = allocate(one.bytes - one.slots_begin);
        std::uint64_t begin = layout.kernel_words_begin(), bytes = layout.flag_bytes() - begin;
        std::byte* words_apart = allocate(bytes);
        std::memset(words_apart, 0, bytes);
        one.kernel_words = words_apart - begin;
      }
      words.push_back(one.region);
      slots.push_back(one.slot_base());
      kernel_words.push_back(one.kernel_word_base());
    }
  }

  std::byte* allocate(std::uint64_t bytes) {
    std::byte* at = memory.emplace_back(bytes + kAlign, std::byte{0xEE}).data();
    return at + (kAlign - reinterpret_cast<std::uintptr_t>(at) % kAlign) % kAlign;
  }
};

// What all rank threads share.
struct Stage {
  Stage(const Workload& the_work, const Reference& the_reference) : work(the_work), reference(the_reference) {}

  const Workload& work;
  const Reference& reference;
  std::atomic<bool> broken{false};
  std::atomic<std::uint32_t> finished{0};
  std::mutex mutex;
  std::string text;  // of the first failure

  void fail(const std::string& why) {
    std::lock_guard lock(mutex);
    if (text.empty()) text = why;
    broken.store(true);
  }
};

class Rank {
 public:
  Rank(Stage& stage, testing::InprocFabric& fabric, const Regions& regions, std::uint32_t rank, const Options& options)
      : stage_(stage),
        topology_{stage.work.num_ranks, stage.work.node_size, rank},
        view_{topology_, proto::RegionLayout(stage.work.layout, topology_.node()),
              regions.words.data() + std::size_t{topology_.node()} * stage.work.node_size,
              regions.slots.data() + std::size_t{topology_.node()} * stage.work.node_size,
              regions.kernel_words.data() + std::size_t{topology_.node()} * stage.work.node_size},
        engine_({topology_, stage.work.layout, stage.work.num_nics, stage.work.max_writes_per_nic, view_.own(),
                 view_.own_slots()}),
        descriptors_(engine::max_descriptors(stage.work.layout)),
        state_(topology_),
        pool_(options.pool_threads) {
    std::vector<transport::Rail*> raw;
    for (std::uint32_t nic = 0; nic < stage.work.num_nics; ++nic) {
      std::unique_ptr<transport::Rail> rail =
          std::make_unique<testing::InprocRail>(fabric, rank, nic, stage.work.max_writes_per_nic);
      if (options.reorder) {
        transport::ReorderConfig faults;
        faults.seed = stage.work.seed;
        faults.rank = rank;
        faults.nic = nic;
        faults.max_outstanding = stage.work.max_writes_per_nic;
        faults.repeat_late = false;  // the peer reads by then: a race by design
        rail = std::make_unique<transport::ReorderRail>(std::move(rail), faults);
      }
      raw.push_back(rail.get());
      rails_.push_back(std::move(rail));
    }
    transport::PumpConfig config;
    config.writes_per_step = stage.work.writes_per_step;
    if (rank < options.device_ranks) {
      std::uint32_t max_tokens = 1;
      for (const auto& routings : stage.work.routings) {
        for (const simulator::Routing& routing : routings) max_tokens = std::max(max_tokens, routing.num_tokens);
      }
      std::vector<proto::RegionMemory> memory;
      for (std::uint32_t local = 0; local < topology_.node_size; ++local) {
        memory.push_back(regions.all[topology_.rank_of(topology_.node(), local)]);
      }
      device_ = std::make_unique<kernels::device::State>(
          std::make_shared<testing::EmulatedDevice>(true), view_, memory,
          kernels::device::StateConfig{max_tokens, stage.work.num_nics, kPatienceS});
    }
    pump_ = std::make_unique<transport::Pump>(engine_, view_, raw, descriptors_, config);
    driver_ = std::make_unique<runtime::Driver>(engine_, *pump_, rank % 2 == 0,
                                                [this](const common::Status& status) { stage_.fail(status.message); });
  }

  void run() {
    try {
      driver_->inspect([](engine::Engine& engine) { engine.on_hello_wanted(); });
      driver_->start();
      wait("hellos", [this] {
        bool met = false;
        driver_->inspect([&](engine::Engine& engine) { met = engine.all_hellos(); });
        return met;
      });
      driver_->enter();
      for (std::size_t i = 0; i < stage_.work.script.size() && !stage_.broken; ++i) {
        stage_.work.script[i].kind == ScriptCall::Kind::kCombine ? combine(i) : dispatch(i);
      }
      driver_->leave();
      wait("rest", [this] {
        bool idle = false;
        driver_->inspect([&](engine::Engine& engine) { idle = engine.idle() && descriptors_.empty(); });
        return idle;
      });
    } catch (const std::exception& error) {
      stage_.fail("rank " + std::to_string(topology_.rank) + ": " + error.what());
    }
    // Others may need this rank's progress until they have finished too (I13).
    stage_.finished.fetch_add(1);
    while (stage_.finished.load() < stage_.work.num_ranks && !stage_.broken) sched_yield();
    driver_->stop();
  }

 private:
  template <typename Ready>
  void wait(const char* what, const Ready& ready) {
    const double begin = runtime::monotonic_s();
    while (!ready()) {
      if (stage_.broken) return;
      if (runtime::monotonic_s() - begin > kPatienceS) throw std::runtime_error(std::string("no ") + what);
      // Now the driver thread alone, now this one too.
      if (++turns_ % 3 != 0 || !driver_->try_step()) sched_yield();
    }
  }

  kernels::CallContext context() {
    return {view_, state_, stage_.work.num_nodes() > 1 ? &descriptors_ : nullptr, pool_, stage_.work.num_nics};
  }

  std::shared_ptr<kernels::Plan> device_plan(const simulator::Routing& routing, std::int64_t capacity) {
    auto plan = std::make_shared<kernels::Plan>();
    plan->num_tokens = routing.num_tokens;
    plan->expert_alignment = stage_.work.alignment(topology_.rank);
    plan->capacity = capacity;
    if (plan->is_static()) plan->overflow = std::make_shared<std::int64_t>(0);
    plan->send.resize(topology_.num_nodes());
    memory_.emplace_back(kernels::device::send_bytes(stage_.work.layout, routing.num_tokens), testing::kPoison);
    return plan;
  }

  template <typename Call>
  void finish(const char* what, Call& call) {
    wait(what, [&] {
      call.step();
      return call.done();
    });
    if (!stage_.broken) return;
    device_->stop();  // what it reads and writes goes away with this rank
    call.launch().wait_quiet(kPatienceS);
  }

  void require(bool condition, std::size_t call, const char* what) {
    if (!condition) throw std::runtime_error("call " + std::to_string(call) + ": " + what + " differ");
  }

  void dispatch(std::size_t number) {
    const Workload& work = stage_.work;
    const ScriptCall& call = work.script[number];
    const simulator::Routing& routing = work.routing(call, topology_.rank);
    const bool fresh = call.kind == ScriptCall::Kind::kDispatch;
    if (fresh) {
      const std::int64_t capacity =
          work.is_static(call.plan) ? work.capacities[call.plan][topology_.rank] : kernels::Plan::kExact;
      plans_.push_back(
          device_ != nullptr
              ? device_plan(routing, capacity)
              : kernels::cpu::build_send_plan({routing.topk_idx.data(), routing.topk_weights.data(), routing.num_tokens,
                                               work.alignment(topology_.rank), work.num_nics, capacity},
                                              view_));
    }
    const kernels::Plan& plan = *plans_[call.plan];
    std::vector<std::byte> x = simulator::random_rows(work.seed, number, topology_.rank, routing.num_tokens,
                                                      work.layout.hidden_size, call.user_dtype);
    const proto::DType out_dtype = call.fp8_output ? proto::DType::kFp8 : call.user_dtype;
    const kernels::DispatchArgs args{x.data(), call.user_dtype, call.wire_dtype, out_dtype, plans_[call.plan]};
    std::vector<std::byte> out;
    std::vector<float> weights, scales;
    auto make_output = [&](std::int64_t rows) {
      out.assign(rows * work.layout.hidden_size * proto::dtype_bytes(out_dtype), std::byte{0xCD});
      weights.assign(rows, -12345.0f);
      scales.assign(call.fp8_output ? rows * proto::fp8_blocks(work.layout.hidden_size) : 0, -12345.0f);
      return kernels::DispatchOutput{out.data(), fresh ? weights.data() : nullptr, scales.data(), true};
    };
    if (device_ != nullptr) {
      kernels::device::DispatchOptions on;
      on.alone = number % 2 == 0;  // on the caller's stream, or on one of their own
      on.topk_idx = routing.topk_idx.data();
      on.topk_weights = routing.topk_weights.data();
      on.send_memory = fresh ? memory_.back().data() : nullptr;
      kernels::device::DispatchCall running(context(), *device_, args, on);
      wait("sizes", [&] {
        running.step();
        return running.sizes_known();
      });
      if (stage_.broken) return;
      if (fresh) memory_.emplace_back(running.plan_bytes(), testing::kPoison);
      running.set_output(make_output(plan.rows()), fresh ? memory_.back().data() : nullptr);
      finish("rows", running);
    } else {
      kernels::cpu::DispatchCall running(context(), args);
      wait("sizes", [&] {
        running.step();
        return running.sizes_known();
      });
      if (stage_.broken) return;
      running.set_output(make_output(plan.rows()));
      wait("rows", [&] {
        running.step();
        return running.done();
      });
    }
    if (stage_.broken) return;
    std::fill(x.begin(), x.end(), std::byte{0xEE});  // the user's again
    const Reference::Dispatched expected = stage_.reference.dispatched(number, topology_.rank);
    require(out == expected.x, number, "dispatched rows");
    require(same_bits(scales, expected.scales), number, "dispatched scales");
    if (fresh) require(same_bits(weights, expected.weights), number, "dispatched weights");
  }

  void combine(std::size_t number) {
    const Workload& work = stage_.work;
    const ScriptCall& call = work.script[number];
    const std::size_t tokens = work.routing(call, topology_.rank).num_tokens;
    Reference::CombineInput input = stage_.reference.combine_input(number, topology_.rank);
    std::vector<std::byte> out(tokens * work.layout.hidden_size * proto::dtype_bytes(call.user_dtype), std::byte{0xCD});
    std::vector<float> grads(tokens * work.layout.top_k, -12345.0f);
    static const float kNone = 0;
    kernels::CombineArgs args;
    args.y = input.y.data();
    args.y_dtype = call.user_dtype;
    args.wire_dtype = call.wire_dtype;
    args.plan = plans_[call.plan];
    if (call.weighted) args.weights = input.weights.empty() ? &kNone : input.weights.data();
    if (call.weight_grads) args.weight_grads = input.weight_grads.empty() ? &kNone : input.weight_grads.data();
    args.out = out.data();
    args.topk_weight_grads = call.weight_grads ? grads.data() : nullptr;
    if (device_ != nullptr) {
      kernels::device::CombineCall running(context(), *device_, args, nullptr, number % 2 == 0);
      finish("results", running);
    } else {
      kernels::cpu::CombineCall running(context(), args);
      wait("results", [&] {
        running.step();
        return running.done();
      });
    }
    if (stage_.broken) return;
    std::fill(input.y.begin(), input.y.end(), std::byte{0xEE});
    const Reference::Combined expected = stage_.reference.combined(number, topology_.rank);
    require(out == expected.out, number, "combined rows");
    if (work.is_static(call.plan)) {
      const std::int64_t overflow = stage_.reference.rows(call.plan, topology_.rank).overflow;
      const kernels::Plan& plan = *plans_[call.plan];
      const std::int64_t found =
          plan.device_view ? static_cast<std::int64_t>(*plan.device_view->overflow) : *plan.overflow;
      require(found == overflow, number, "required capacities");
    }
    if (call.weight_grads) require(same_bits(grads, expected.topk_weight_grads), number, "gradients of the weights");
  }

  static bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
  }

  Stage& stage_;
  proto::Topology topology_;
  proto::NodeView view_;
  engine::Engine engine_;
  engine::DescriptorRing descriptors_;
  kernels::RankState state_;
  runtime::ThreadPool pool_;
  std::vector<std::unique_ptr<transport::Rail>> rails_;
  std::unique_ptr<transport::Pump> pump_;
  std::unique_ptr<runtime::Driver> driver_;
  std::unique_ptr<kernels::device::State> device_;
  std::vector<testing::AlignedBytes> memory_;  // of plans, on the device
  std::vector<std::shared_ptr<kernels::Plan>> plans_;
  std::uint64_t turns_ = 0;
};

std::string run_world(const Workload& work, const Options& options) {
  const Regions regions(work);
  const Reference reference(work);
  Stage stage(work, reference);
  testing::InprocFabric fabric(regions.all, work.node_size, work.num_nics);
  std::vector<std::unique_ptr<Rank>> ranks;
  for (std::uint32_t rank = 0; rank < work.num_ranks; ++rank) {
    ranks.push_back(std::make_unique<Rank>(stage, fabric, regions, rank, options));
  }
  std::vector<std::thread> callers;
  for (auto& rank : ranks) callers.emplace_back([&rank] { rank->run(); });
  for (std::thread& caller : callers) caller.join();
  return stage.text;
}

bool fits(const Workload& work, const Options& options) {
  return (work.num_nodes() == 1) == options.one_node && work.script.size() <= 30;
}

// The first `count` workloads of four ranks with at least two nodes, or with one.
void run_worlds(std::uint64_t first_seed, int count, const Options& options) {
  std::uint32_t calls = 0;
  for (std::uint64_t seed = first_seed; count > 0; ++seed) {
    const Workload work = simulator::make_workload(seed, 4);
    if (!fits(work, options)) continue;
    --count;
    calls += static_cast<std::uint32_t>(work.script.size());
    CAPTURE(seed);
    const std::string failure = run_world(work, options);
    CHECK_MESSAGE(failure.empty(), failure);
  }
  MESSAGE(calls << " calls on 4 ranks");
}

}  // namespace

TEST_CASE("callers and driver threads share rings, flags and descriptors without a race") { run_worlds(1, 12, {}); }

TEST_CASE("also where the rails reorder, cut and repeat") {
  Options options;
  options.reorder = true;
  run_worlds(100, 12, options);
}

TEST_CASE("also where the kernels of a rank run on two threads") {
  Options options;
  options.reorder = true;
  options.pool_threads = 2;
  run_worlds(200, 4, options);
}

TEST_CASE("also where the kernels are those of a GPU, on some ranks or on all") {
  Options options;
  options.reorder = true;
  options.device_ranks =
      2;  // of these worlds each has a capacity that is too small, and tokens that lost rows elsewhere
  run_worlds(315, 1, options);
  options.device_ranks = 4;
  run_worlds(391, 1, options);
  options.one_node = true;  // of four: the order of ranks shows
  run_worlds(1700, 1, options);
}
