// pack and pull of one chunk: rows land where the sender's index says, and no field of a chunk is believed unchecked.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "common/status.h"
#include "kernels/cpu/pack.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/pull.h"
#include "kernels/cpu/stream.h"

using namespace moe_efa;

namespace {

constexpr std::uint32_t kHidden = 5, kTopK = 2;

// Rank 0 (node 0) sends 3 tokens to rank 1 (node 1), which owns experts 2 and 3.
struct Pair {
  proto::LayoutConfig config;
  proto::NodeView sender, receiver;
  std::vector<std::int64_t> topk = {3, 2, -1, 3, 2, -1};
  std::vector<float> topk_weights = {.1f, .2f, 0, .3f, .4f, 0}, x;
  kernels::DispatchArgs args;
  std::vector<std::byte> slot;
  kernels::Plan plan;  // the receiver's
  std::vector<float> out, weights;
  kernels::DispatchOutput output;
  std::vector<std::uint32_t> counts = {2, 2};
  std::vector<std::int64_t> base = {10, 20};
  std::optional<kernels::cpu::StaticSizes> static_sizes;

  Pair() {
    config.num_nodes = 2;
    config.experts_per_rank = 2;
    config.top_k = kTopK;
    config.hidden_size = kHidden;
    config.chunk_rows = 4;
    sender = {{2, 1, 0}, proto::RegionLayout(config, 0), nullptr};
    receiver = {{2, 1, 1}, proto::RegionLayout(config, 1), nullptr};
    for (std::uint32_t i = 0; i < 3 * kHidden; ++i) x.push_back(static_cast<float>(i) + 0.5f);
    args.x = x.data();
    args.x_dtype = args.wire_dtype = args.out_dtype = proto::DType::kFp32;
    args.plan = kernels::cpu::build_send_plan({topk.data(), topk_weights.data(), 3, 1, 1}, sender);
    args.plan->plan_id = 7;
    slot.assign(sender.layout.slot_bytes(proto::Phase::kDispatch), std::byte{0xEE});
    std::uint32_t bytes = kernels::cpu::pack_chunk({&args, 1, 0, 33, 7, slot.data()}, sender);
    CHECK(bytes == proto::dispatch_chunk_bytes(false, 3, 4, proto::hidden_row_bytes(kHidden, proto::DType::kFp32)));
    plan.plan_id = 7;
    plan.rings = {args.plan->send[1].facts, {}};
    plan.pulls = {{{}}, {}};
    plan.masks = {{0, 0, 0}, {}};
    out.assign(30 * kHidden, -1.0f);
    weights.assign(30, -1.0f);
    output = {out.data(), weights.data()};
  }

  // The same between nodes of two ranks: rank 0 to rank 2, which owns expert 2 as its mate owns expert 3. They have
  // room for so many rows.
  Pair(std::uint32_t capacity, std::uint32_t mates_capacity) : Pair() {
    config.node_size = 2;
    config.experts_per_rank = 1;
    sender = {{4, 2, 0}, proto::RegionLayout(config, 0), nullptr};
    receiver = {{4, 2, 2}, proto::RegionLayout(config, 1), nullptr};
    args.plan = kernels::cpu::build_send_plan({topk.data(), topk_weights.data(), 3, 1, 1}, sender);
    args.plan->plan_id = 7;
    kernels::cpu::pack_chunk({&args, 1, 0, 33, 7, slot.data()}, sender);
    plan.rings = {args.plan->send[1].facts, {}, {}, {}};
    plan.pulls = {{{}}, {}, {}, {}};
    plan.capacity = capacity;
    counts = {2};
    base = {0};
    static_sizes.emplace(receiver);
    std::uint32_t node_counts[] = {2, 2};
    static_sizes->set_counts(0, node_counts);
    static_sizes->set_output(0, capacity, 1);
    static_sizes->set_output(1, mates_capacity, 1);
    static_sizes->finish();
    if (static_sizes->any_lost()) plan.chunk_overflow = {{0}, {}};
  }

  void pull() {
    kernels::cpu::pull_chunk({&plan, &output, proto::DType::kFp32, proto::DType::kFp32, 0, 0, 0, 33, 7, false,
                              slot.data(), counts.data(), base.data(), static_sizes ? &*static_sizes : nullptr},
                             receiver);
  }
  template <typename T>
  void patch(std::size_t offset, T value) {
    std::memcpy(slot.data() + offset, &value, sizeof(value));
  }
  // A pull of the patched chunk is refused in the sender's name, for a reason that contains `text`.
  void check_refused(const std::string& text) {
    try {
      pull();
      FAIL("accepted where \"" << text << "\" was due");
    } catch (const common::StatusError& error) {
      CHECK(error.status().code == common::StatusCode::kProtocol);
      CHECK(error.status().rank == 0);
      CHECK(error.status().epoch == 7);
      CHECK(error.status().chunk == 33);
      CHECK(std::string(error.what()).find(text) != std::string::npos);
    }
  }
};

// A fresh chunk with one field patched is refused.
template <typename T>
void refused(std::size_t offset, T value, const std::string& text) {
  Pair pair;
  pair.patch(offset, value);
  pair.check_refused(text);
}

constexpr std::size_t kMeta = sizeof(proto::ChunkHeader), kEntries = kMeta + 3 * sizeof(proto::RowMeta);

}  // namespace

TEST_CASE("pack-then-pull-places-every-row-by-its-index") {
  Pair pair;
  pair.pull();
  // Rows: token 0 -> experts 2 (weight .2) and 3 (.1), token 1 -> 3 (.3), token 2 -> 2 (.4).
  std::vector<std::pair<std::uint32_t, std::pair<std::uint32_t, float>>> expected = {
      {10, {0, .2f}}, {20, {0, .1f}}, {21, {1, .3f}}, {11, {2, .4f}}};
  std::vector<float> out(30 * kHidden, -1.0f), weights(30, -1.0f);
  for (const auto& [row, from] : expected) {
    std::memcpy(out.data() + row * kHidden, pair.x.data() + from.first * kHidden, kHidden * 4);
    weights[row] = from.second;
  }
  CHECK(pair.out == out);
  CHECK(pair.weights == weights);
  CHECK(pair.plan.masks[0] == std::vector<std::uint8_t>{1, 1, 1});
  REQUIRE(pair.plan.pulls[0][0].size() == 4);
  CHECK(pair.plan.pulls[0][0][1].row() == 0);
  CHECK(pair.plan.pulls[0][0][1].topk_pos() == 0);
}

TEST_CASE("stores-past-the-caches-write-the-same-bytes-and-no-other") {
  Pair cached, streamed;
  cached.pull();
  streamed.output.stream = true;
  streamed.pull();
  CHECK(streamed.out == cached.out);
  CHECK(streamed.weights == cached.weights);
  // Every alignment and length around whole lines.
  std::vector<std::byte> from(512), to(512);
  for (std::size_t i = 0; i < from.size(); ++i) from[i] = static_cast<std::byte>(i * 7 + 1);
  for (std::size_t start = 0; start < 70; ++start) {
    for (std::size_t bytes : {0, 1, 15, 16, 63, 64, 65, 127, 128, 130, 257, 300}) {
      std::fill(to.begin(), to.end(), std::byte{0xEE});
      kernels::cpu::stream_copy(to.data() + start, from.data() + start % 13, bytes);
      kernels::cpu::stream_fence();
      CHECK(std::memcmp(to.data() + start, from.data() + start % 13, bytes) == 0);
      CHECK(std::all_of(to.begin(), to.begin() + start, [](std::byte b) { return b == std::byte{0xEE}; }));
      CHECK(std::all_of(to.begin() + start + bytes, to.end(), [](std::byte b) { return b == std::byte{0xEE}; }));
    }
  }
}

TEST_CASE("pull-places-what-there-is-room-for-and-notes-what-is-lost") {
  struct Case {
    std::uint32_t capacity, mates_capacity;
    std::vector<std::uint8_t> masks;
    std::uint64_t overflow;
    std::size_t pulled;
  };
  // Token 0 goes to both, token 1 to the mate, token 2 here.
  const Case cases[] = {
      {2, 2, {3, 2, 1}, 0, 2}, {2, 1, {3, 0, 1}, 2, 2}, {1, 5, {3, 2, 0}, 2, 1}, {0, 0, {0, 0, 0}, 2, 0}};
  for (const Case& expected : cases) {
    Pair pair(expected.capacity, expected.mates_capacity);
    pair.pull();
    CHECK(pair.plan.masks[0] == expected.masks);
    CHECK(pair.plan.overflow_of(0, 0) == expected.overflow);
    CHECK(pair.plan.pulls[0][0].size() == expected.pulled);
    CHECK(std::count(pair.weights.begin(), pair.weights.end(), -1.0f) == 30 - static_cast<long>(expected.pulled));
    CHECK(std::all_of(pair.out.begin() + expected.pulled * kHidden, pair.out.end(), [](float v) { return v == -1; }));
  }
}

TEST_CASE("pull-refuses-a-header-of-another-chunk-epoch-plan-or-cut") {
  refused(offsetof(proto::ChunkHeader, seq), std::uint64_t{34}, "another chunk");
  refused(offsetof(proto::ChunkHeader, epoch), std::uint64_t{6}, "another chunk");
  refused(offsetof(proto::ChunkHeader, magic), 0u, "another chunk");
  refused(offsetof(proto::ChunkHeader, source_rank), 1u, "another chunk");
  refused(offsetof(proto::ChunkHeader, plan_id), std::uint64_t{8}, "another plan");
  refused(offsetof(proto::ChunkHeader, rows), 2u, "announced cut");
  refused(offsetof(proto::ChunkHeader, first_row), 1u, "announced cut");
  refused(offsetof(proto::ChunkHeader, dtype), 0u, "flags or dtype");
  refused(offsetof(proto::ChunkHeader, flags), proto::kFlagReplay, "flags or dtype");
  refused(offsetof(proto::ChunkHeader, version), std::uint16_t{2}, "another chunk");
  refused(offsetof(proto::ChunkHeader, phase), std::uint8_t{1}, "another chunk");
  refused(offsetof(proto::ChunkHeader, num_entries), ~0u, "entries of a row");
  refused(offsetof(proto::ChunkHeader, total_bytes), 64u, "another size");
  refused(offsetof(proto::ChunkHeader, required_capacity), std::uint64_t{1}, "another plan");
}

TEST_CASE("pull-refuses-metadata-out-of-bounds") {
  constexpr std::size_t kEntryBytes = sizeof(proto::RowEntry);
  refused(kMeta + 4, 0u, "entries of a row");
  refused(kMeta + 4, 5u, "entries of a row");
  refused(kMeta + 4, ~0u, "entries of a row");
  refused(kMeta + 4, 1u, "entries left over");
  refused(kEntries + offsetof(proto::RowEntry, expert), std::uint16_t{2}, "expert or");
  refused(kEntries + offsetof(proto::RowEntry, topk_pos), std::uint16_t{2}, "expert or");
  refused(kEntries + kEntryBytes, 2u, "announced count");
  Pair pair(2, 2);  // the second entry is for the mate, who has room for everything that was announced
  pair.patch(kEntries + kEntryBytes, 2u);
  pair.check_refused("announced count of a mate");
}
