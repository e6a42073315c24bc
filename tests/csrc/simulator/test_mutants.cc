// build: mutants
// Deliberately wrong protocols must be caught: an oracle that catches nothing proves nothing. Each mutant is run on the
// same seeds as the unmutated protocol, which must be clean on them.
#include <doctest/doctest.h>

#include <string>

#include "common/mutant.h"
#include "simulator/check.h"

using moe_efa::common::Mutant;
using namespace moe_efa::simulator;

namespace {

constexpr std::uint64_t kSeeds = 40;

// Where it can be caught: everywhere, or only where engines read the headers of chunks, or only where they do not and
// the calls' own checks are all there is.
enum class Worlds { kBoth, kRead, kUnread };

struct Case {
  Mutant mutant;
  const char* name;
  const char* profile;  // where it shows
  const char* oracle;   // part of what at least one failure says
  Worlds worlds = Worlds::kBoth;
};

constexpr Case kCases[] = {
    {Mutant::kCreditOnArrival, "credit on arrival", "srd", "I2: "},
    {Mutant::kReuseBeforeCompletion, "send slot reused before its completion", "srd_paranoid", "I11: "},
    {Mutant::kReuseBeforeCredit, "send slot reused before its credit", "srd", "I2: "},
    {Mutant::kStaleEpochAccepted, "epoch not checked", "forged_epoch", "I4: ", Worlds::kRead},
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
    {Mutant::kHeaderUnchecked, "headers not checked by calls", "forged_epoch", "I4: nobody noticed", Worlds::kUnread},
};

struct Active {
  explicit Active(Mutant mutant) { moe_efa::common::active_mutant = mutant; }
  ~Active() { moe_efa::common::active_mutant = Mutant::kNone; }
};

}  // namespace

TEST_CASE("every-mutant-is-caught-by-its-oracle") {
  for (const Case& wrong : kCases) {
    Active active(wrong.mutant);
    bool read = false, unread = false, by_oracle = false;  // caught in worlds whose engines read headers, or do not
    for (std::uint64_t seed = 0; seed < kSeeds && !(by_oracle && read && unread); ++seed) {
      CheckResult result = run_check(wrong.profile, seed);
      if (result.ok) continue;
      (result.reads_slots ? read : unread) = true;
      by_oracle |= result.message.find(wrong.oracle) != std::string::npos;
    }
    CHECK_MESSAGE(read == (wrong.worlds != Worlds::kUnread), wrong.name);
    CHECK_MESSAGE(unread == (wrong.worlds != Worlds::kRead), wrong.name);
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
  CHECK(std::size(kCases) == static_cast<std::size_t>(Mutant::kHeaderUnchecked));
}
