// The region's layout: everything aligned, inside the region and disjoint; the chunk sizes fit their slots.
#include <doctest/doctest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "proto/chunk.h"
#include "proto/region.h"
#include "proto/region_memory.h"

using namespace moe_efa::proto;

namespace {

struct Extent {
  std::uint64_t begin, end;
  std::string name;
};

// Every range that the layout hands out, each once.
std::vector<Extent> all_extents(const RegionLayout& layout) {
  const LayoutConfig& config = layout.config();
  std::vector<Extent> extents;
  auto take = [&](std::uint64_t begin, std::uint64_t bytes, const std::string& name) {
    extents.push_back({begin, begin + bytes, name});
  };
  for (Phase phase : {Phase::kDispatch, Phase::kCombine}) {
    take(layout.begun(phase), 8, "begun");
    take(layout.retired(phase), 8, "retired");
    for (std::uint32_t node = 0; node < config.num_nodes; ++node) {
      take(layout.send_free(phase, node), 8, "send_free");
      for (std::uint32_t reader = 0; reader < config.node_size; ++reader) {
        take(layout.released(phase, node, reader), 8, "released");
      }
      for (std::uint64_t epoch = 0; epoch < 2; ++epoch) {
        take(layout.counts_ready(phase, node, epoch), 8, "counts_ready");
        take(layout.counts(phase, node, epoch), layout.counts_bytes(), "counts");
        take(layout.counts_send(phase, node, epoch), layout.counts_bytes(), "counts_send");
      }
      for (std::uint64_t seq = 0; seq < layout.ring_slots(node); ++seq) {
        take(layout.arrived(phase, node, seq), 8, "arrived");
        if (phase == Phase::kCombine && config.num_nodes == 1) continue;  // the only node has its sums at once
        take(layout.ring_slot(phase, node, seq), layout.slot_bytes(phase), "ring slot");
      }
      if (node == layout.own_node()) continue;
      for (std::uint64_t seq = 0; seq < config.slots; ++seq) {
        take(layout.send_slot(phase, node, seq), layout.slot_bytes(phase), "send slot");
      }
    }
  }
  for (std::uint32_t node = 0; node < config.num_nodes; ++node) {
    take(layout.consumed(node), 8, "consumed");
    for (std::uint32_t mate = 0; mate < config.node_size; ++mate) {
      take(layout.published(mate, node), 8, "published");
      for (std::uint64_t seq = 0; seq < config.publish_slots; ++seq) {
        take(layout.publish_slot(mate, node, seq), layout.publish_slot_bytes(), "publish slot");
      }
    }
  }
  return extents;
}

void check_layout(const LayoutConfig& config) {
  std::uint64_t total = RegionLayout(config, 0).total_bytes();
  for (std::uint32_t own = 0; own < config.num_nodes; ++own) {
    RegionLayout layout(config, own);
    REQUIRE(layout.total_bytes() == total);  // the same on every rank (I15)
    REQUIRE(layout.slots_begin() == RegionLayout(config, 0).slots_begin());
    std::vector<Extent> extents = all_extents(layout);
    std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
    for (std::size_t i = 0; i < extents.size(); ++i) {
      REQUIRE(extents[i].end <= total);
      bool word = extents[i].end - extents[i].begin == 8;
      REQUIRE((extents[i].end <= layout.flag_bytes()) == word);
      bool slot = extents[i].name.find("slot") != std::string::npos;
      REQUIRE((slot ? extents[i].begin >= layout.slots_begin() : extents[i].end <= layout.slots_begin()));
      REQUIRE(extents[i].begin % (word ? 64 : 128) == 0);  // a word has its line for itself
      if (i > 0) {
        INFO(extents[i - 1].name, " and ", extents[i].name);
        REQUIRE(extents[i].begin >= extents[i - 1].end);
      }
    }
  }
}

}  // namespace

TEST_CASE("region-has-no-overlaps") {
  for (std::uint32_t nodes : {1u, 2u, 3u, 8u}) {
    for (std::uint32_t mates : {1u, 2u, 5u}) {
      for (std::uint32_t slots : {1u, 2u, 7u}) {
        LayoutConfig config;
        config.num_nodes = nodes;
        config.node_size = mates;
        config.experts_per_rank = 1 + slots * 5;
        config.top_k = 3;
        config.hidden_size = 9 * slots;
        config.combine_dtypes = DType::kBf16;
        config.chunk_rows = 4 + slots;
        config.slots = slots;
        config.own_slots = 8 - slots;
        config.publish_slots = slots + 1;
        check_layout(config);
      }
    }
  }
}

TEST_CASE("slots-may-lie-apart-at-the-same-offsets") {
  LayoutConfig config;
  config.num_nodes = 2;
  config.node_size = 2;
  RegionLayout layout(config, 0);
  std::vector<std::byte> words(layout.slots_begin()), slots(layout.total_bytes() - layout.slots_begin());
  RegionMemory apart{words.data(), slots.data(), layout.slots_begin(), layout.total_bytes()};
  std::byte* regions[] = {nullptr, words.data()};
  std::byte* bases[] = {nullptr, apart.slot_base()};
  NodeView view{{4, 2, 1}, layout, regions, bases};
  std::uint64_t ring = layout.ring_slot(Phase::kDispatch, 1, 1), counts = layout.counts_send(Phase::kCombine, 1, 1);
  CHECK(apart.at(ring) == slots.data() + (ring - layout.slots_begin()));
  CHECK(apart.at(counts) == words.data() + counts);
  CHECK(view.own_slots() + ring == apart.at(ring));
  CHECK(view.own() + counts == apart.at(counts));
  RegionMemory whole{words.data(), nullptr, layout.slots_begin(), layout.total_bytes()};
  view.slot_bases = nullptr;
  CHECK(whole.at(ring) == words.data() + ring);
  CHECK(whole.slot_base() == words.data());
  CHECK(view.own_slots() == words.data());
}

TEST_CASE("words-that-only-kernels-read-may-lie-behind-the-slots") {
  LayoutConfig config;
  config.num_nodes = 3;
  config.node_size = 2;
  RegionLayout layout(config, 1);
  std::vector<std::uint64_t> theirs = {layout.send_free(Phase::kCombine, 2), layout.published(1, 2), layout.consumed(2),
                                       layout.arrived(Phase::kDispatch, 0, 0), layout.arrived(Phase::kCombine, 1, 1)};
  std::vector<std::uint64_t> others = {layout.begun(Phase::kCombine),
                                       layout.doorbell(),
                                       layout.retired(Phase::kDispatch),
                                       layout.released(Phase::kCombine, 2, 1),
                                       layout.counts_ready(Phase::kCombine, 2, 1),
                                       layout.counts(Phase::kDispatch, 0, 0),
                                       layout.ring_slot(Phase::kDispatch, 0, 0)};
  std::vector<std::byte> words(layout.slots_begin()), apart(layout.flag_bytes() - layout.kernel_words_begin());
  std::byte* regions[] = {nullptr, words.data()};
  std::byte* bases[] = {nullptr, apart.data() - layout.kernel_words_begin()};
  NodeView view{{6, 2, 3}, layout, regions, nullptr, bases};
  auto place = [&](std::uint64_t offset) { return reinterpret_cast<std::byte*>(view.own_word(offset)); };
  for (std::uint64_t offset : theirs) {
    CHECK(layout.only_kernels_read(offset));
    CHECK(place(offset) == apart.data() + (offset - layout.kernel_words_begin()));
    CHECK(place(offset) == view.own_kernel_words() + offset);
  }
  for (std::uint64_t offset : others) {
    CHECK(!layout.only_kernels_read(offset));
    CHECK(place(offset) == words.data() + offset);
  }
  view.kernel_word_bases = nullptr;
  for (std::uint64_t offset : theirs) CHECK(place(offset) == words.data() + offset);

  // Behind the slots, in pages of their own.
  CHECK(layout.kernel_words_at() % kDevicePageBytes == 0);
  CHECK(layout.kernel_words_at() >= layout.total_bytes() - layout.slots_begin());
  CHECK(layout.kernel_words_bytes() % kDevicePageBytes == 0);
  CHECK(layout.kernel_words_bytes() >= apart.size());
  CHECK(layout.kernel_words_bytes() < apart.size() + kDevicePageBytes);
}

TEST_CASE("region-slots-repeat-after-s") {
  LayoutConfig config;
  config.num_nodes = 3;
  config.slots = 4;
  config.own_slots = 3;
  config.publish_slots = 2;
  RegionLayout layout(config, 1);
  CHECK(layout.ring_slot(Phase::kDispatch, 0, 5) == layout.ring_slot(Phase::kDispatch, 0, 1));
  CHECK(layout.ring_slot(Phase::kDispatch, 1, 5) == layout.ring_slot(Phase::kDispatch, 1, 2));
  CHECK(layout.send_slot(Phase::kCombine, 2, 7) == layout.send_slot(Phase::kCombine, 2, 3));
  CHECK(layout.publish_slot(0, 2, 3) == layout.publish_slot(0, 2, 1));
  CHECK(layout.counts(Phase::kDispatch, 2, 9) == layout.counts(Phase::kDispatch, 2, 1));
}

TEST_CASE("the-largest-chunk-fits-its-slot") {
  const DTypeSet sets[] = {DType::kBf16, DType::kFp32, DType::kFp8, DTypeSet(DType::kFp8) | DType::kBf16,
                           DTypeSet(DType::kFp8) | DType::kBf16 | DType::kFp32};
  for (DTypeSet dtypes : sets) {
    for (std::uint32_t hidden : {1u, 7u, 8u, 40u, 128u, 129u, 1000u}) {
      LayoutConfig config;
      config.top_k = 5;
      config.hidden_size = hidden;
      config.chunk_rows = 7;
      config.dispatch_dtypes = config.combine_dtypes = dtypes;
      RegionLayout layout(config, 0);
      for (DType dtype : {DType::kBf16, DType::kFp32, DType::kFp8}) {
        if (!dtypes.has(dtype)) continue;
        std::uint64_t row = hidden_row_bytes(hidden, dtype);
        CHECK(row % 16 == 0);
        CHECK(row >= dense_row_bytes(hidden, dtype));
        CHECK(dispatch_chunk_bytes(false, 7, 35, row) <= layout.slot_bytes(Phase::kDispatch));
        CHECK(dispatch_chunk_bytes(true, 7, 0, row) <= layout.slot_bytes(Phase::kDispatch));
        CHECK(combine_chunk_bytes(true, 7, 5, row) <= layout.slot_bytes(Phase::kCombine));
        std::uint64_t published = hidden_row_bytes(hidden, publish_dtype(dtype));
        CHECK(publish_chunk_bytes(true, 7, 5, published) <= layout.publish_slot_bytes());
      }
    }
  }
}

TEST_CASE("an-fp8-row-is-codes-then-scales-each-padded-to-16-bytes") {
  CHECK(hidden_row_bytes(1, DType::kFp8) == 16 + 16);
  CHECK(hidden_row_bytes(200, DType::kFp8) == 208 + 16);
  CHECK(fp8_scales_offset(200) == 208);
  CHECK(fp8_blocks(128) == 1);
  CHECK(fp8_blocks(129) == 2);
  CHECK(hidden_row_bytes(7168, DType::kFp8) == 7168 + 224);
  CHECK(dense_row_bytes(7168, DType::kFp8) == 7392);
  CHECK(dense_row_bytes(200, DType::kFp8) == 208);
  CHECK(dense_row_bytes(200, DType::kBf16) == 400);
}

TEST_CASE("rows-per-chunk-stays-between-eight-and-chunk-rows") {
  CHECK(rows_per_chunk(1, 1, 64) == 8);
  CHECK(rows_per_chunk(32, 1, 64) == 16);
  CHECK(rows_per_chunk(33, 1, 64) == 17);
  CHECK(rows_per_chunk(33, 4, 64) == 8);
  CHECK(rows_per_chunk(1'000'000, 1, 64) == 64);
  CHECK(rows_per_chunk(1'000'000, 1, 3) == 3);
}

TEST_CASE("topology-counts-ranks-node-by-node") {
  Topology topology{12, 4, 6};
  CHECK(topology.num_nodes() == 3);
  CHECK(topology.node() == 1);
  CHECK(topology.local_rank() == 2);
  CHECK(topology.rail_peer(2) == 10);
  CHECK(topology.rank_of(0, 3) == 3);
}
