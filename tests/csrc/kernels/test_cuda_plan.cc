// The body of the CUDA plan kernel, run on fibers: rows, entries, counts and cuts are those of the CPU kernel, for any
// number of blocks.
#include <doctest/doctest.h>

#include "cuda_testing.h"
#include "kernels/cuda/plan_body.h"

using namespace moe_efa;
using namespace moe_efa::testing;

namespace {

struct Shared {
  kernels::cuda::Tickets tickets;
  std::uint32_t words[4096];
};

struct Planning {
  Planning(std::uint32_t nodes, std::uint32_t top_k, std::uint32_t tokens, const std::string& routing,
           std::uint64_t seed, std::uint32_t num_nics = 1) {
    config.num_nodes = nodes;
    config.node_size = 2;
    config.experts_per_rank = 5;
    config.top_k = top_k;
    config.chunk_rows = 9;
    view = {{nodes * 2, 2, 0}, proto::RegionLayout(config, 0), nullptr};
    topk = random_routing(tokens, top_k, 10 * nodes, routing, seed);
    for (std::size_t i = 0; i < topk.size(); ++i) weights.push_back(static_cast<float>(i) + 0.5f);
    std::size_t rows = kernels::cuda::plan_rows(config, tokens);
    row_token.assign(rows, ~0u);
    entry_begin.assign(rows + nodes, ~0u);
    entries.assign(topk.size(), {});
    counts.assign(10 * nodes, ~0u);
    send.assign(nodes, {});
    args.config = config;
    args.topk_idx = topk.data();
    args.topk_weights = weights.data();
    args.num_tokens = tokens;
    args.num_nics = num_nics;
    args.send = send.data();
    args.row_token = row_token.data();
    args.entry_begin = entry_begin.data();
    args.entries = entries.data();
    args.expert_counts = counts.data();
    args.watch = {&grid, &faults, &fault, 20'000'000'000, 0};
  }

  void run(std::uint32_t blocks, std::uint32_t threads, std::uint64_t seed) {
    if (kOnGpu) {
      blocks = kernels::cuda::kPlanBlocks;
      threads = kernels::cuda::kPlanThreads;
    }
    columns.assign(blocks * threads / 32 * kernels::cuda::plan_columns(config), ~0u);
    args.columns = columns.data();
#if defined(MOE_EFA_TEST_ON_GPU)
    kernels::cuda::launch_plan(args, nullptr);
    return finish_kernels();
#endif
    run_grid<Shared>(blocks, threads, seed, [&](EmulatedBlock& block, Shared& shared) {
      kernels::cuda::plan_body(block, args, shared.tickets, shared.words);
    });
  }

  void check() {
    CHECK(fault.set == 0);
    auto plan = kernels::cpu::build_send_plan({topk.data(), weights.data(), args.num_tokens, 1, args.num_nics}, view);
    for (std::uint32_t node = 0; node < config.num_nodes; ++node) {
      const kernels::SendPlan& expected = plan->send[node];
      const kernels::cuda::SendView& found = send[node];
      REQUIRE(found.facts == expected.facts);
      CHECK(found.facts.num_chunks <= kernels::cuda::most_send_chunks(config, args.num_tokens, args.num_nics));
      auto same = [](const auto* a, const auto& b) {
        return b.empty() || std::memcmp(a, b.data(), b.size() * sizeof(b[0])) == 0;
      };
      CHECK(same(found.row_token, expected.row_token));
      CHECK(same(found.entry_begin, expected.entry_begin));
      CHECK(same(found.entries, expected.entries));
      CHECK(same(counts.data() + node * 10, expected.expert_counts));
    }
  }

  proto::LayoutConfig config;
  proto::NodeView view;
  std::vector<std::int64_t> topk;
  std::vector<float> weights;
  std::vector<std::uint32_t> row_token, entry_begin, counts, columns;
  std::vector<proto::RowEntry> entries;
  std::vector<kernels::cuda::SendView> send;
  kernels::cuda::GridState grid{};
  std::uint32_t faults = 0;
  kernels::cuda::Fault fault{};
  kernels::cuda::PlanArgs args{};
};

}  // namespace

TEST_CASE("rows-entries-counts-and-cuts-are-those-of-the-cpu") {
  std::uint64_t seed = 1;
  for (std::uint32_t top_k : {1, 2, 3, 8, 32}) {
    for (std::uint32_t tokens : {0, 1, 70, 131}) {
      for (std::uint32_t nodes : {1, 3}) {
        CAPTURE(top_k);
        CAPTURE(tokens);
        CAPTURE(nodes);
        ++seed;
        auto owned = std::make_unique<Planning>(nodes, top_k, tokens, "random", seed, 1 + seed % 2);
        Planning& planning = *owned;
        planning.run(1 + seed % 3, 64, seed);
        planning.check();
      }
    }
  }
}

TEST_CASE("no-selections-and-one-expert-that-takes-all") {
  for (const char* routing : {"none", "one"}) {
    auto owned = std::make_unique<Planning>(3, 4, 50, routing, 1);
    Planning& planning = *owned;
    planning.run(2, 64, 1);
    planning.check();
  }
}

TEST_CASE("a-second-launch-needs-no-cleaning-up") {
  auto owned = std::make_unique<Planning>(2, 4, 60, "random", 3);
  Planning& planning = *owned;
  planning.run(3, 32, 1);
  planning.run(3, 32, 2);
  planning.check();
}

TEST_CASE("an-expert-id-out-of-range-is-a-fault-that-names-the-slot") {
  auto owned = std::make_unique<Planning>(2, 4, 20, "random", 3);
  Planning& planning = *owned;
  planning.topk[17] = 20;
  planning.run(2, 32, 1);
  CHECK(planning.fault.what == kernels::cuda::What::kExpertId);
  CHECK(planning.fault.chunk == 17);
  try {
    kernels::cuda::raise(planning.fault);
    FAIL("nothing was raised");
  } catch (const common::StatusError& error) {
    CHECK(error.status().code == common::StatusCode::kInvalid);
    CHECK(std::string(error.what()).find("is 20, outside [-1, 20)") != std::string::npos);
  }
}
