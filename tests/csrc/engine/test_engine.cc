// The engine by hand: events in, writes and actions out. Each check of a landing is shown to refuse, and to name the
// rank, epoch and chunk; credits, completions, NICs and retirement are followed step by step.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.h"

using namespace moe_efa;
using engine::Action;
using engine::Descriptor;
using engine::Write;
using proto::Imm;
using proto::ImmKind;
using proto::Phase;

namespace {

constexpr auto kDispatch = Phase::kDispatch;
constexpr std::uint32_t kHidden = 8;

// Rank 0 of `nodes` nodes of one rank; the peers are what the test says they are.
struct Bench {
  proto::LayoutConfig config;
  proto::RegionLayout layout;
  std::vector<std::byte> region;
  std::optional<engine::Engine> engine;

  explicit Bench(std::uint32_t nodes = 2, std::uint32_t slots = 4, std::uint32_t nics = 1, std::uint32_t writes = 64,
                 bool reads_slots = true) {
    config.num_nodes = nodes;
    config.experts_per_rank = 2;
    config.top_k = 2;
    config.hidden_size = kHidden;
    config.chunk_rows = 4;
    config.slots = slots;
    layout = proto::RegionLayout(config, 0);
    region.assign(layout.total_bytes(), std::byte{0});
    engine.emplace(engine::EngineConfig{{nodes, 1, 0}, config, nics, writes, region.data(), nullptr, reads_slots});
  }
  // Slots in a GPU's memory: whatever lands, its header is not looked at.
  static Bench blind() { return Bench(2, 4, 1, 64, false); }
  void land_unread(std::uint64_t seq, std::uint64_t epoch, std::uint32_t bytes = 0, bool last = false,
                   Phase phase = kDispatch) {
    engine->on_remote_imm(Imm::make(proto::chunk_kind(phase), last, epoch, 1, seq).encode(), bytes);
  }

  // --- outgoing
  void begin(std::uint64_t epoch, std::vector<std::uint32_t> chunks, Phase phase = kDispatch) {
    engine->on_begun(phase, epoch + 1);
    for (std::uint32_t node = 1; node < config.num_nodes; ++node) {
      engine->on_descriptor({static_cast<std::uint16_t>(node), static_cast<std::uint8_t>(phase), Descriptor::kCounts,
                             chunks[node - 1], 64, static_cast<std::uint32_t>(epoch)});
    }
  }
  void chunk(std::uint16_t node = 1, std::uint32_t bytes = 256, bool last = false, Phase phase = kDispatch) {
    std::uint8_t flags = last ? Descriptor::kLast : std::uint8_t{0};
    engine->on_descriptor({node, static_cast<std::uint8_t>(phase), flags, 1, bytes, 0});
  }
  std::vector<Write> post_all() {
    std::vector<Write> writes;
    while (auto write = engine->next_write()) {
      engine->on_posted(*write);
      writes.push_back(*write);
    }
    return writes;
  }
  void done(const Write& write) { engine->on_write_done(write.id); }
  void credit(std::uint64_t count, std::uint32_t node = 1, Phase phase = kDispatch) {
    engine->on_remote_imm(Imm::make(proto::credit_kind(phase), false, 0, node, count).encode(), 0);
  }
  std::vector<Action> actions() {
    std::vector<Action> taken;
    taken.swap(engine->actions());
    return taken;
  }
  std::optional<std::uint64_t> action(Action::Kind kind) {
    std::optional<std::uint64_t> value;
    for (const Action& action : actions()) {
      if (action.kind == kind) value = action.value;
    }
    return value;
  }

  // --- incoming
  proto::ChunkHeader header(std::uint64_t seq, std::uint64_t epoch = 0, Phase phase = kDispatch) const {
    proto::ChunkHeader header{};
    header.magic = proto::kChunkMagic;
    header.version = proto::kProtocolVersion;
    header.phase = static_cast<std::uint8_t>(phase);
    header.source_rank = 1;
    header.dtype = static_cast<std::uint32_t>(proto::DType::kFp32);
    header.epoch = epoch;
    header.seq = seq;
    header.rows = 2;
    header.num_entries = phase == kDispatch ? 3 : 0;
    std::uint64_t row = proto::hidden_row_bytes(kHidden, proto::DType::kFp32);
    header.total_bytes = static_cast<std::uint32_t>(phase == kDispatch ? proto::dispatch_chunk_bytes(false, 2, 3, row)
                                                                       : proto::combine_chunk_bytes(false, 2, 2, row));
    return header;
  }
  void land(const proto::ChunkHeader& header, std::uint64_t seq, std::uint64_t epoch = 0, Phase phase = kDispatch,
            std::uint32_t bytes = 0) {
    std::memcpy(region.data() + layout.ring_slot(phase, 1, seq), &header, sizeof(header));
    engine->on_remote_imm(Imm::make(proto::chunk_kind(phase), false, epoch, 1, seq).encode(), bytes);
  }
  void land(std::uint64_t seq, std::uint64_t epoch = 0) { land(header(seq, epoch), seq, epoch); }
  proto::CountsRecord record(std::uint64_t epoch) const {
    proto::CountsRecord record{};
    record.magic = proto::kCountsMagic;
    record.version = proto::kProtocolVersion;
    record.source_rank = 1;
    record.dtype = 1;
    record.epoch = epoch;
    record.rows = 9;
    record.rows_per_chunk = 4;
    record.num_chunks = 3;
    return record;
  }
  void counts(const proto::CountsRecord& record, std::uint64_t epoch, std::uint32_t bytes = 0) {
    std::memcpy(region.data() + layout.counts(kDispatch, 1, epoch), &record, sizeof(record));
    engine->on_remote_imm(Imm::make(ImmKind::kDispatchCounts, false, epoch, 1, 0).encode(), bytes);
  }

  void check_failed(const std::string& text, std::int64_t epoch, std::int64_t chunk, int rank = 1) {
    INFO("wanted \"", text, "\", got \"", engine->failure().message, "\"");
    REQUIRE(engine->failed());
    CHECK(engine->failure().code == common::StatusCode::kProtocol);
    CHECK(engine->failure().rank == rank);
    CHECK(engine->failure().epoch == epoch);
    CHECK(engine->failure().chunk == chunk);
    CHECK(engine->failure().message.find(text) != std::string::npos);
    CHECK(actions().empty());
    CHECK(!engine->next_write());
  }
};

ImmKind kind_of(const Write& write) { return Imm::decode(write.imm).kind; }

}  // namespace

TEST_CASE("counts-go-first-then-credits-then-chunks") {
  Bench bench;
  bench.begin(0, {2});
  bench.chunk();
  bench.land(0);
  bench.engine->on_released(kDispatch, 1, 1);
  bench.chunk(1, 256, true);
  std::vector<Write> writes = bench.post_all();
  REQUIRE(writes.size() == 4);
  CHECK(kind_of(writes[0]) == ImmKind::kDispatchCounts);
  CHECK(kind_of(writes[1]) == ImmKind::kDispatchCredit);
  CHECK(Imm::decode(writes[1].imm).value == 1);
  CHECK(writes[1].bytes == 0);
  CHECK(kind_of(writes[2]) == ImmKind::kDispatchChunk);
  CHECK(!Imm::decode(writes[2].imm).last);
  CHECK(Imm::decode(writes[3].imm).last);
  proto::RegionLayout remote(bench.config, 1);
  CHECK(writes[3].remote_offset == remote.ring_slot(kDispatch, 0, 1));
  CHECK(writes[3].local_offset == bench.layout.send_slot(kDispatch, 1, 1));
}

TEST_CASE("a-slot-is-free-only-with-credit-and-completion") {
  Bench bench(2, 2);
  bench.begin(0, {4});
  bench.chunk();
  bench.chunk();
  std::vector<Write> writes = bench.post_all();
  bench.credit(2);
  CHECK(bench.actions().empty());  // credited, not completed
  bench.done(writes[2]);           // completions out of order
  CHECK(bench.actions().empty());
  bench.done(writes[1]);
  CHECK(bench.action(Action::Kind::kSendFree) == 2);
  bench.chunk();
  writes = bench.post_all();
  bench.done(writes[0]);
  CHECK(bench.actions().empty());  // completed, not credited
  bench.credit(3);
  CHECK(bench.action(Action::Kind::kSendFree) == 3);
}

TEST_CASE("a-chunk-packed-without-a-credit-is-an-internal-error") {
  Bench bench(2, 1);
  bench.begin(0, {2});
  bench.chunk();
  bench.chunk();
  CHECK_THROWS_AS(bench.post_all(), common::StatusError);
}

TEST_CASE("credits-are-cumulative-and-may-overtake-each-other") {
  Bench bench;
  bench.begin(0, {4});
  for (int i = 0; i < 4; ++i) bench.chunk();
  for (const Write& write : bench.post_all()) bench.done(write);
  bench.credit(3);
  CHECK(bench.action(Action::Kind::kSendFree) == 3);
  bench.credit(1);
  bench.credit(2);
  CHECK(bench.actions().empty());
  bench.credit(4);
  CHECK(bench.action(Action::Kind::kRetired) == 1);
  bench.credit(5);
  bench.check_failed("never sent", -1, 5);
}

TEST_CASE("credits-return-in-batches-and-a-rest-does-not-wait") {
  Bench bench(2, 8);  // batches of 2
  bench.engine->on_begun(kDispatch, 1);
  for (std::uint64_t seq = 0; seq < 4; ++seq) bench.land(seq);
  bench.engine->on_released(kDispatch, 1, 1);
  CHECK(bench.post_all().empty());  // more is in the ring: the batch fills up
  bench.engine->on_released(kDispatch, 1, 3);
  std::vector<Write> writes = bench.post_all();
  REQUIRE(writes.size() == 1);
  CHECK(Imm::decode(writes[0].imm).value == 3);
  bench.engine->on_released(kDispatch, 1, 4);
  writes = bench.post_all();  // a single one, but nothing more may ever come
  REQUIRE(writes.size() == 1);
  CHECK(Imm::decode(writes[0].imm).value == 4);
}

TEST_CASE("credits-under-way-are-bounded") {
  // The peer gets every newest credit at once and sends on; the others lag. They must not add up (I12).
  Bench bench;
  bench.engine->on_begun(kDispatch, 1);
  std::vector<Write> lagging;
  for (std::uint64_t seq = 0; seq < 100; ++seq) {
    bench.land(seq);
    if (bench.engine->failed()) break;  // the window is closed for want of credits
    bench.engine->on_released(kDispatch, 1, seq + 1);
    for (const Write& write : bench.post_all()) lagging.push_back(write);
  }
  CHECK(lagging.size() == engine::kMaxCreditsInFlight);

  Bench other;
  other.engine->on_begun(kDispatch, 1);
  lagging.clear();
  for (std::uint64_t seq = 0; seq < 6; ++seq) {
    other.land(seq);
    other.engine->on_released(kDispatch, 1, seq + 1);
    for (const Write& write : other.post_all()) lagging.push_back(write);
  }
  REQUIRE(lagging.size() == engine::kMaxCreditsInFlight);
  other.done(lagging[0]);
  std::vector<Write> next = other.post_all();
  REQUIRE(next.size() == 1);  // what was held back goes in one
  CHECK(Imm::decode(next[0].imm).value == 6);
}

TEST_CASE("sequence-numbers-and-credits-wrap-past-the-immediate") {
  Bench bench(2, 3);
  std::uint64_t total = 3 * proto::kImmValueModulus + 5;
  bench.begin(0, {static_cast<std::uint32_t>(total)});
  for (const Write& write : bench.post_all()) bench.done(write);
  for (std::uint64_t seq = 0; seq < total; ++seq) {
    bench.chunk();
    bench.land(seq);
    REQUIRE(bench.action(Action::Kind::kChunkArrived) == seq);
    bench.engine->on_released(kDispatch, 1, seq + 1);
    for (const Write& write : bench.post_all()) bench.done(write);
    bench.credit(seq + 1);
    REQUIRE(bench.action(Action::Kind::kSendFree) == seq + 1);
  }
  CHECK(!bench.engine->failed());
  CHECK(bench.engine->idle());
}

TEST_CASE("an-epoch-retires-when-every-peer-has-all-of-it") {
  Bench bench(3);
  bench.begin(0, {1, 0});
  bench.chunk(1, 256, true);
  bench.begin(1, {0, 0});
  std::vector<Write> writes = bench.post_all();  // counts of 0 (2), of 1 (2), the chunk
  REQUIRE(writes.size() == 5);
  bench.done(writes[2]);
  bench.done(writes[3]);
  bench.done(writes[0]);
  bench.done(writes[4]);
  bench.credit(1);
  CHECK(bench.action(Action::Kind::kRetired) == std::nullopt);  // the counts towards node 2 are still out
  bench.done(writes[1]);
  CHECK(bench.action(Action::Kind::kRetired) == 2);  // epoch 1 had been ready
}

TEST_CASE("arrivals-in-any-order-are-passed-on") {
  Bench bench;
  bench.engine->on_begun(kDispatch, 1);
  for (std::uint64_t seq : {2, 0, 3, 1}) {
    bench.land(seq);
    CHECK(bench.action(Action::Kind::kChunkArrived) == seq);
  }
  CHECK(!bench.engine->failed());
}

TEST_CASE("a-chunk-twice-or-outside-the-window-is-refused") {
  Bench twice;
  twice.engine->on_begun(kDispatch, 1);
  twice.land(1);
  twice.actions();
  twice.land(1);
  twice.check_failed("arrived twice", -1, 1);

  Bench beyond;
  beyond.land(beyond.header(4), 4);
  beyond.check_failed("outside the credit window", -1, 4);

  Bench behind;  // released and credited: what lies behind is 2^14 ahead
  behind.engine->on_begun(kDispatch, 1);
  behind.land(0);
  behind.engine->on_released(kDispatch, 1, 1);
  behind.post_all();
  behind.actions();
  behind.engine->on_remote_imm(Imm::make(ImmKind::kDispatchChunk, false, 0, 1, 0).encode(), 0);
  behind.check_failed("outside the credit window", -1, proto::kImmValueModulus);
}

TEST_CASE("live-epochs-are-accepted-and-others-refused") {
  // 5 begun here: the peer may be in epoch 4 or 5.
  for (std::uint64_t epoch : {3, 4, 5, 6, 20, 21}) {
    Bench bench;
    bench.engine->on_begun(kDispatch, 5);
    bench.land(0, epoch);
    if (epoch == 4 || epoch == 5) {
      CHECK(!bench.engine->failed());
    } else {
      bench.check_failed("stale or future epoch", static_cast<std::int64_t>(epoch), 0);
    }
  }
}

TEST_CASE("every-field-of-a-header-is-checked") {
  struct Case {
    const char* text;
    void (*spoil)(proto::ChunkHeader&);
    std::int64_t epoch;
  };
  std::vector<Case> cases = {
      {"not a chunk header", [](proto::ChunkHeader& h) { h.magic ^= 1; }, -1},
      {"not a chunk header", [](proto::ChunkHeader& h) { ++h.version; }, -1},
      {"contradicts its immediate", [](proto::ChunkHeader& h) { h.phase = 1; }, 0},
      {"contradicts its immediate", [](proto::ChunkHeader& h) { h.seq = 1; }, 0},
      {"contradicts its immediate", [](proto::ChunkHeader& h) { h.source_rank = 0; }, 0},
      {"epoch contradicts", [](proto::ChunkHeader& h) { h.epoch = 1; }, 1},
      {"stale or future", [](proto::ChunkHeader& h) { h.epoch = 16; }, 16},
      {"unknown dtype", [](proto::ChunkHeader& h) { h.dtype = 3; }, 0},
      {"out of range", [](proto::ChunkHeader& h) { h.rows = 0; }, 0},
      {"out of range", [](proto::ChunkHeader& h) { h.rows = 5; }, 0},
      {"out of range", [](proto::ChunkHeader& h) { h.num_entries = 5; }, 0},
      {"out of range", [](proto::ChunkHeader& h) { h.num_entries = ~0u; }, 0},
      {"last mark", [](proto::ChunkHeader& h) { h.flags |= proto::kFlagLast; }, 0},
      {"overflow told by a dispatch", [](proto::ChunkHeader& h) { h.required_capacity = 1; }, 0},
      {"size", [](proto::ChunkHeader& h) { h.flags |= proto::kFlagReplay; }, 0},
      {"size", [](proto::ChunkHeader& h) { ++h.total_bytes; }, 0},
  };
  for (const Case& spoiled : cases) {
    Bench bench;
    bench.engine->on_begun(kDispatch, 1);
    proto::ChunkHeader header = bench.header(0);
    spoiled.spoil(header);
    bench.land(header, 0);
    bench.check_failed(spoiled.text, spoiled.epoch, 0);
  }
  Bench bench;
  bench.engine->on_begun(kDispatch, 1);
  bench.land(bench.header(0), 0, 0, kDispatch, 4096);
  bench.check_failed("4096 arrived", 0, 0);
}

TEST_CASE("combine-chunks-are-checked-with-their-own-size") {
  Bench bench;
  bench.engine->on_begun(Phase::kCombine, 1);
  bench.land(bench.header(0, 0, Phase::kCombine), 0, 0, Phase::kCombine);
  CHECK(bench.action(Action::Kind::kChunkArrived) == 0);
  proto::ChunkHeader header = bench.header(1, 0, Phase::kCombine);
  header.flags |= proto::kFlagWeightGrads;
  bench.land(header, 1, 0, Phase::kCombine);
  bench.check_failed("size", 0, 1);
}

TEST_CASE("where-slots-cannot-be-read-the-immediate-and-the-counts-are-checked") {
  std::uint64_t row = proto::hidden_row_bytes(kHidden, proto::DType::kFp32);
  auto bytes_of = [&](std::uint32_t rows, std::uint32_t entries) {
    return static_cast<std::uint32_t>(proto::dispatch_chunk_bytes(false, rows, entries, row));
  };
  // Nine rows in three chunks of four: 0, 1, 2. Each case lands before the counts, and after them.
  struct Case {
    const char* text;  // empty: accepted
    std::uint64_t seq;
    std::uint32_t bytes;
    bool last;
  };
  const std::vector<Case> cases = {
      {"", 0, 0, false},
      {"", 1, bytes_of(4, 4), false},
      {"", 1, bytes_of(4, 8), false},
      {"", 2, bytes_of(1, 2), true},
      {"", 2, 0, true},
      {"not one of the 3 chunks announced from 0", 3, 0, false},
      {"last mark contradicts", 2, 0, false},
      {"last mark contradicts", 0, 0, true},
      {"the counts allow", 1, bytes_of(4, 4) - 1, false},
      {"the counts allow", 1, bytes_of(4, 8) + 1, false},
      {"the counts allow", 2, bytes_of(4, 4), true},
  };
  for (const Case& c : cases) {
    for (bool counts_first : {false, true}) {
      Bench bench = Bench::blind();
      bench.engine->on_begun(kDispatch, 3);
      if (counts_first) bench.counts(bench.record(2), 2);
      bench.actions();
      bench.land_unread(c.seq, 2, c.bytes, c.last);
      if (!counts_first) {
        CHECK(bench.action(Action::Kind::kChunkArrived) == c.seq);
        bench.counts(bench.record(2), 2);
      }
      INFO(c.text, " seq ", c.seq, " bytes ", c.bytes);
      if (*c.text == '\0') {
        CHECK(!bench.engine->failed());
      } else {
        bench.check_failed(c.text, 2, static_cast<std::int64_t>(c.seq));
      }
    }
  }
}

TEST_CASE("where-slots-cannot-be-read-epochs-windows-and-lengths-are-checked") {
  for (std::uint64_t epoch : {3, 4, 5, 6}) {
    Bench bench = Bench::blind();
    bench.engine->on_begun(kDispatch, 5);
    bench.land_unread(0, epoch);
    if (epoch == 4 || epoch == 5) {
      CHECK(bench.action(Action::Kind::kChunkArrived) == 0);
    } else {
      bench.check_failed("stale or future epoch", -1, 0);
    }
  }
  Bench twice = Bench::blind();
  twice.land_unread(1, 0);
  twice.actions();
  twice.land_unread(1, 0);
  twice.check_failed("arrived twice", -1, 1);
  Bench beyond = Bench::blind();
  beyond.land_unread(4, 0);
  beyond.check_failed("outside the credit window", -1, 4);
  Bench small = Bench::blind();
  small.land_unread(0, 0, 63);
  small.check_failed("a chunk of 63 bytes", 0, 0);
  Bench large = Bench::blind();
  large.land_unread(0, 0, static_cast<std::uint32_t>(large.layout.slot_bytes(kDispatch)) + 1);
  large.check_failed("a chunk of", 0, 0);
  // A later epoch's counts say nothing of chunks before them; nor does a header that nobody reads.
  Bench next = Bench::blind();
  next.engine->on_begun(kDispatch, 1);
  proto::ChunkHeader header = next.header(0);
  header.magic = 0;
  next.land(header, 0);
  CHECK(next.action(Action::Kind::kChunkArrived) == 0);
  proto::CountsRecord record = next.record(1);
  record.first_seq = 3;
  next.counts(record, 1);
  CHECK(!next.engine->failed());
}

TEST_CASE("where-slots-cannot-be-read-a-combine-chunk-has-the-length-that-its-counts-say") {
  for (bool grads : {false, true}) {
    Bench bench = Bench::blind();
    bench.engine->on_begun(Phase::kCombine, 1);
    proto::CountsRecord record = bench.record(0);
    record.phase = 1;
    record.flags = grads ? proto::kFlagWeightGrads : std::uint8_t{0};
    std::memcpy(bench.region.data() + bench.layout.counts(Phase::kCombine, 1, 0), &record, sizeof(record));
    bench.engine->on_remote_imm(Imm::make(ImmKind::kCombineCounts, false, 0, 1, 0).encode(), 0);
    std::uint64_t row = proto::hidden_row_bytes(kHidden, proto::DType::kFp32);
    auto bytes = static_cast<std::uint32_t>(proto::combine_chunk_bytes(grads, 4, 2, row));
    bench.land_unread(0, 0, bytes, false, Phase::kCombine);
    CHECK(!bench.engine->failed());
    bench.actions();
    bench.land_unread(1, 0, bytes + (grads ? -32 : 32), false, Phase::kCombine);
    bench.check_failed("the counts allow", 0, 1);
  }
}

TEST_CASE("counts-are-passed-on-once-per-epoch") {
  Bench bench;
  bench.engine->on_begun(kDispatch, 18);
  bench.counts(bench.record(18), 18);
  CHECK(bench.action(Action::Kind::kCountsArrived) == 18);
  bench.counts(bench.record(17), 17);
  CHECK(bench.action(Action::Kind::kCountsArrived) == 17);
  bench.counts(bench.record(17), 17);
  bench.check_failed("counts arrived twice", 17, -1);
}

TEST_CASE("impossible-counts-are-refused") {
  using Spoil = void (*)(proto::CountsRecord&);
  std::vector<std::pair<const char*, Spoil>> cases = {
      {"contradicts", [](proto::CountsRecord& r) { r.magic = 0; }},
      {"contradicts", [](proto::CountsRecord& r) { r.version = 9; }},
      {"contradicts", [](proto::CountsRecord& r) { r.phase = 1; }},
      {"contradicts", [](proto::CountsRecord& r) { r.epoch = 16; }},
      {"contradicts", [](proto::CountsRecord& r) { r.source_rank = 0; }},
      {"impossible", [](proto::CountsRecord& r) { r.dtype = 7; }},
      {"impossible", [](proto::CountsRecord& r) { r.rows_per_chunk = 5; }},
      {"impossible", [](proto::CountsRecord& r) { r.rows_per_chunk = 0; }},
      {"impossible", [](proto::CountsRecord& r) { r.rows = 0; }},
      {"impossible", [](proto::CountsRecord& r) { r.num_chunks = 2; }},
      {"impossible", [](proto::CountsRecord& r) { r.rows = ~0u; }},
  };
  for (const auto& [text, spoil] : cases) {
    Bench bench;
    bench.engine->on_begun(kDispatch, 1);
    proto::CountsRecord record = bench.record(0);
    spoil(record);
    bench.counts(record, 0);
    bench.check_failed(text, 0, -1);
  }
  Bench stale;
  stale.engine->on_begun(kDispatch, 5);
  stale.counts(stale.record(3), 3);
  stale.check_failed("stale or future epoch", -1, -1);
  Bench small;
  small.counts(small.record(0), 0, 10);
  small.check_failed("of 10 bytes", 0, -1);
}

TEST_CASE("immediates-of-nobody-or-of-no-kind-are-refused") {
  Bench own;
  own.engine->on_remote_imm(Imm::make(ImmKind::kDispatchChunk, false, 0, 0, 0).encode(), 0);
  own.check_failed("names node 0", -1, -1, 0);
  Bench nobody;
  nobody.engine->on_remote_imm(Imm::make(ImmKind::kHello, false, 0, 2, 0).encode(), 0);
  nobody.check_failed("names node 2 of 2", -1, -1, -1);
  Bench nothing;
  nothing.engine->on_remote_imm(Imm::make(ImmKind::kInvalid, true, 3, 1, 9).encode(), 0);
  nothing.check_failed("unknown kind", -1, -1);
}

TEST_CASE("hellos-are-said-once-and-counted") {
  Bench bench(3);
  bench.engine->on_hello_wanted();
  std::vector<Write> writes = bench.post_all();
  REQUIRE(writes.size() == 2);
  CHECK(writes[1].peer_node == 2);
  std::uint32_t hello = Imm::make(ImmKind::kHello, false, 0, 1, 0).encode();
  bench.engine->on_remote_imm(hello, 0);
  CHECK(!bench.engine->all_hellos());
  bench.engine->on_remote_imm(Imm::make(ImmKind::kHello, false, 0, 2, 0).encode(), 0);
  CHECK(bench.engine->all_hellos());
  bench.engine->on_remote_imm(hello, 0);
  bench.check_failed("second hello", -1, -1);
}

TEST_CASE("every-nic-greets-its-namesake-and-only-that-opens-it") {
  Bench bench(3, 4, 2);
  bench.engine->on_hello_wanted();
  bench.engine->on_again(0);  // a NIC that is not connected yet keeps no other from greeting
  std::vector<Write> writes = bench.post_all();
  REQUIRE(writes.size() == 2);
  for (const Write& write : writes) CHECK(write.nic == 1);
  CHECK(bench.engine->has_pending_writes());
  CHECK(bench.engine->waiting_peer() == 1);
  bench.engine->resume_nics();
  std::vector<Write> rest = bench.post_all();
  REQUIRE(rest.size() == 2);
  for (const Write& write : rest) CHECK((write.nic == 0 && Imm::decode(write.imm).value == 0));
  for (std::uint32_t node : {2u, 1u}) {
    for (std::uint32_t nic : {0u, 1u}) {
      CHECK(!bench.engine->all_hellos());
      bench.engine->on_remote_imm(Imm::make(ImmKind::kHello, false, 0, node, nic).encode(), 0);
    }
    if (node == 2) CHECK(bench.engine->missing_hello()->node == 1);
  }
  CHECK(bench.engine->all_hellos());
  CHECK(!bench.engine->missing_hello());
  bench.engine->on_remote_imm(Imm::make(ImmKind::kHello, false, 0, 1, 2).encode(), 0);
  bench.check_failed("hello of NIC 2, each rank has 2", -1, -1);
}

TEST_CASE("one-nic-may-take-everything-and-its-bound-does-not-depend-on-the-others") {
  for (std::uint32_t nics : {1u, 2u, 4u}) {
    Bench bench(2, 4, nics);
    for (std::uint32_t other = 1; other < nics; ++other) bench.engine->on_again(other);
    bench.engine->on_hello_wanted();
    bench.begin(0, {4});
    for (int i = 0; i < 4; ++i) bench.chunk();
    std::uint64_t on_first = 0;
    for (const Write& write : bench.post_all()) on_first += write.nic == 0 ? 1 : 0;
    CHECK(on_first == 6);  // hello, counts, all slots
    CHECK(on_first <= engine::max_inbound_events(bench.layout.config()));
    CHECK(bench.engine->stats().nics[0].writes == 6);
  }
}

TEST_CASE("again-skips-the-nic-until-resumed-and-loses-nothing") {
  Bench bench(2, 4, 2);
  bench.begin(0, {2});
  bench.chunk();
  std::optional<Write> first = bench.engine->next_write();
  REQUIRE(first);
  bench.engine->on_again(first->nic);
  std::optional<Write> second = bench.engine->next_write();
  REQUIRE(second);
  CHECK(second->nic != first->nic);
  CHECK(second->imm == first->imm);
  bench.engine->on_again(second->nic);
  CHECK(!bench.engine->next_write());
  CHECK(bench.engine->has_pending_writes());
  CHECK(bench.engine->waiting_peer() == 1);
  bench.engine->resume_nics();
  CHECK(bench.post_all().size() == 2);
}

TEST_CASE("chunks-go-to-the-nic-with-the-fewest-bytes-so-far") {
  Bench bench(2, 4, 2);
  bench.begin(0, {4});
  for (const Write& write : bench.post_all()) bench.done(write);
  bench.chunk(1, 1000);
  bench.chunk(1, 100);
  bench.chunk(1, 100);
  bench.chunk(1, 100);
  std::vector<Write> writes = bench.post_all();
  REQUIRE(writes.size() == 4);
  CHECK(writes[0].nic == 1);  // the one that carried less, as the counts went over the other
  for (int i = 1; i < 4; ++i) CHECK(writes[i].nic == 0);
  bench.done(writes[0]);
  bench.credit(1);
  CHECK(bench.engine->stats().wire_bytes[0] == 64 + 1300);
}

TEST_CASE("a-nic-that-completes-sooner-gets-no-more-until-the-other-is-a-chunk-behind") {
  Bench bench(2, 8, 2);
  std::uint64_t largest = std::max(bench.layout.slot_bytes(kDispatch), bench.layout.slot_bytes(Phase::kCombine));
  auto chunk_bytes = static_cast<std::uint32_t>(largest * 3 / 4);
  bench.begin(0, {8});
  for (const Write& write : bench.post_all()) bench.done(write);
  std::vector<std::uint32_t> taken;
  for (int i = 0; i < 6; ++i) {
    bench.chunk(1, chunk_bytes);
    for (const Write& write : bench.post_all()) {
      taken.push_back(write.nic);
      if (write.nic == 0) bench.done(write);  // NIC 1 completes nothing
    }
  }
  // In turn, until NIC 1 has 3/2 chunks in flight.
  CHECK(taken == std::vector<std::uint32_t>{1, 0, 1, 0, 0, 0});
}

TEST_CASE("a-nic-that-stood-still-for-long-does-not-get-everything-afterwards") {
  Bench bench(2, 64, 2);
  auto largest = static_cast<std::uint32_t>(
      std::max(bench.layout.slot_bytes(kDispatch), bench.layout.slot_bytes(Phase::kCombine)));
  bench.begin(0, {64});
  for (const Write& write : bench.post_all()) bench.done(write);
  std::vector<Write> held;
  for (int i = 0; i < 32; ++i) {
    bench.chunk(1, largest);
    for (const Write& write : bench.post_all()) {
      if (write.nic == 1) {
        held.push_back(write);
      } else {
        bench.done(write);
      }
    }
  }
  CHECK(held.size() == 2);
  for (const Write& write : held) bench.done(write);
  // Rounds of four small chunks: any NIC's queue has room for all of them.
  std::size_t on_nic_1 = 0;
  for (int round = 0; round < 8; ++round) {
    for (int i = 0; i < 4; ++i) bench.chunk(1, largest / 4);
    std::vector<Write> writes = bench.post_all();
    on_nic_1 = static_cast<std::size_t>(
        std::count_if(writes.begin(), writes.end(), [](const Write& write) { return write.nic == 1; }));
    for (const Write& write : writes) bench.done(write);
  }
  CHECK(on_nic_1 == 2);
}

TEST_CASE("outstanding-writes-per-nic-are-bounded") {
  Bench bench(2, 8, 2, 2);
  bench.begin(0, {8});
  for (int i = 0; i < 8; ++i) bench.chunk();
  std::vector<Write> writes = bench.post_all();
  CHECK(writes.size() == 4);
  bench.done(writes[1]);
  CHECK(bench.post_all().size() == 1);
}

TEST_CASE("the-first-error-wins-and-stops-everything") {
  Bench bench;
  bench.begin(0, {1});
  bench.engine->on_failure({common::StatusCode::kPeerLost, 1, -1, -1, -1, "first"});
  bench.engine->on_failure({common::StatusCode::kTransport, 0, -1, -1, -1, "second"});
  CHECK(bench.engine->failure().message == "first");
  CHECK(!bench.engine->next_write());
  bench.land(0);
  CHECK(bench.actions().empty());
}

TEST_CASE("completions-of-unknown-writes-and-impossible-releases-are-internal-errors") {
  Bench bench;
  CHECK_THROWS_AS(bench.engine->on_write_done(123), common::StatusError);
  CHECK_THROWS_AS(bench.engine->on_released(kDispatch, 1, 1), common::StatusError);
  CHECK_THROWS_AS(bench.chunk(), common::StatusError);  // no epoch was announced
}
