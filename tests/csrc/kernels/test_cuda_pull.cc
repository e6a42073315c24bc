// The body of the CUDA pull kernel, run on fibers: rows, weights, scales, padding, masks and pulls bitwise as the CPU
// kernel leaves them; slots are given back in order; a chunk that cannot be right is refused.
#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>

#include "cuda_testing.h"
#include "kernels/cpu/pull.h"
#include "kernels/cuda/pull_body.h"

using namespace moe_efa;
using namespace moe_efa::testing;
using kernels::cuda::What;
using proto::DType;

namespace {

struct PullCase {
  std::string id;
  std::uint32_t hidden_size;
  DType x, wire, out;
  proto::Fp8Scale scale = proto::Fp8Scale::kFp32;
  std::string routing = "random";
  bool replay = false;
  std::int64_t own_percent = 0, mate_percent = 0;  // static mode: what there is of the rows needed
};

struct Output {
  AlignedBytes x;
  std::vector<float> weights, scales;
};

struct Pulling {
  Pulling(const PullCase& c, std::uint64_t seed)
      : c(c),
        one(c.hidden_size, 0, "none", c.scale, seed),
        incoming(one, c.x, c.wire, c.routing, false, seed),
        plan(limited()) {
    if (c.replay) {  // follows what a fresh dispatch has found
      reference(&plan, false);
      incoming = Incoming(one, c.x, c.wire, c.routing, true, seed);
    }
    flat.emplace(plan, c.replay ? std::vector<std::uint32_t>{} : incoming.num_pulls);
    plan_bytes = flat->bytes();
    args.plan = flat->place(plan_bytes.data());
    plan_bytes = flat->bytes();
    if (plan.is_static() && !c.replay) {
      std::fill_n(args.plan.chunk_overflow, args.plan.num_nodes * args.plan.ring_chunks, ~0ull);  // as memory may be
    }
    args.view = one.view;
    for (std::uint32_t ring = 0; ring < 6; ++ring) rings.push_back({Incoming::first_seq(ring), c.wire});
    args.rings = rings.data();
    args.out_dtype = c.out;
    args.replay = c.replay;
    args.call = &call;
    args.expert_counts = incoming.counts.data();
    args.expert_base = incoming.base.data();
    args.tokens_per_expert = plan.tokens_per_expert.data();
    args.offsets = plan.offsets.data();
    args.num_rows = plan.rows();
    args.usable_rows = plan.usable_rows();
    args.room = incoming.room.empty() ? nullptr : incoming.room.data();
    args.required = incoming.required.data();
    output = empty_output();
    args.x = output.x.data();
    args.weights = c.replay ? nullptr : output.weights.data();
    args.scales = output.scales.data();
    arrivals.assign(args.plan.num_chunks, 0);
    args.arrivals = arrivals.data();
    args.pulled = pulled;
    args.watch = {&grid, &faults, &fault, 20'000'000'000, one.view.topology.rank};
  }

  const kernels::Plan& limited() {
    if (c.mate_percent > 0) incoming.limit(c.own_percent, c.mate_percent);
    return incoming.plan;
  }

  Output empty_output() const {
    std::size_t rows = plan.rows();
    Output out;
    out.x.assign(rows * c.hidden_size * proto::dtype_bytes(c.out), kPoison);
    out.weights.assign(rows, -7.0f);
    out.scales.assign(rows * proto::fp8_blocks(c.hidden_size), -7.0f);
    return out;
  }

  // What the CPU makes of the same chunks, padding included.
  Output reference(kernels::Plan* filled, bool replay) {
    Output out = empty_output();
    std::size_t stride = c.hidden_size * proto::dtype_bytes(c.out), blocks = proto::fp8_blocks(c.hidden_size);
    std::size_t experts = plan.tokens_per_expert.size();
    for (std::size_t expert = 0; expert <= experts; ++expert) {
      bool behind = expert == experts;
      std::size_t begin = plan.offsets[expert] + (behind ? 0 : plan.tokens_per_expert[expert]);
      std::size_t end = behind ? plan.rows() : plan.offsets[expert + 1];
      std::fill(out.x.data() + begin * stride, out.x.data() + end * stride, std::byte{0});
      if (!replay) std::fill(out.weights.begin() + begin, out.weights.begin() + end, 0.0f);
      if (c.out == DType::kFp8) std::fill(out.scales.begin() + begin * blocks, out.scales.begin() + end * blocks, 1.0f);
    }
    kernels::DispatchOutput to{out.x.data(), out.weights.data(), out.scales.data(), false};
    for (std::uint32_t ring = 0; ring < 6; ++ring) {
      std::uint32_t local = ring / 3, node = ring % 3, source = (node * 2 + local) * one.config.experts_per_rank;
      for (std::uint32_t chunk = 0; chunk < plan.rings[ring].num_chunks; ++chunk) {
        std::uint64_t seq = Incoming::first_seq(ring) + chunk;
        kernels::cpu::pull_chunk(
            {filled, &to, c.out, c.wire, local, node, chunk, seq, 5, replay,
             one.view.slots(local) + one.view.layout.ring_slot(proto::Phase::kDispatch, node, seq),
             incoming.counts.data() + source, incoming.base.data() + source, incoming.static_sizes()},
            one.view);
      }
    }
    return out;
  }

  void run(std::uint32_t blocks, std::uint64_t seed) {
#if defined(MOE_EFA_TEST_ON_GPU)
    kernels::cuda::launch_pull(args, blocks, nullptr, 0, nullptr);
    return finish_kernels();
#endif
    run_grid<kernels::cuda::PullShared>(blocks, 64, seed, [&](EmulatedBlock& block, kernels::cuda::PullShared& shared) {
      kernels::cuda::pull_body(block, args, blocks, shared);
    });
  }

  std::uint64_t released(std::uint32_t ring) const {
    std::uint64_t word = one.view.layout.released(proto::Phase::kDispatch, ring % 3, one.view.topology.local_rank());
    return *one.view.word(ring / 3, word);
  }

  void check() {
    kernels::Plan expected_plan = plan;
    Output expected = reference(&expected_plan, c.replay);
    CHECK(fault.set == 0);
    CHECK(grid.ticket == 0);
    for (std::uint32_t word : arrivals) CHECK(word == 0);
    for (std::uint32_t word : pulled) CHECK(word == 0);
    CHECK(std::memcmp(output.x.data(), expected.x.data(), expected.x.size()) == 0);
    CHECK(output.weights == expected.weights);
    if (!expected.scales.empty()) {  // NaN is one of the scales
      CHECK(std::memcmp(output.scales.data(), expected.scales.data(), expected.scales.size() * 4) == 0);
    }
    for (std::uint32_t ring = 0; ring < 6; ++ring) {
      std::uint32_t chunks = plan.rings[ring].num_chunks;
      CHECK(released(ring) == (chunks == 0 ? 0 : Incoming::first_seq(ring) + chunks));
    }
    kernels::Plan found = plan;
    kernels::cuda::read_back(args.plan, &found);
    CHECK(found.masks == expected_plan.masks);
    CHECK(found.chunk_overflow == expected_plan.chunk_overflow);
    for (std::uint32_t ring = 0; ring < 6; ++ring) {
      for (std::uint32_t chunk = 0; chunk < plan.rings[ring].num_chunks; ++chunk) {
        const auto& a = found.pulls[ring][chunk];
        const auto& b = expected_plan.pulls[ring][chunk];
        REQUIRE(a.size() == b.size());
        CHECK((a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0));
      }
    }
  }

  // A chunk of ring 4 (rank 3), whose fields tests patch.
  std::byte* slot() {
    return one.view.slots(1) + one.view.layout.ring_slot(proto::Phase::kDispatch, 1, Incoming::first_seq(4));
  }

  PullCase c;
  OneRank one;
  Incoming incoming;
  kernels::Plan plan;
  std::optional<kernels::cuda::FlatPlan> flat;
  AlignedBytes plan_bytes;
  kernels::cuda::CallState call{5, 3};
  std::vector<kernels::cuda::RingCall> rings;
  Output output;
  std::vector<std::uint32_t> arrivals;
  std::uint32_t pulled[6] = {};
  kernels::cuda::GridState grid{};
  std::uint32_t faults = 0;
  kernels::cuda::Fault fault{};
  kernels::cuda::PullArgs args{};
};

const PullCase kPlain{"plain", 40, DType::kBf16, DType::kBf16, DType::kBf16};

template <typename T>
void refused(std::size_t offset, T value, What what) {
  auto owned = std::make_unique<Pulling>(kPlain, 3);
  Pulling& pulling = *owned;
  std::memcpy(pulling.slot() + offset, &value, sizeof(value));
  pulling.run(2, 1);
  CHECK(pulling.fault.set == 1);
  CHECK(pulling.fault.what == what);
  CHECK(pulling.fault.peer == 3);
  CHECK(pulling.fault.chunk == Incoming::first_seq(4));
  CHECK(pulling.released(4) == 0);
  try {
    kernels::cuda::raise(pulling.fault);
    FAIL("nothing was raised");
  } catch (const common::StatusError& error) {
    CHECK(error.status().code == common::StatusCode::kProtocol);
    CHECK(error.status().rank == 3);
  }
}

}  // namespace

TEST_CASE("output-weights-masks-and-pulls-are-bitwise-those-of-the-cpu") {
  constexpr auto kUe8m0 = proto::Fp8Scale::kUe8m0;
  constexpr auto kFp32 = proto::Fp8Scale::kFp32;
  const PullCase cases[] = {
      {"bf16-h64", 64, DType::kBf16, DType::kBf16, DType::kBf16},
      {"bf16-unaligned-rows-h37", 37, DType::kBf16, DType::kBf16, DType::kBf16},
      {"fp32-h36", 36, DType::kFp32, DType::kFp32, DType::kFp32},
      {"fp32-wire-bf16-out-h72", 72, DType::kFp32, DType::kFp32, DType::kBf16},
      {"bf16-wire-fp32-out-h75", 75, DType::kBf16, DType::kBf16, DType::kFp32},
      {"fp8-to-bf16-h1040", 1040, DType::kBf16, DType::kFp8, DType::kBf16},
      {"fp8-to-fp32-short-block-h141", 141, DType::kFp32, DType::kFp8, DType::kFp32},
      {"fp8-handed-through-h256", 256, DType::kBf16, DType::kFp8, DType::kFp8, kUe8m0},
      {"fp8-handed-through-short-block-h141", 141, DType::kBf16, DType::kFp8, DType::kFp8},
      {"replay-h64", 64, DType::kBf16, DType::kFp8, DType::kBf16, kFp32, "random", true},
      {"no-selections", 64, DType::kBf16, DType::kBf16, DType::kBf16, kFp32, "none"},
      {"no-own-rows", 64, DType::kBf16, DType::kBf16, DType::kBf16, kFp32, "one"},
      {"static-h64", 64, DType::kBf16, DType::kBf16, DType::kBf16, kFp32, "random", false, 60, 80},
      {"static-own-rows-lost-h37", 37, DType::kBf16, DType::kBf16, DType::kBf16, kFp32, "random", false, 90, 100},
      {"static-mate-lost-all-but-some-h36", 36, DType::kFp32, DType::kFp32, DType::kFp32, kFp32, "random", false, 330,
       20},
      {"static-no-room-at-all-h64", 64, DType::kBf16, DType::kBf16, DType::kBf16, kFp32, "random", false, 0, 1},
      {"static-room-for-more-fp8-h141", 141, DType::kBf16, DType::kFp8, DType::kFp8, kFp32, "random", false, 200, 120},
      {"static-replay-h64", 64, DType::kBf16, DType::kFp8, DType::kBf16, kFp32, "random", true, 70, 50},
  };
  std::uint64_t seed = 1;
  for (const PullCase& c : cases) {
    CAPTURE(c.id);
    ++seed;
    auto owned = std::make_unique<Pulling>(c, seed);
    Pulling& pulling = *owned;
    pulling.run(3, seed);
    pulling.check();
  }
}

TEST_CASE("chunks-may-arrive-in-any-order-while-the-grid-waits") {
  auto owned = std::make_unique<Pulling>(kPlain, 4);
  Pulling& pulling = *owned;
  struct Arrival {
    std::uint32_t ring;
    std::uint64_t seq;
  };
  std::vector<Arrival> arrivals;
  for (std::uint32_t ring = 0; ring < 6; ++ring) {
    for (std::uint32_t chunk = 0; chunk < pulling.plan.rings[ring].num_chunks; ++chunk) {
      arrivals.push_back({ring, Incoming::first_seq(ring) + chunk});
      pulling.incoming.arrive(ring / 3, ring % 3, arrivals.back().seq, false);
    }
  }
  std::shuffle(arrivals.begin(), arrivals.end(), std::mt19937_64(9));
  std::thread network([&] {
    for (const Arrival& arrival : arrivals) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      std::uint64_t word = pulling.one.view.layout.arrived(proto::Phase::kDispatch, arrival.ring % 3, arrival.seq);
      __atomic_store_n(pulling.one.view.word(arrival.ring / 3, word), arrival.seq + 1, __ATOMIC_RELEASE);
    }
  });
  pulling.run(3, 1);
  network.join();
  pulling.check();
}

TEST_CASE("a-chunk-that-does-not-come-is-a-fault-that-names-its-source") {
  auto owned = std::make_unique<Pulling>(kPlain, 4);
  Pulling& pulling = *owned;
  REQUIRE(pulling.plan.rings[5].num_chunks > 1);
  std::uint64_t seq = Incoming::first_seq(5) + 1;
  pulling.incoming.arrive(1, 2, seq, false);
  pulling.args.watch.timeout_ns = 20'000'000;
  pulling.run(2, 1);
  CHECK(pulling.fault.what == What::kChunk);
  CHECK(pulling.fault.peer == 5);
  CHECK(pulling.fault.rank == 2);
  CHECK(pulling.fault.chunk == seq);
  CHECK(pulling.fault.expected == seq + 1);
  CHECK(pulling.released(5) <= seq);
}

TEST_CASE("pull-refuses-a-header-of-another-chunk-epoch-plan-or-cut") {
  using proto::ChunkHeader;
  refused(offsetof(ChunkHeader, seq), std::uint64_t{34}, What::kHeader);
  refused(offsetof(ChunkHeader, epoch), std::uint64_t{6}, What::kHeader);
  refused(offsetof(ChunkHeader, magic), 0u, What::kHeader);
  refused(offsetof(ChunkHeader, version), std::uint16_t{2}, What::kHeader);
  refused(offsetof(ChunkHeader, phase), std::uint8_t{1}, What::kHeader);
  refused(offsetof(ChunkHeader, source_rank), 1u, What::kHeader);
  refused(offsetof(ChunkHeader, plan_id), std::uint64_t{8}, What::kPlan);
  refused(offsetof(ChunkHeader, rows), 2u, What::kRows);
  refused(offsetof(ChunkHeader, first_row), 1u, What::kRows);
  refused(offsetof(ChunkHeader, dtype), 1u, What::kDType);
  refused(offsetof(ChunkHeader, flags), proto::kFlagReplay, What::kDType);
  refused(offsetof(ChunkHeader, flags), proto::kFlagLast, What::kDType);
  refused(offsetof(ChunkHeader, num_entries), ~0u, What::kRowEntries);
  refused(offsetof(ChunkHeader, total_bytes), 64u, What::kSize);
  refused(offsetof(ChunkHeader, required_capacity), std::uint64_t{1}, What::kPlan);
}

TEST_CASE("pull-refuses-metadata-out-of-bounds") {
  constexpr std::size_t kMeta = sizeof(proto::ChunkHeader);
  auto owned = std::make_unique<Pulling>(kPlain, 3);
  Pulling& pulling = *owned;
  std::size_t entries = kMeta + pulling.plan.rings[4].rows_in(0) * sizeof(proto::RowMeta);
  proto::RowMeta first;
  std::memcpy(&first, pulling.slot() + kMeta, sizeof(first));
  refused(kMeta + 4, 0u, What::kRowEntries);
  refused(kMeta + 4, 5u, What::kRowEntries);
  refused(kMeta + 4, ~0u, What::kRowEntries);
  refused(kMeta + 4, first.num_entries == 1 ? 2u : first.num_entries - 1,
          first.num_entries == 1 ? What::kRowEntries : What::kLeftOver);
  std::size_t last = kMeta + (pulling.plan.rings[4].rows_in(0) - 1) * sizeof(proto::RowMeta);
  proto::RowMeta last_row;
  std::memcpy(&last_row, pulling.slot() + last, sizeof(last_row));
  REQUIRE(last_row.num_entries < 4);
  refused(last + 4, last_row.num_entries + 1, What::kRowEntries);
  refused(entries + offsetof(proto::RowEntry, expert), std::uint16_t{6}, What::kEntry);
  refused(entries + offsetof(proto::RowEntry, topk_pos), std::uint16_t{4}, What::kEntry);
  std::size_t own = entries;  // the first entry for an own expert
  for (proto::RowEntry entry;; own += sizeof(entry)) {
    std::memcpy(&entry, pulling.slot() + own, sizeof(entry));
    if (entry.expert < 3) break;
  }
  refused(own, 1000u, What::kIndex);
}
