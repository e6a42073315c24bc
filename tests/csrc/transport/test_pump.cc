// The pump's order around a flush: what a NIC has placed in a GPU's memory is made visible before its arrival is told.
#include <doctest/doctest.h>

#include <cstring>
#include <optional>
#include <vector>

#include "transport/pump.h"

using namespace moe_efa;
using proto::Imm;
using proto::ImmKind;
using proto::Phase;
using transport::PostResult;
using transport::RailEvent;

namespace {

// Reports what the test has put into it.
class ScriptedRail final : public transport::Rail {
 public:
  std::vector<std::byte> local_address() const override { return {}; }
  void add_peer(std::uint32_t, std::span<const std::byte>) override {}
  PostResult post_write(const transport::WriteRequest&) override { return PostResult::kPosted; }
  std::size_t poll(std::span<RailEvent> events) override {
    std::size_t count = 0;
    for (; count < events.size() && !due.empty(); ++count) {
      events[count] = due.front();
      due.erase(due.begin());
    }
    return count;
  }
  std::string describe() const override { return "scripted"; }

  void bring(const Imm& imm) {
    RailEvent event;
    event.kind = RailEvent::Kind::kRemoteImm;
    event.imm = imm.encode();
    due.push_back(event);
  }

  std::vector<RailEvent> due;
};

// Rank 0 of two nodes, with slots that it cannot read.
struct Bench {
  proto::LayoutConfig config;
  proto::RegionLayout layout;
  std::vector<std::byte> memory;
  std::byte* regions[1];
  std::vector<std::byte> words;  // that only kernels read, where they lie apart
  std::byte* word_bases[1];
  proto::NodeView view;
  std::optional<engine::Engine> engine;
  engine::DescriptorRing descriptors{16};
  ScriptedRail rails[2];
  std::optional<transport::Pump> pump;
  int flushes = 0;
  std::vector<std::uint64_t> told_before;  // arrived words that were there at a flush

  explicit Bench(bool words_apart = false) {
    config.num_nodes = 2;
    config.slots = 8;
    layout = proto::RegionLayout(config, 0);
    memory.assign(layout.total_bytes() + 128, std::byte{0});
    auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    regions[0] = memory.data() + (128 - address % 128) % 128;
    words.assign(layout.flag_bytes(), std::byte{0});
    word_bases[0] = words.data();
    view = {{2, 1, 0}, layout, regions, nullptr, words_apart ? word_bases : nullptr};
    engine.emplace(engine::EngineConfig{view.topology, config, 2, 64, view.own(), nullptr, false});
    transport::PumpConfig pump_config;
    pump_config.events_per_poll = 2;
    pump_config.through_window = words_apart;
    pump_config.flush = [this] {
      ++flushes;
      for (std::uint64_t seq = 0; seq < config.slots; ++seq) told_before.push_back(arrived(seq));
    };
    pump.emplace(*engine, view, std::vector<transport::Rail*>{&rails[0], &rails[1]}, descriptors, pump_config);
  }

  std::uint64_t arrived(std::uint64_t seq) const { return *view.own_word(layout.arrived(Phase::kDispatch, 1, seq)); }
  void chunk(int nic, std::uint64_t seq) { rails[nic].bring(Imm::make(ImmKind::kDispatchChunk, false, 0, 1, seq)); }
  void step() {
    told_before.clear();
    pump->step(0);
    REQUIRE_MESSAGE(!engine->failed(), engine->failure().message);
  }
};

}  // namespace

TEST_CASE("landings are flushed once per poll, before their words are stored") {
  Bench bench;
  bench.chunk(0, 1);
  bench.chunk(0, 0);
  bench.step();
  CHECK(bench.flushes == 1);
  for (std::uint64_t word : bench.told_before) CHECK(word == 0);
  CHECK(bench.arrived(0) == 1);
  CHECK(bench.arrived(1) == 2);

  bench.chunk(0, 2);
  bench.chunk(1, 3);  // another NIC, another poll
  bench.step();
  CHECK(bench.flushes == 3);
  CHECK(bench.told_before[2] == 0);
  CHECK(bench.told_before[8 + 3] == 0);
  CHECK(bench.arrived(3) == 4);

  for (std::uint64_t seq = 4; seq < 8; ++seq) bench.chunk(0, seq);
  bench.step();
  CHECK(bench.flushes == 4);
  CHECK(bench.arrived(5) == 6);
  CHECK(bench.arrived(6) == 0);  // the next poll's
  bench.step();
  CHECK(bench.flushes == 5);
  CHECK(bench.told_before[6] == 0);
  CHECK(bench.arrived(7) == 8);
}

TEST_CASE("arrivals are told where kernels look for them, which may be a window") {
  for (bool apart : {false, true}) {
    CAPTURE(apart);
    Bench bench(apart);
    bench.chunk(0, 0);
    bench.step();
    CHECK(bench.flushes == 1);  // also then
    CHECK(bench.told_before[0] == 0);
    std::uint64_t at = bench.layout.arrived(Phase::kDispatch, 1, 0);
    CHECK(*reinterpret_cast<std::uint64_t*>(bench.words.data() + at) == (apart ? 1 : 0));
    CHECK(*reinterpret_cast<std::uint64_t*>(bench.regions[0] + at) == (apart ? 0 : 1));
  }
}

TEST_CASE("what lands in host memory, or nowhere, is not flushed") {
  Bench bench;
  bench.step();
  bench.rails[0].bring(Imm::make(ImmKind::kHello, false, 0, 1, 0));
  bench.step();
  proto::CountsRecord record{};
  record.magic = proto::kCountsMagic;
  record.version = proto::kProtocolVersion;
  record.source_rank = 1;
  std::memcpy(bench.view.own() + bench.layout.counts(Phase::kDispatch, 1, 0), &record, sizeof(record));
  bench.rails[0].bring(Imm::make(ImmKind::kDispatchCounts, false, 0, 1, 0));
  bench.step();
  CHECK(*bench.view.own_word(bench.layout.counts_ready(Phase::kDispatch, 1, 0)) == 1);
  CHECK(bench.flushes == 0);
}
