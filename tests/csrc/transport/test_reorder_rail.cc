// ReorderRail over a scripted rail that records what it is asked for and completes what it is told to.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <set>
#include <string>

#include "transport/reorder_rail.h"

using moe_efa::common::StatusCode;
using moe_efa::common::StatusError;
using namespace moe_efa::transport;

namespace {

struct Script {
  std::vector<WriteRequest> posted;  // in order
  std::deque<RailEvent> events;      // for poll
  std::size_t capacity = 1000;       // writes in flight
  std::size_t in_flight = 0;
  bool completes = true;  // at once; else by hand
  std::function<void(const WriteRequest&)> on_post;
};

class ScriptedRail final : public Rail {
 public:
  explicit ScriptedRail(Script& script) : script_(script) {}
  std::vector<std::byte> local_address() const override { return {std::byte{42}}; }
  void add_peer(std::uint32_t, std::span<const std::byte> address) override { peer = {address.begin(), address.end()}; }
  PostResult post_write(const WriteRequest& request) override {
    if (script_.on_post) script_.on_post(request);
    if (script_.in_flight == script_.capacity) return PostResult::kAgain;
    ++script_.in_flight;
    script_.posted.push_back(request);
    if (script_.completes) complete(script_, request.id);
    return PostResult::kPosted;
  }
  static void complete(Script& script, std::uint64_t id) {
    RailEvent done;
    done.id = id;
    script.events.push_back(done);
    --script.in_flight;
  }
  std::size_t poll(std::span<RailEvent> events) override {
    std::size_t count = 0;
    for (; count < events.size() && !script_.events.empty(); ++count) {
      events[count] = script_.events.front();
      script_.events.pop_front();
    }
    return count;
  }
  std::string describe() const override { return "script"; }

  std::vector<std::byte> peer;

 private:
  Script& script_;
};

struct Fixture {
  Script script;
  ReorderConfig config;
  std::unique_ptr<ReorderRail> rail;
  std::vector<RailEvent> events;

  explicit Fixture(std::uint64_t seed, std::uint32_t max_outstanding = 64) {
    config.seed = seed;
    config.max_outstanding = max_outstanding;
    reset();
  }
  void reset() { rail = std::make_unique<ReorderRail>(std::make_unique<ScriptedRail>(script), config); }

  std::size_t poll(std::size_t most = 16) {
    std::vector<RailEvent> some(most);
    const std::size_t count = rail->poll(some);
    events.insert(events.end(), some.begin(), some.begin() + static_cast<std::ptrdiff_t>(count));
    return count;
  }
  // Posts, polling while refused. Returns the number of refusals.
  int post(const WriteRequest& request) {
    int refused = 0;
    while (rail->post_write(request) == PostResult::kAgain) {
      REQUIRE(++refused < 1000);
      poll();
    }
    return refused;
  }
  void settle(std::size_t count) {
    for (int i = 0; i < 2000 && events.size() < count; ++i) poll();
    REQUIRE(events.size() == count);
    for (int i = 0; i < 100; ++i) poll();
    REQUIRE(events.size() == count);
  }
};

WriteRequest write_of(std::uint64_t id, std::uint32_t bytes, std::uint32_t node = 1) {
  WriteRequest request;
  request.peer_node = node;
  request.bytes = bytes;
  request.local_offset = 10'000 * id;
  request.remote_offset = 20'000 * id;
  request.imm = static_cast<std::uint32_t>(1000 + id);
  request.id = id;
  return request;
}

std::vector<std::uint64_t> ids(const std::vector<RailEvent>& events) {
  std::vector<std::uint64_t> out;
  for (const RailEvent& event : events) out.push_back(event.id);
  return out;
}

}  // namespace

TEST_CASE("decisions depend on seed, rank, NIC and number alone, and cuts cover the write") {
  ReorderConfig config;
  config.seed = 5;
  std::set<std::uint32_t> pieces;
  int differ = 0, refusals = 0, twice = 0, late = 0;
  for (std::uint64_t number = 0; number < 500; ++number) {
    const std::uint32_t bytes = number % 7 == 0 ? static_cast<std::uint32_t>(number % 5) : 4096;
    const ReorderDecision decision = decide(config, number, bytes);
    CHECK(decision == decide(config, number, bytes));
    ReorderConfig other = config;
    other.rank = 1;
    differ += decision != decide(other, number, bytes);
    other = config, other.nic = 1;
    differ += decision != decide(other, number, bytes);
    other = config, other.seed = 6;
    differ += decision != decide(other, number, bytes);
    REQUIRE(decision.num_pieces >= 1);
    REQUIRE(decision.num_pieces <= ReorderDecision::kMaxPieces);
    CHECK(decision.bounds[0] == 0);
    CHECK(decision.bounds[decision.num_pieces] == bytes);
    std::set<std::uint8_t> order;
    for (std::uint32_t i = 0; i < decision.num_pieces; ++i) {
      if (decision.num_pieces > 1) CHECK(decision.bounds[i] < decision.bounds[i + 1]);
      order.insert(decision.order[i]);
    }
    CHECK(order.size() == decision.num_pieces);
    CHECK(*order.rbegin() == decision.num_pieces - 1);
    pieces.insert(decision.num_pieces);
    refusals += decision.refusals > 0, twice += decision.twice, late += decision.twice_late;
  }
  CHECK(differ > 1200);
  CHECK(pieces == std::set<std::uint32_t>{1, 2, 3, 4});
  CHECK(refusals > 20);
  CHECK(twice > 20);
  CHECK(late > 20);
  config.repeat_late = false;
  for (std::uint64_t number = 0; number < 500; ++number) CHECK_FALSE(decide(config, number, 4096).twice_late);
}

TEST_CASE("writes and completions change their order, and none is lost or told twice") {
  Fixture fixture(3);
  for (std::uint64_t id = 0; id < 300; ++id) fixture.post(write_of(id, 0));
  fixture.settle(300);
  std::vector<std::uint32_t> posted;
  for (const WriteRequest& request : fixture.script.posted) {
    CHECK(request.with_imm);
    posted.push_back(request.imm);
  }
  CHECK(posted.size() == 300);
  CHECK_FALSE(std::is_sorted(posted.begin(), posted.end()));
  std::vector<std::uint64_t> done = ids(fixture.events);
  std::vector<std::uint64_t> by_post;
  for (std::uint32_t imm : posted) by_post.push_back(imm - 1000);
  CHECK(done != by_post);  // completions are shuffled again
  std::sort(done.begin(), done.end());
  for (std::uint64_t id = 0; id < 300; ++id) CHECK(done[id] == id);
}

TEST_CASE("the same seed makes the same run, another another") {
  auto run = [](std::uint64_t seed) {
    Fixture fixture(seed);
    for (std::uint64_t id = 0; id < 100; ++id) fixture.post(write_of(id, 5000));
    fixture.settle(100);
    std::vector<std::uint64_t> trace = ids(fixture.events);
    for (const WriteRequest& request : fixture.script.posted) trace.push_back(request.remote_offset);
    return trace;
  };
  CHECK(run(7) == run(7));
  CHECK(run(7) != run(8));
}

TEST_CASE("the immediate is on a piece that is posted when all other bytes have completed") {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    Fixture fixture(seed);
    fixture.script.completes = false;
    int cut = 0, repeated = 0, late = 0;
    for (std::uint64_t id = 0; id < 20; ++id) {
      const WriteRequest request = write_of(id, 5000);
      const std::size_t begin = fixture.script.posted.size();
      fixture.events.clear();
      fixture.post(request);
      std::vector<int> placed(request.bytes, 0);  // by completed steps
      std::size_t completed = begin, seen = begin;
      bool told = false;
      for (int i = 0; i < 500 && fixture.events.empty(); ++i) {
        for (; seen < fixture.script.posted.size(); ++seen) {
          const WriteRequest& piece = fixture.script.posted[seen];
          CHECK(piece.local_offset - request.local_offset == piece.remote_offset - request.remote_offset);
          REQUIRE(piece.remote_offset >= request.remote_offset);
          REQUIRE(piece.remote_offset + piece.bytes <= request.remote_offset + request.bytes);
          CHECK(piece.imm == request.imm);
          if (!piece.with_imm) continue;
          CHECK_FALSE(told);  // once
          told = true;
          CHECK(seen == completed);  // nothing is under way
          const std::uint64_t first = piece.remote_offset - request.remote_offset;
          for (std::uint64_t byte = 0; byte < request.bytes; ++byte) {
            if (byte < first || byte >= first + piece.bytes) REQUIRE(placed[byte] > 0);
          }
        }
        // Complete what is under way, but not at once.
        if (i % 5 == 4) {
          while (completed < fixture.script.posted.size()) {
            const WriteRequest& piece = fixture.script.posted[completed++];
            for (std::uint32_t k = 0; k < piece.bytes; ++k) ++placed[piece.remote_offset - request.remote_offset + k];
            ScriptedRail::complete(fixture.script, piece.id);
            late += told && !piece.with_imm;
          }
        }
        fixture.poll();
      }
      REQUIRE(fixture.events.size() == 1);
      CHECK(fixture.events[0].kind == RailEvent::Kind::kWriteDone);
      CHECK(fixture.events[0].id == id);
      CHECK(told);
      CHECK(completed == fixture.script.posted.size());  // also a late repetition, before the completion is told
      for (int count : placed) REQUIRE(count >= 1);
      cut += fixture.script.posted.size() - begin > 1;
      repeated += *std::max_element(placed.begin(), placed.end()) > 1;
    }
    CHECK(cut > 0);
    CHECK(repeated >= late);
  }
}

TEST_CASE("refusals come in bursts and clear") {
  Fixture fixture(1);
  int refused = 0, longest = 0;
  for (std::uint64_t id = 0; id < 300; ++id) {
    const int now = fixture.post(write_of(id, 64));
    refused += now > 0;
    longest = std::max(longest, now);
  }
  CHECK(refused > 20);
  CHECK(longest >= 20);
  fixture.settle(300);
}

TEST_CASE("no more writes are accepted than configured, and the rail below may refuse too") {
  Fixture fixture(2, 8);
  fixture.script.capacity = 1;
  fixture.script.completes = false;
  int accepted = 0;
  std::uint64_t next = 0;
  for (int i = 0; i < 500; ++i) {
    if (fixture.rail->post_write(write_of(next, 100)) == PostResult::kPosted) ++accepted, ++next;
    fixture.poll();
    CHECK(fixture.script.in_flight <= 1);
  }
  CHECK(accepted == 8);
  fixture.script.capacity = 1000;
  fixture.script.completes = true;
  ScriptedRail::complete(fixture.script, fixture.script.posted.back().id);
  while (next < 50) fixture.post(write_of(next, 100)), ++next;
  fixture.settle(50);
}

TEST_CASE("news from peers is delayed and permuted, all of it arrives, and lengths are not told") {
  Fixture fixture(4);
  for (std::uint32_t i = 0; i < 200; ++i) {
    RailEvent event;
    event.kind = RailEvent::Kind::kRemoteImm;
    event.imm = i;
    event.bytes = 77;
    fixture.script.events.push_back(event);
  }
  CHECK(fixture.rail->poll({}) == 0);
  CHECK(fixture.script.events.size() > 100);  // what is held is bounded
  CHECK(fixture.poll(1) <= 1);
  fixture.settle(200);
  std::vector<std::uint32_t> seen;
  for (const RailEvent& event : fixture.events) {
    CHECK(event.kind == RailEvent::Kind::kRemoteImm);
    CHECK(event.bytes == 0);
    seen.push_back(event.imm);
  }
  CHECK_FALSE(std::is_sorted(seen.begin(), seen.end()));
  CHECK(std::set<std::uint32_t>(seen.begin(), seen.end()).size() == 200);
}

TEST_CASE("a dropped peer gets what was written before, then every write fails as EFA says it") {
  for (std::uint64_t after : {0, 3}) {
    CAPTURE(after);
    Fixture fixture(9);
    fixture.config.drop_node = 1;
    fixture.config.drop_after = after;
    fixture.reset();
    for (std::uint64_t id = 0; id < 10; ++id) fixture.post(write_of(id, 100, id % 2 == 0 ? 1 : 2));
    fixture.settle(10);
    std::uint64_t failed = 0;
    for (const RailEvent& event : fixture.events) {
      if (event.kind == RailEvent::Kind::kWriteDone) continue;
      ++failed;
      CHECK(event.kind == RailEvent::Kind::kError);
      CHECK(event.own_write);
      CHECK(event.peer_node == 1);
      CHECK(event.id % 2 == 0);
      CHECK(event.error.find(after > 0 ? "status 13" : "status 15") != std::string::npos);
      CHECK(event.error.find("MOE_EFA_REORDER") != std::string::npos);
    }
    CHECK(failed == 5 - after);
    for (const WriteRequest& request : fixture.script.posted) {
      if (request.peer_node == 1) CHECK(request.imm < 1000 + 2 * after);
    }
  }
}

TEST_CASE("a piece that fails fails its write once, with the words of the rail below") {
  for (const bool throws : {false, true}) {
    CAPTURE(throws);
    Fixture fixture(11);
    fixture.script.completes = false;
    if (throws) {
      fixture.script.on_post = [](const WriteRequest& request) {
        if (request.imm != 1002) return;
        throw StatusError({StatusCode::kTransport, -1, -1, -1, -1, "no such luck"});
      };
    }
    for (std::uint64_t id = 0; id < 4; ++id) fixture.post(write_of(id, 1000));
    std::size_t completed = 0;
    for (int i = 0; i < 500 && fixture.events.size() < 4; ++i) {
      fixture.poll();
      for (; completed < fixture.script.posted.size(); ++completed) {
        const WriteRequest& piece = fixture.script.posted[completed];
        ScriptedRail::complete(fixture.script, piece.id);
        if (piece.imm != 1002) continue;
        RailEvent& event = fixture.script.events.back();
        event.kind = RailEvent::Kind::kError;
        event.own_write = true;
        event.peer_node = 1;
        event.error = "no such luck";
      }
    }
    fixture.settle(4);
    for (const RailEvent& event : fixture.events) {
      const bool bad = event.id == 2;
      CHECK((event.kind == RailEvent::Kind::kError) == bad);
      CHECK(event.own_write == bad);
      if (bad) CHECK(event.error == "no such luck");
      if (bad) CHECK(event.peer_node == 1);
    }
  }
}

TEST_CASE("errors of our own making are thrown, errors that are nobody's write pass through") {
  Fixture fixture(12);
  RailEvent event;
  event.kind = RailEvent::Kind::kError;
  event.error = "the queue is broken";
  fixture.script.events.push_back(event);
  fixture.settle(1);
  CHECK(fixture.events[0].error == "the queue is broken");
  CHECK(fixture.events[0].peer_node == -1);
  CHECK_FALSE(fixture.events[0].own_write);
  fixture.script.on_post = [](const WriteRequest&) {
    throw StatusError({StatusCode::kInternal, -1, -1, -1, -1, "out of range"});
  };
  auto post_and_poll = [&] {
    fixture.post(write_of(0, 10));
    for (int i = 0; i < 50; ++i) fixture.poll();
  };
  CHECK_THROWS_AS(post_and_poll(), StatusError);
}

TEST_CASE("addresses are marked, so that a rank without reordering is refused") {
  Script script;
  auto scripted = std::make_unique<ScriptedRail>(script);
  ScriptedRail* inner = scripted.get();
  ReorderRail rail(std::move(scripted), ReorderConfig{});
  CHECK(rail.describe() == "reordered (seed 0) script");
  rail.add_peer(1, rail.local_address());
  CHECK(inner->peer == std::vector<std::byte>{std::byte{42}});
  const std::vector<std::byte> plain = inner->local_address();
  std::string message;
  try {
    rail.add_peer(2, plain);
  } catch (const StatusError& error) {
    CHECK(error.status().code == StatusCode::kConfig);
    message = error.what();
  }
  CHECK(message.find("MOE_EFA_REORDER") != std::string::npos);
}
