// DeviceCalls: a rank whose kernels are the CUDA ones, run on fibers (kernels/emulated_block.h), between the
// announcements and the driver that CPU ranks have. Launches are as on a GPU: plan and first chunks, then one grid that
// packs the rest and pulls; combine in one grid.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "../kernels/cuda_testing.h"
#include "kernels/cpu/announce.h"
#include "kernels/cuda/combine_body.h"
#include "kernels/cuda/pull_body.h"
#include "kernels/cuda/ready_queue.h"

namespace moe_efa::testing {

// Waits for a condition, with a deadline; false when the world is broken.
using WaitFor = std::function<void(const char* what, const std::function<bool()>& ready)>;

class DeviceCalls {
 public:
  explicit DeviceCalls(const proto::NodeView& view)
      : view_(view),
        config_(view.layout.config()),
        ready_{{proto::Phase::kDispatch, config_.num_nodes, config_.slots},
               {proto::Phase::kCombine, config_.num_nodes, config_.slots}} {}

  void dispatch(const kernels::CallContext& context, const kernels::DispatchArgs& args,
                const std::function<kernels::DispatchOutput(std::int64_t rows)>& output, const WaitFor& wait) {
    kernels::RankState& state = context.state;
    kernels::Plan& plan = *args.plan;
    std::uint32_t nodes = config_.num_nodes, num_rings = nodes * config_.node_size;
    bool replay = plan.complete;
    kernels::cpu::Announcement own = begin(state, proto::Phase::kDispatch, args.wire_dtype);
    if (!replay) plan.plan_id = own.epoch;
    own.plan_id = plan.plan_id;
    own.flags = replay ? proto::kFlagReplay : 0;
    std::vector<std::uint64_t> first_seq = state.dispatch_sent;
    std::vector<const kernels::RingFacts*> facts;
    std::vector<const std::vector<std::uint32_t>*> counts;
    for (std::uint32_t node = 0; node < nodes; ++node) {
      state.dispatch_sent[node] += plan.send[node].facts.num_chunks;
      facts.push_back(&plan.send[node].facts);
      counts.push_back(&plan.send[node].expert_counts);
      if (node == view_.topology.node()) continue;
      ready_[0].expect(node, own.epoch, first_seq[node], plan.send[node].facts.num_chunks);
    }
    wait_retired(own, wait);
    kernels::cpu::announce(context, own, facts.data(), first_seq.data(), replay ? nullptr : counts.data());

    kernels::cuda::CallState call{own.epoch, own.plan_id};
    kernels::cuda::FlatPlan send_plan(plan);
    AlignedBytes send_bytes = copy(send_plan);
    kernels::cuda::PackArgs pack{};
    pack.view = view_;
    pack.plan = place(send_plan, send_bytes);
    pack.x = args.x;
    pack.x_dtype = args.x_dtype;
    pack.wire_dtype = args.wire_dtype;
    pack.replay = replay;
    pack.chunk_end = std::min(config_.slots, config_.own_slots);
    pack.call = &call;
    pack.first_seq = first_seq.data();
    std::vector<std::uint32_t> pack_arrivals(nodes * pack.plan.send_chunks + 1);
    pack.arrivals = pack_arrivals.data();
    pack.ready = ready_[0].words();
    kernels::cuda::GridState grids[2] = {};
    pack.watch = watch(grids);
    launch(
        2, [&](EmulatedBlock& block, Shared& shared) { kernels::cuda::pack_body(block, pack, 2, shared.pull.tickets); },
        context, wait);

    std::vector<kernels::cuda::RingCall> rings(num_rings);
    std::vector<std::uint32_t> expert_counts(view_.topology.num_ranks * config_.experts_per_rank);
    std::vector<std::int64_t> expert_base(expert_counts.size());
    std::vector<kernels::RingFacts> ring_facts(num_rings);
    for (std::uint32_t ring = 0; ring < num_rings; ++ring) {
      std::uint32_t local = ring / nodes, node = ring % nodes;
      proto::CountsRecord record;
      wait("counts", [&] { return kernels::cpu::read_announcement(context, own, local, node, &record); });
      rings[ring] = {record.first_seq, static_cast<proto::DType>(record.dtype)};
      ring_facts[ring] = {record.rows, record.rows_per_chunk, record.num_chunks};
      state.dispatch_seen[ring] += record.num_chunks;
      std::uint32_t source = view_.topology.rank_of(node, local), per_rank = config_.experts_per_rank;
      if (replay) continue;
      std::memcpy(expert_counts.data() + source * per_rank,
                  view_.region(local) + view_.layout.counts(proto::Phase::kDispatch, node, own.epoch) + sizeof(record) +
                      std::size_t{view_.topology.local_rank()} * per_rank * 4,
                  per_rank * 4);
    }
    std::vector<std::uint32_t> num_pulls(num_rings);
    if (!replay) size_plan(plan, ring_facts, expert_counts, &expert_base, &num_pulls);
    kernels::DispatchOutput to = output(plan.rows());

    kernels::cuda::FlatPlan pull_plan(plan, replay ? std::vector<std::uint32_t>{} : num_pulls);
    AlignedBytes pull_bytes = copy(pull_plan);
    kernels::cuda::PullArgs pull{};
    pull.view = view_;
    pull.plan = place(pull_plan, pull_bytes);
    pull.rings = rings.data();
    pull.out_dtype = args.out_dtype;
    pull.replay = replay;
    pull.call = &call;
    pull.expert_counts = expert_counts.data();
    pull.expert_base = expert_base.data();
    pull.tokens_per_expert = plan.tokens_per_expert.data();
    pull.offsets = plan.offsets.data();
    pull.x = to.x;
    pull.weights = to.weights;
    pull.scales = to.scales;
    std::vector<std::uint32_t> arrivals(pull.plan.num_chunks + 1), pulled(num_rings);
    pull.arrivals = arrivals.data();
    pull.pulled = pulled.data();
    pull.watch = watch(grids + 1);
    pack.chunk_begin = pack.chunk_end;
    pack.chunk_end = ~0u;
    launch(
        3,
        [&](EmulatedBlock& block, Shared& shared) {
          if (block.block() < 1) {
            kernels::cuda::pack_body(block, pack, 1, shared.pull.tickets);
          } else {
            kernels::cuda::pull_body(block, pull, 2, shared.pull);
          }
        },
        context, wait);
    if (replay) return;
    kernels::cuda::read_back(pull.plan, &plan);
    for (kernels::SendPlan& send : plan.send) {
      send.entries = {};
      send.entry_begin = {};
      send.expert_counts = {};
    }
    plan.complete = true;
  }

  void combine(const kernels::CallContext& context, const kernels::CombineArgs& args, const WaitFor& wait) {
    kernels::RankState& state = context.state;
    const kernels::Plan& plan = *args.plan;
    std::uint32_t nodes = config_.num_nodes, num_rings = nodes * config_.node_size, local = view_.topology.local_rank();
    kernels::cpu::Announcement own = begin(state, proto::Phase::kCombine, args.wire_dtype);
    own.plan_id = plan.plan_id;
    own.flags = args.weight_grads != nullptr ? proto::kFlagWeightGrads : 0;
    std::vector<std::uint64_t> publish_seq = state.combine_seen, receive_seq = state.combine_received;
    for (std::uint32_t ring = 0; ring < num_rings; ++ring) state.combine_seen[ring] += plan.rings[ring].num_chunks;
    std::vector<const kernels::RingFacts*> facts;
    for (std::uint32_t node = 0; node < nodes; ++node) {
      state.combine_received[node] += plan.send[node].facts.num_chunks;
      facts.push_back(&plan.rings[local * nodes + node]);
      if (node == view_.topology.node()) continue;
      ready_[1].expect(node, own.epoch, publish_seq[local * nodes + node], facts.back()->num_chunks);
    }
    wait_retired(own, wait);
    kernels::cpu::announce(context, own, facts.data(), publish_seq.data() + local * nodes, nullptr);

    kernels::cuda::CallState call{own.epoch, own.plan_id};
    kernels::cuda::FlatPlan flat(plan);
    AlignedBytes bytes = copy(flat);
    kernels::cuda::CombineArgs combine{};
    combine.view = view_;
    combine.plan = place(flat, bytes);
    combine.y = args.y;
    combine.y_dtype = args.y_dtype;
    combine.wire_dtype = args.wire_dtype;
    combine.weights = args.weights;
    combine.weight_grads = args.weight_grads;
    combine.out = args.out;
    combine.topk_weight_grads = args.topk_weight_grads;
    combine.call = &call;
    combine.publish_seq = publish_seq.data();
    combine.receive_seq = receive_seq.data();
    std::vector<std::uint32_t> next(2 * num_rings), ring_arrivals(combine.plan.num_chunks + 1),
        send_arrivals(nodes * combine.plan.send_chunks + 1);
    combine.next = next.data();
    combine.ring_arrivals = ring_arrivals.data();
    combine.send_arrivals = send_arrivals.data();
    combine.ready = ready_[1].words();
    kernels::cuda::GridState grids[3] = {};
    combine.grids = grids;
    combine.watch = watch(nullptr);
    kernels::cuda::CombineBlocks blocks{1, 1, 2};
    launch(
        4,
        [&](EmulatedBlock& block, Shared& shared) {
          kernels::cuda::combine_body(block, combine, blocks, shared.combine);
        },
        context, wait);
    // Everyone this rank exchanges anything with has entered the same call.
    proto::CountsRecord record;
    for (std::uint32_t mate = 0; mate < config_.node_size; ++mate) {
      wait("mates",
           [&] { return kernels::cpu::read_announcement(context, own, mate, view_.topology.node(), &record); });
    }
    for (std::uint32_t node = 0; node < nodes; ++node) {
      wait("rail peers", [&] { return kernels::cpu::read_announcement(context, own, local, node, &record); });
    }
  }

 private:
  union Shared {
    Shared() : pull{} {}
    kernels::cuda::PullShared pull;
    kernels::cuda::CombineShared combine;
  };

  kernels::cpu::Announcement begin(kernels::RankState& state, proto::Phase phase, proto::DType wire_dtype) {
    kernels::cpu::Announcement own;
    own.phase = phase;
    own.epoch = state.epoch[static_cast<int>(phase)]++;
    own.call = state.call++;
    own.dtype = wire_dtype;
    return own;
  }

  void wait_retired(const kernels::cpu::Announcement& own, const WaitFor& wait) {
    if (config_.num_nodes == 1) return;
    wait("retired epochs",
         [&] { return common::load_acquire(view_.own_word(view_.layout.retired(own.phase))) + 1 >= own.epoch; });
  }

  // As DispatchCall::finish_sizes does.
  void size_plan(kernels::Plan& plan, const std::vector<kernels::RingFacts>& rings,
                 const std::vector<std::uint32_t>& counts, std::vector<std::int64_t>* base,
                 std::vector<std::uint32_t>* num_pulls) {
    std::uint32_t per_rank = config_.experts_per_rank, nodes = config_.num_nodes;
    plan.tokens_per_expert.assign(per_rank, 0);
    plan.offsets.assign(per_rank + 1, 0);
    for (std::uint32_t expert = 0; expert < per_rank; ++expert) {
      std::int64_t row = plan.offsets[expert];
      for (std::uint32_t rank = 0; rank < view_.topology.num_ranks; ++rank) {
        (*base)[rank * per_rank + expert] = row;
        row += counts[rank * per_rank + expert];
        (*num_pulls)[rank % config_.node_size * nodes + rank / config_.node_size] += counts[rank * per_rank + expert];
      }
      plan.tokens_per_expert[expert] = row - plan.offsets[expert];
      plan.offsets[expert + 1] =
          plan.offsets[expert] + common::round_up<std::int64_t>(plan.tokens_per_expert[expert], plan.expert_alignment);
    }
    plan.rings = rings;
    plan.pulls.resize(rings.size());
    plan.mask_bytes = common::ceil_div(config_.node_size, 8u);
    plan.masks.resize(nodes);
    for (std::size_t i = 0; i < rings.size(); ++i) plan.pulls[i].resize(rings[i].num_chunks);
    for (std::uint32_t node = 0; node < nodes; ++node) {
      plan.masks[node].assign(std::size_t{rings[view_.topology.local_rank() * nodes + node].rows} * plan.mask_bytes, 0);
    }
  }

  static AlignedBytes copy(const kernels::cuda::FlatPlan& plan) { return AlignedBytes(plan.bytes().size()); }
  static kernels::cuda::PlanView place(kernels::cuda::FlatPlan& plan, AlignedBytes& bytes) {
    kernels::cuda::PlanView view = plan.place(bytes.data());
    bytes = plan.bytes();
    return view;
  }

  kernels::cuda::Watch watch(kernels::cuda::GridState* grid) {
    return {grid, &faults_, &fault_, 60'000'000'000, view_.topology.rank};
  }

  // Runs a grid beside this thread, which plays the part of the driver that looks at ready words.
  template <class Body>
  void launch(std::uint32_t num_blocks, const Body& body, const kernels::CallContext& context, const WaitFor& wait) {
    std::atomic<bool> done{false};
    std::thread grid([&] {
      run_grid<Shared>(num_blocks, kWarpSize, ++seed_, body);
      done.store(true);
    });
    auto poll = [&] {
      bool finished = done.load();
      if (context.descriptors != nullptr) {
        for (kernels::cuda::ReadyQueue& queue : ready_) queue.poll(*context.descriptors);
      }
      return finished;
    };
    try {
      wait("a grid", poll);
    } catch (...) {
      grid.join();
      throw;
    }
    grid.join();
    kernels::cuda::raise(fault_);
  }

  proto::NodeView view_;
  proto::LayoutConfig config_;
  kernels::cuda::ReadyQueue ready_[2];
  std::uint32_t faults_ = 0;
  kernels::cuda::Fault fault_{};
  std::uint64_t seed_ = 0;
};

}  // namespace moe_efa::testing
