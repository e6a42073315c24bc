// Whole groups of real engines, pumps and CPU calls over simulated SRD: every seed of every profile must be clean, with
// outputs bitwise equal to the serial reference. A failing seed prints how to run it again.
#include <doctest/doctest.h>

#include <string>

#include "common/status.h"
#include "simulator/check.h"
#include "simulator/profile.h"
#include "simulator/reference.h"
#include "simulator/workload.h"

using namespace moe_efa::simulator;

namespace {

void check_seeds(const std::string& profile, std::uint64_t first, std::uint64_t count, std::uint32_t num_ranks = 0) {
  CheckOptions options;
  options.num_ranks = num_ranks;
  std::uint64_t epochs = 0, with_both_phases = 0;
  for (std::uint64_t seed = first; seed < first + count; ++seed) {
    CheckResult result = run_check(profile, seed, options);
    epochs += result.epochs;
    with_both_phases += result.both_phases > 0;
    CHECK_MESSAGE(result.ok, "python -m moe_efa.simulator --profile ", profile, " --first-seed ", seed, " --seeds 1",
                  num_ranks != 0 ? " --num-ranks " + std::to_string(num_ranks) : "", "\n", result.message);
    CHECK(result.inbound_high_water <= result.inbound_limit);
  }
  CHECK_MESSAGE(with_both_phases > count / 20, "a dispatch and a combine under way together in ", with_both_phases);
  MESSAGE(profile, ": ", count, " seeds, ", epochs, " epochs, both phases at once in ", with_both_phases);
}

}  // namespace

TEST_CASE("ordered-network") { check_seeds("ordered", 0, 60); }
TEST_CASE("unordered-network") { check_seeds("srd", 0, 120); }
TEST_CASE("harsh-network-of-small-pieces-and-short-queues") { check_seeds("srd_harsh", 0, 120); }
TEST_CASE("paranoid-network-that-writes-twice-after-the-immediate") { check_seeds("srd_paranoid", 0, 120); }
TEST_CASE("storms-of-again") { check_seeds("again_storm", 0, 60); }
TEST_CASE("a-rank-dies-and-nobody-gets-wrong-output") { check_seeds("peer_loss", 0, 150); }
TEST_CASE("a-forged-epoch-is-refused-and-its-sender-named") { check_seeds("forged_epoch", 0, 100); }
TEST_CASE("sixteen-ranks") { check_seeds("srd_harsh", 5000, 12, 16); }

TEST_CASE("the-same-seed-gives-the-same-run") {
  for (const std::string& profile : profile_names()) {
    CheckResult first = run_check(profile, 77), second = run_check(profile, 77), other = run_check(profile, 78);
    CHECK(first.events == second.events);
    CHECK(first.virtual_us == second.virtual_us);
    CHECK(first.message == second.message);
    CHECK(first.events != other.events);
  }
}

TEST_CASE("the-seeds-cover-what-they-should") {
  bool one_slot = false, wrap = false, one_node = false, replay = false, older_plan = false, no_tokens = false;
  bool none_selected = false, duplicate = false, one_by_one = false, far_ahead = false;
  bool apart = false, unread = false, apart_and_unread = false;
  bool exact = false, fits = false, overflows = false, no_room = false, replayed = false, own_alignments = false;
  bool fp8_dispatch = false, fp8_replay = false, fp8_output = false, fp8_combine = false, ue8m0 = false, blocks = false;
  for (std::uint64_t seed = 0; seed < 120; ++seed) {
    Workload world = make_workload(seed, 0);
    one_slot |= world.layout.slots == 1;
    one_node |= world.num_nodes() == 1;
    one_by_one |= world.calls_ahead == 1;
    far_ahead |= world.calls_ahead == 6;
    std::uint32_t dispatches = 0, plans = 0;
    for (const ScriptCall& call : world.script) {
      dispatches += call.kind != ScriptCall::Kind::kCombine;
      plans += call.kind == ScriptCall::Kind::kDispatch;
      replay |= call.kind == ScriptCall::Kind::kReplay;
      older_plan |= call.plan + 1 < plans;
      if (call.wire_dtype != moe_efa::proto::DType::kFp8) continue;
      fp8_dispatch |= call.kind == ScriptCall::Kind::kDispatch;
      fp8_replay |= call.kind == ScriptCall::Kind::kReplay;
      fp8_combine |= call.kind == ScriptCall::Kind::kCombine;
      fp8_output |= call.fp8_output;
      ue8m0 |= world.layout.fp8_scale == moe_efa::proto::Fp8Scale::kUe8m0;
      blocks |= world.layout.hidden_size > moe_efa::proto::kFp8BlockSize;
    }
    wrap |= dispatches > 40;
    apart |= world.slots_apart;
    unread |= !world.reads_slots && world.num_nodes() > 1;
    apart_and_unread |= world.slots_apart && !world.reads_slots && world.num_nodes() > 1;
    Reference reference(world);
    for (std::uint32_t plan = 0; plan < plans; ++plan) {
      exact |= !world.is_static(plan);
      for (std::uint32_t rank = 0; world.is_static(plan) && rank < world.num_ranks; ++rank) {
        const RankRows& rows = reference.rows(plan, rank);
        fits |= rows.num_rows > 0 && rows.own_overflow == 0;
        overflows |= !rows.rows.empty() && rows.own_overflow > 0;
        no_room |= rows.num_rows == 0 && rows.own_overflow > 0;
        own_alignments |= world.own_alignments && world.node_size > 1;
      }
    }
    for (const ScriptCall& call : world.script) {
      replayed |= call.kind == ScriptCall::Kind::kReplay && world.is_static(call.plan);
    }
    for (const auto& plan : world.routings) {
      for (const Routing& routing : plan) {
        no_tokens |= routing.num_tokens == 0;
        bool none = routing.num_tokens > 0;
        for (std::size_t i = 0; i < routing.topk_idx.size(); ++i) {
          none &= routing.topk_idx[i] == -1;
          duplicate |=
              i % world.layout.top_k > 0 && routing.topk_idx[i] >= 0 && routing.topk_idx[i] == routing.topk_idx[i - 1];
        }
        none_selected |= none;
      }
    }
  }
  CHECK(one_slot);
  CHECK(wrap);
  CHECK(one_node);
  CHECK(one_by_one);
  CHECK(far_ahead);
  CHECK(apart);
  CHECK(unread);
  CHECK(apart_and_unread);
  CHECK(replay);
  CHECK(older_plan);
  CHECK(no_tokens);
  CHECK(none_selected);
  CHECK(duplicate);
  CHECK(exact);
  CHECK(fits);
  CHECK(overflows);
  CHECK(no_room);
  CHECK(replayed);
  CHECK(own_alignments);
  CHECK(fp8_dispatch);
  CHECK(fp8_replay);
  CHECK(fp8_output);
  CHECK(fp8_combine);
  CHECK(ue8m0);
  CHECK(blocks);
}

TEST_CASE("an-unknown-profile-is-refused") { CHECK_THROWS_AS(run_check("perfect", 0), moe_efa::common::StatusError); }
