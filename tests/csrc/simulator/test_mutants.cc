// build: mutants
// Deliberately wrong protocols must be caught: an oracle that catches nothing proves nothing. Each mutant is run on the
// same seeds as the unmutated protocol, which must be clean on them.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <string>

#include "common/mutant.h"
#include "simulator/check.h"

using moe_efa::common::Mutant;
using namespace moe_efa::simulator;

namespace {

constexpr std::uint64_t kSeeds = 40;

struct Case {
  Mutant mutant;
  const char* name;
  const char* profile;  // where it shows
  const char* oracle;   // part of what at least one failure says
};

constexpr Case kCases[] = {
    {Mutant::kCreditOnArrival, "credit on arrival", "srd", "I2: "},
    {Mutant::kReuseBeforeCompletion, "send slot reused before its completion", "srd_paranoid", "I11: "},
    {Mutant::kReuseBeforeCredit, "send slot reused before its credit", "srd", "I2: "},
    {Mutant::kStaleEpochAccepted, "epoch not checked", "forged_epoch", "I4: "},
    {Mutant::kCountsTrustedEarly, "counts used before their event", "srd_harsh", "I1: "},
    {Mutant::kChunkTrustedEarly, "an event vouches for the chunk before", "srd_harsh", "I1: "},
    {Mutant::kForwardInReadinessOrder, "forwarded as ready", "srd", "header differs from the plan"},
    {Mutant::kReduceInArrivalOrder, "reduced as arrived", "srd", "I3: "},
    {Mutant::kReleaseBeforeRead, "released before read", "srd", "I2: "},
    {Mutant::kPublishWithoutConsumed, "published over what is not forwarded", "srd", "I2: "},
    {Mutant::kLastCreditKept, "last credits kept", "srd", "I5: deadlock"},
    {Mutant::kBatchedOrderCompletion, "completions taken in order", "srd_paranoid", "I11: "},
    {Mutant::kOverflowUntold, "lost rows not told", "srd", "I3: "},
    {Mutant::kLostRowsSummed, "lost rows summed", "srd", "I3: "},
};

struct Active {
  explicit Active(Mutant mutant) { moe_efa::common::active_mutant = mutant; }
  ~Active() { moe_efa::common::active_mutant = Mutant::kNone; }
};

}  // namespace

TEST_CASE("every-mutant-is-caught-by-its-oracle") {
  for (const Case& wrong : kCases) {
    Active active(wrong.mutant);
    std::uint64_t caught = 0;
    bool by_oracle = false;
    for (std::uint64_t seed = 0; seed < kSeeds && !(by_oracle && caught >= 2); ++seed) {
      CheckResult result = run_check(wrong.profile, seed);
      if (result.ok) continue;
      ++caught;
      by_oracle |= result.message.find(wrong.oracle) != std::string::npos;
    }
    CHECK_MESSAGE(caught > 0, wrong.name);
    CHECK_MESSAGE(by_oracle, wrong.name, " was never caught by ", wrong.oracle);
  }
}

TEST_CASE("the-protocol-itself-is-clean-on-the-same-seeds") {
  for (const char* profile : {"srd", "srd_harsh", "srd_paranoid", "forged_epoch"}) {
    for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
      CheckResult result = run_check(profile, seed);
      CHECK_MESSAGE(result.ok, result.message);
    }
  }
}

TEST_CASE("the-list-of-mutants-is-complete") {
  CHECK(std::size(kCases) == static_cast<std::size_t>(Mutant::kLostRowsSummed));
}
