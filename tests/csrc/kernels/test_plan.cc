// The send plan: rows in token order, entries by (expert, top-k position), counts and cuts; bad experts are refused.
// Static mode: what a node's ranks have room for, by hand.
#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <vector>

#include "common/status.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/static_sizes.h"

using namespace moe_efa;
using kernels::SendPlan;

namespace {

proto::NodeView view_of(std::uint32_t nodes, std::uint32_t mates, std::uint32_t experts, std::uint32_t top_k) {
  proto::LayoutConfig config;
  config.num_nodes = nodes;
  config.node_size = mates;
  config.experts_per_rank = experts;
  config.top_k = top_k;
  config.chunk_rows = 2;
  return {{nodes * mates, mates, 0}, proto::RegionLayout(config, 0), nullptr};
}

}  // namespace

TEST_CASE("plan-of-a-small-batch-by-hand") {
  // 2 nodes of 2 ranks with 2 experts each: experts 0..3 on node 0, 4..7 on node 1.
  proto::NodeView view = view_of(2, 2, 2, 3);
  std::vector<std::int64_t> topk = {5,  0,  4,   // both nodes; node 1 sorted to 4, 5
                                    -1, -1, -1,  // nowhere
                                    7,  7,  -1,  // the same expert twice
                                    4,  1,  3};
  std::vector<float> weights = {.5f, .1f, .4f, NAN, NAN, NAN, .7f, .2f, NAN, .9f, .3f, .6f};
  auto plan = kernels::cpu::build_send_plan({topk.data(), weights.data(), 4, 1, 1}, view);
  REQUIRE(plan->send.size() == 2);
  const SendPlan& here = plan->send[0];
  CHECK(here.row_token == std::vector<std::uint32_t>{0, 3});
  CHECK(here.entry_begin == std::vector<std::uint32_t>{0, 1, 3});
  CHECK(here.expert_counts == std::vector<std::uint32_t>{1, 1, 0, 1});
  CHECK(here.facts == kernels::RingFacts{2, 2, 1});
  const SendPlan& there = plan->send[1];
  CHECK(there.row_token == std::vector<std::uint32_t>{0, 2, 3});
  CHECK(there.entry_begin == std::vector<std::uint32_t>{0, 2, 4, 5});
  CHECK(there.expert_counts == std::vector<std::uint32_t>{2, 1, 0, 2});
  CHECK(there.facts == kernels::RingFacts{3, 2, 2});
  CHECK(there.facts.rows_in(0) == 2);
  CHECK(there.facts.rows_in(1) == 1);
  std::vector<std::uint32_t> experts, positions, indices;
  for (const proto::RowEntry& entry : there.entries) {
    experts.push_back(entry.expert);
    positions.push_back(entry.topk_pos);
    indices.push_back(entry.index);
    CHECK(!std::isnan(entry.weight));
  }
  CHECK(experts == std::vector<std::uint32_t>{0, 1, 3, 3, 0});
  CHECK(positions == std::vector<std::uint32_t>{2, 0, 0, 1, 0});
  CHECK(indices == std::vector<std::uint32_t>{0, 0, 0, 1, 1});
}

TEST_CASE("plan-of-no-tokens-and-of-none-selected-is-empty") {
  proto::NodeView view = view_of(3, 1, 4, 2);
  auto empty = kernels::cpu::build_send_plan({nullptr, nullptr, 0, 1, 1}, view);
  std::vector<std::int64_t> topk(10, -1);
  std::vector<float> weights(10, NAN);
  auto none = kernels::cpu::build_send_plan({topk.data(), weights.data(), 5, 1, 1}, view);
  for (const auto& plan : {empty, none}) {
    for (const SendPlan& send : plan->send) {
      CHECK(send.facts == kernels::RingFacts{});
      CHECK(send.row_token.empty());
    }
  }
}

TEST_CASE("plan-refuses-an-expert-out-of-range-and-names-it") {
  proto::NodeView view = view_of(2, 1, 4, 2);
  for (std::int64_t bad : {std::int64_t{8}, std::int64_t{-2}, std::int64_t{1} << 40}) {
    std::vector<std::int64_t> topk = {0, 1, 7, bad};
    std::vector<float> weights(4, 1.0f);
    try {
      kernels::cpu::build_send_plan({topk.data(), weights.data(), 2, 1, 1}, view);
      FAIL("accepted");
    } catch (const common::StatusError& error) {
      CHECK(error.status().code == common::StatusCode::kInvalid);
      CHECK(std::string(error.what()).find("topk_idx[1, 1] is " + std::to_string(bad)) != std::string::npos);
    }
  }
}

TEST_CASE("what-mates-have-room-for-by-hand") {
  // Seen from rank 0 of 2 nodes of 2 ranks, 2 experts each. Sources 0..3 send to experts 0, 1 (mate 0), 2, 3 (mate 1):
  constexpr std::uint32_t kCounts[4][4] = {{1, 0, 2, 1}, {0, 3, 1, 0}, {2, 0, 0, 4}, {1, 1, 0, 0}};
  auto sizes_of = [&](std::uint32_t capacity, std::uint32_t alignment, std::uint32_t mates_capacity) {
    kernels::cpu::StaticSizes sizes(view_of(2, 2, 2, 3));
    for (std::uint32_t source = 0; source < 4; ++source) sizes.set_counts(source, kCounts[source]);
    sizes.set_output(0, capacity, alignment);
    sizes.set_output(1, mates_capacity, 1);
    sizes.finish();
    return sizes;
  };
  CHECK(!sizes_of(8, 1, 8).any_lost());  // each needs 8 rows
  CHECK(!sizes_of(8, 4, 100).any_lost());
  CHECK(sizes_of(7, 1, 8).any_lost());
  CHECK(sizes_of(8, 5, 8).any_lost());  // 5 are usable, 10 would be needed
  auto sizes = sizes_of(7, 4, 6);
  // Mate 0, 4 usable rows of 8: expert 0 has rows 0 (source 0), 1 and 2 (source 2), 3; expert 1 has none.
  CHECK(sizes.overflow(0, 0, 0) == 0);
  CHECK(sizes.overflow(1, 0, 0) == 0);
  CHECK(sizes.overflow(1, 0, 1) == 0);
  CHECK(sizes.overflow(0, 1, 0) == 8);
  // Mate 1, 6 rows of 8: expert 2 has 0..2, expert 3 row 3 (source 0) and 4..7 (source 2, on node 1).
  CHECK(sizes.overflow(0, 2, 1) == 0);
  CHECK(sizes.overflow(0, 3, 0) == 0);
  CHECK(sizes.overflow(1, 3, 1) == 0);
  CHECK(sizes.overflow(1, 3, 2) == 8);
}
