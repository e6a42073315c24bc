// The body of the CUDA combine kernel, run on fibers: what publish, forward and reduce write is bitwise what the CPU
// kernels write, with gradients of the weights, on several nodes and on one.
#include <doctest/doctest.h>

#include "cuda_testing.h"
#include "kernels/cpu/forward.h"
#include "kernels/cpu/publish.h"
#include "kernels/cpu/pull.h"
#include "kernels/cpu/reduce.h"
#include "kernels/cpu/rows.h"
#include "kernels/cuda/combine_body.h"

using namespace moe_efa;
using namespace moe_efa::testing;
using kernels::cuda::What;
using proto::DType;

namespace {

constexpr auto kPhase = proto::Phase::kCombine;

struct CombineCase {
  std::string id;
  std::uint32_t hidden_size;
  DType y, wire;
  bool weighted = true;
  bool grads = false;
  std::uint32_t nodes = 3;
  proto::Fp8Scale scale = proto::Fp8Scale::kFp32;
  std::string routing = "random";
  std::int64_t own_percent = 0, mate_percent = 0;  // static mode: what there is of the rows needed
};

struct Combining {
  Combining(const CombineCase& c, std::uint64_t seed)
      : c(c),
        one(c.hidden_size, 0, "none", c.scale, seed, c.nodes),
        incoming(one, DType::kBf16, DType::kBf16, c.routing, false, seed, true),
        plan(std::make_shared<kernels::Plan>(limited())),
        num_rings(2 * c.nodes) {
    fill_plan();
    std::size_t rows = plan->rows(), elements = std::size_t{plan->num_tokens} * c.hidden_size;
    y = random_rows(static_cast<std::uint32_t>(rows), c.hidden_size, c.y, seed + 50, true);
    for (std::size_t i = 0; i < rows; ++i) {
      weights.push_back(static_cast<float>(i % 13) / 16 - 0.3f);
      grads.push_back(static_cast<float>(i % 17) / 8 - 1.1f);
    }
    weights.push_back(0);  // a pointer that is not null also where there are no rows
    grads.push_back(0);
    out.assign(elements * proto::dtype_bytes(c.y), kPoison);
    topk_grads.assign(std::size_t{plan->num_tokens} * one.config.top_k, -7.0f);
    for (std::uint32_t ring = 0; ring < num_rings; ++ring) publish_seq.push_back(2 + 3 * ring);
    for (std::uint32_t node = 0; node < c.nodes; ++node) receive_seq.push_back(5 * node + 1);
    receive_seq[one.view.topology.node()] = publish_seq[one.view.topology.node()];
    fill_published(seed);
    fill_returned(seed);

    flat.emplace(*plan);
    plan_bytes = flat->bytes();
    args.plan = flat->place(plan_bytes.data());
    plan_bytes = flat->bytes();
    args.view = one.view;
    args.y = y.data();
    args.y_dtype = c.y;
    args.wire_dtype = c.wire;
    args.weights = c.weighted ? weights.data() : nullptr;
    args.weight_grads = c.grads ? grads.data() : nullptr;
    args.out = out.data();
    args.topk_weight_grads = topk_grads.data();
    args.call = &call;
    args.publish_seq = publish_seq.data();
    args.receive_seq = receive_seq.data();
    next.assign(2 * num_rings, 0);
    ring_arrivals.assign(args.plan.num_chunks, 0);
    send_arrivals.assign(c.nodes * args.plan.send_chunks, 0);
    ready.assign(c.nodes * one.config.slots, {});
    args.next = next.data();
    args.ring_arrivals = ring_arrivals.data();
    args.send_arrivals = send_arrivals.data();
    args.ready = ready.data();
    args.grids = grids;
    args.watch = {nullptr, &faults, &fault, 20'000'000'000, one.view.topology.rank};
  }

  const kernels::Plan& limited() {
    if (c.mate_percent > 0) incoming.limit(c.own_percent, c.mate_percent);
    return incoming.plan;
  }

  // Pulls and masks, as the dispatch has left them.
  void fill_plan() {
    std::vector<std::byte> x(plan->rows() * c.hidden_size * 2);
    std::vector<float> unused(plan->rows());
    kernels::DispatchOutput to{x.data(), unused.data(), nullptr, false};
    for (std::uint32_t ring = 0; ring < num_rings; ++ring) {
      std::uint32_t local = ring / c.nodes, node = ring % c.nodes;
      std::uint32_t source = (node * 2 + local) * one.config.experts_per_rank;
      for (std::uint32_t chunk = 0; chunk < plan->rings[ring].num_chunks; ++chunk) {
        std::uint64_t seq = Incoming::first_seq(ring) + chunk;
        kernels::cpu::pull_chunk(
            {plan.get(), &to, DType::kBf16, DType::kBf16, local, node, chunk, seq, 5, false,
             one.view.slots(local) + one.view.layout.ring_slot(proto::Phase::kDispatch, node, seq),
             incoming.counts.data() + source, incoming.base.data() + source, incoming.static_sizes()},
            one.view);
      }
    }
    plan->complete = true;
  }

  // What the mate has published for this rank to forward, and all slots free.
  void fill_published(std::uint64_t seed) {
    DType dtype = proto::publish_dtype(c.wire);
    std::uint64_t row_bytes = proto::hidden_row_bytes(c.hidden_size, dtype);
    for (std::uint32_t node = 0; node < c.nodes; ++node) {
      const kernels::RingFacts& facts = plan->rings[node];
      for (std::uint32_t chunk = 0; chunk < facts.num_chunks; ++chunk) {
        std::uint32_t rows = facts.rows_in(chunk);
        std::byte* slot = one.view.slots(1) + one.view.layout.publish_slot(0, node, publish_seq[node] + chunk);
        std::vector<std::byte> values = random_rows(rows, c.hidden_size, dtype, seed + 90 + chunk, true);
        std::size_t bytes = values.size() / rows;
        for (std::uint32_t row = 0; row < rows; ++row) {
          std::memcpy(slot + row * row_bytes, values.data() + row * bytes, bytes);
        }
        for (std::uint32_t i = 0; i < rows * one.config.top_k; ++i) {
          float grad = static_cast<float>((i + chunk) % 5) - 2.2f;
          std::memcpy(slot + rows * row_bytes + i * 4, &grad, 4);
        }
      }
      std::uint64_t end = publish_seq[node] + facts.num_chunks;
      *one.view.word(1, one.view.layout.published(0, node)) = end;
      *one.view.word(1, one.view.layout.consumed(node)) = publish_seq[c.nodes + node] + 7;
      *one.view.own_word(one.view.layout.send_free(kPhase, node)) = end;
    }
    std::uint32_t own_node = one.view.topology.node();
    if (c.nodes > 1) {
      *one.view.own_word(one.view.layout.released(kPhase, own_node, 0)) = publish_seq[own_node];
    }
  }

  // What other nodes have sent back.
  void fill_returned(std::uint64_t seed) {
    std::uint64_t row_bytes = proto::hidden_row_bytes(c.hidden_size, c.wire);
    for (std::uint32_t node = 0; node < c.nodes; ++node) {
      if (node == one.view.topology.node()) continue;
      const kernels::RingFacts& facts = plan->send[node].facts;
      for (std::uint32_t chunk = 0; chunk < facts.num_chunks; ++chunk) {
        std::uint64_t seq = receive_seq[node] + chunk;
        std::uint32_t rows = facts.rows_in(chunk);
        std::byte* slot = one.view.own_slots() + one.view.layout.ring_slot(kPhase, node, seq);
        proto::ChunkHeader header{};
        header.magic = proto::kChunkMagic;
        header.version = proto::kProtocolVersion;
        header.phase = static_cast<std::uint8_t>(kPhase);
        header.flags = static_cast<std::uint8_t>((c.grads ? proto::kFlagWeightGrads : 0) |
                                                 (chunk + 1 == facts.num_chunks ? proto::kFlagLast : 0));
        header.source_rank = one.view.topology.rail_peer(node);
        header.total_bytes =
            static_cast<std::uint32_t>(proto::combine_chunk_bytes(c.grads, rows, one.config.top_k, row_bytes));
        header.dtype = static_cast<std::uint32_t>(c.wire);
        header.epoch = call.epoch;
        header.seq = seq;
        header.plan_id = call.plan_id;
        header.rows = rows;
        header.first_row = facts.first_row(chunk);
        if (plan->is_static()) header.required_capacity = 40 * (seq % 5);
        std::memcpy(slot, &header, sizeof(header));
        DType from = c.wire == DType::kBf16 ? DType::kBf16 : DType::kFp32;
        std::vector<std::byte> values = random_rows(rows, c.hidden_size, from, seed + 70 + seq, true);
        for (std::uint32_t row = 0; row < rows; ++row) {
          kernels::cpu::convert_row(slot + sizeof(header) + row * row_bytes, c.wire,
                                    values.data() + row * (values.size() / rows), from, c.hidden_size, c.scale);
        }
        for (std::uint32_t i = 0; i < rows * one.config.top_k; ++i) {
          float grad = static_cast<float>((i * 3 + chunk) % 7) - 3.3f;
          std::memcpy(slot + sizeof(header) + rows * row_bytes + i * 4, &grad, 4);
        }
        *one.view.own_word(one.view.layout.arrived(kPhase, node, seq)) = seq + 1;
      }
    }
  }

  void run(const kernels::cuda::CombineBlocks& blocks, std::uint64_t seed) {
#if defined(MOE_EFA_TEST_ON_GPU)
    kernels::cuda::launch_combine(args, blocks, nullptr);
    return finish_kernels();
#endif
    std::uint32_t count = blocks.publish + blocks.forward + blocks.reduce;
    run_grid<kernels::cuda::CombineShared>(count, 64, seed,
                                           [&](EmulatedBlock& block, kernels::cuda::CombineShared& shared) {
                                             kernels::cuda::combine_body(block, args, blocks, shared);
                                           });
  }

  void check() {
    kernels::CombineArgs cpu;
    cpu.y = y.data();
    cpu.y_dtype = c.y;
    cpu.wire_dtype = c.wire;
    cpu.plan = plan;
    cpu.weights = args.weights;
    cpu.weight_grads = args.weight_grads;
    std::vector<std::byte> result(out.size(), std::byte{0});
    std::vector<float> result_grads(topk_grads.size(), 0.0f);
    cpu.out = result.data();
    cpu.topk_weight_grads = result_grads.data();
    const proto::RegionLayout& layout = one.view.layout;

    CHECK(fault.set == 0);
    for (const auto* words : {&next, &ring_arrivals, &send_arrivals}) {
      for (std::uint32_t word : *words) CHECK(word == 0);
    }
    std::vector<std::byte> expected;
    for (std::uint32_t node = 0; node < c.nodes; ++node) {  // published for the mate
      std::uint32_t ring = c.nodes + node;
      for (std::uint32_t chunk = 0; chunk < plan->rings[ring].num_chunks; ++chunk) {
        expected.assign(layout.publish_slot_bytes(), kPoison);
        kernels::cpu::publish_chunk({&cpu, 1, node, chunk, expected.data()}, one.view);
        const std::byte* slot = one.view.own_slots() + layout.publish_slot(1, node, publish_seq[ring] + chunk);
        CHECK(std::memcmp(slot, expected.data(), expected.size()) == 0);
      }
      std::uint64_t end = plan->rings[ring].num_chunks;
      CHECK(*one.view.own_word(layout.published(1, node)) == (end == 0 ? 0 : publish_seq[ring] + end));
    }
    for (std::uint32_t node = 0; node < c.nodes; ++node) {  // forwarded
      const kernels::RingFacts& facts = plan->rings[node];
      std::uint64_t end = facts.num_chunks;
      CHECK(*one.view.own_word(layout.consumed(node)) == (end == 0 ? 0 : publish_seq[node] + end));
      for (std::uint32_t chunk = 0; chunk < facts.num_chunks; ++chunk) {
        std::uint64_t seq = publish_seq[node] + chunk;
        expected.assign(layout.slot_bytes(kPhase), kPoison);
        kernels::cpu::ForwardArgs forward{&cpu, node, chunk, seq, call.epoch, expected.data()};
        if (c.nodes == 1) {
          kernels::cpu::forward_to_output(forward, one.view);
          continue;
        }
        std::uint32_t bytes = kernels::cpu::forward_chunk(forward, one.view);
        bool own = node == one.view.topology.node();
        const std::byte* slot =
            one.view.own_slots() + (own ? layout.ring_slot(kPhase, node, seq) : layout.send_slot(kPhase, node, seq));
        CHECK(std::memcmp(slot, expected.data(), expected.size()) == 0);
        const kernels::cuda::ChunkReady& word = ready[node * one.config.slots + seq % one.config.slots];
        CHECK(word.seq_plus_1 == (own ? 0 : seq + 1));
        if (!own) CHECK(word.bytes == bytes);
      }
    }
    if (c.nodes > 1) {
      kernels::cpu::reduce_tokens({&cpu, receive_seq.data(), 0, plan->num_tokens}, one.view);
      for (std::uint32_t node = 0; node < c.nodes; ++node) {
        std::uint64_t chunks = plan->send[node].facts.num_chunks;
        if (chunks == 0) continue;
        CHECK(*one.view.own_word(layout.released(kPhase, node, 0)) == receive_seq[node] + chunks);
      }
    }
    CHECK(std::memcmp(out.data(), result.data(), result.size()) == 0);
    if (plan->is_static()) CHECK(*args.plan.overflow == required());
    if (c.grads) CHECK(std::memcmp(topk_grads.data(), result_grads.data(), result_grads.size() * 4) == 0);
  }

  // What the user is told: of the own experts, the own node and the others.
  std::uint64_t required() const {
    auto most = static_cast<std::uint64_t>(*plan->overflow);
    for (std::uint32_t node = 0; node < c.nodes; ++node) {
      for (std::uint32_t chunk = 0; chunk < plan->send[node].facts.num_chunks; ++chunk) {
        bool own = node == one.view.topology.node();
        most = std::max(most, own ? plan->overflow_of(node, chunk) : 40 * ((receive_seq[node] + chunk) % 5));
      }
    }
    return most;
  }

  CombineCase c;
  OneRank one;
  Incoming incoming;
  std::shared_ptr<kernels::Plan> plan;
  std::uint32_t num_rings;
  std::vector<std::byte> y, out;
  std::vector<float> weights, grads, topk_grads;
  std::vector<std::uint64_t> publish_seq, receive_seq;
  std::optional<kernels::cuda::FlatPlan> flat;
  AlignedBytes plan_bytes;
  kernels::cuda::CallState call{9, 3};
  std::vector<std::uint32_t> next, ring_arrivals, send_arrivals;
  std::vector<kernels::cuda::ChunkReady> ready;
  kernels::cuda::GridState grids[3] = {};
  std::uint32_t faults = 0;
  kernels::cuda::Fault fault{};
  kernels::cuda::CombineArgs args{};
};

}  // namespace

TEST_CASE("published-forwarded-and-reduced-rows-are-bitwise-those-of-the-cpu") {
  constexpr auto kUe8m0 = proto::Fp8Scale::kUe8m0;
  constexpr auto kFp32 = proto::Fp8Scale::kFp32;
  const CombineCase cases[] = {
      {"bf16-h64", 64, DType::kBf16, DType::kBf16},
      {"bf16-plain-sum-unaligned-h37", 37, DType::kBf16, DType::kBf16, false},
      {"bf16-grads-h40", 40, DType::kBf16, DType::kBf16, false, true},
      {"fp32-grads-h100", 100, DType::kFp32, DType::kFp32, true, true},
      {"bf16-y-fp32-wire-h52", 52, DType::kBf16, DType::kFp32},
      {"fp32-y-bf16-wire-h50", 50, DType::kFp32, DType::kBf16},
      {"fp8-wire-h560", 560, DType::kBf16, DType::kFp8},
      {"fp8-wire-short-block-grads-h141", 141, DType::kFp32, DType::kFp8, true, true, 3, kUe8m0},
      {"one-node-bf16-grads-h64", 64, DType::kBf16, DType::kBf16, true, true, 1},
      {"one-node-fp8-h141", 141, DType::kFp32, DType::kFp8, true, false, 1},
      {"one-node-fp32-y-bf16-wire-h40", 40, DType::kFp32, DType::kBf16, false, true, 1},
      {"no-selections", 64, DType::kBf16, DType::kBf16, true, true, 3, kFp32, "none"},
      {"one-node-no-selections", 64, DType::kBf16, DType::kBf16, true, true, 1, kFp32, "none"},
      {"one-expert-takes-all", 64, DType::kBf16, DType::kBf16, true, true, 1, kFp32, "one"},
      {"static-bf16-grads-h64", 64, DType::kBf16, DType::kBf16, true, true, 3, kFp32, "random", 100, 50},
      {"static-fp8-wire-h37", 37, DType::kFp32, DType::kFp8, true, false, 3, kFp32, "random", 60, 30},
      {"static-nothing-lost-here", 64, DType::kBf16, DType::kBf16, false, false, 3, kFp32, "random", 150, 110},
      {"static-one-node-grads-h64", 64, DType::kBf16, DType::kBf16, true, true, 1, kFp32, "random", 120, 40},
      {"static-one-node-no-room-h40", 40, DType::kFp32, DType::kBf16, false, true, 1, kFp32, "random", 0, 1},
  };
  std::uint64_t seed = 1;
  for (const CombineCase& c : cases) {
    CAPTURE(c.id);
    ++seed;
    auto owned = std::make_unique<Combining>(c, seed);
    Combining& combining = *owned;
    combining.run({1, 2, 2}, seed);
    combining.check();
  }
}

TEST_CASE("a-source-without-credit-holds-up-no-other-and-is-named-in-time") {
  auto owned = std::make_unique<Combining>(CombineCase{"credit", 40, DType::kBf16, DType::kBf16}, 4);
  Combining& combining = *owned;
  REQUIRE(combining.plan->rings[2].num_chunks > 1);
  std::uint64_t seq = 3 * combining.one.config.slots;
  combining.publish_seq[2] = seq;
  *combining.one.view.word(1, combining.one.view.layout.published(0, 2)) = seq + 50;
  *combining.one.view.own_word(combining.one.view.layout.send_free(kPhase, 2)) = 0;
  combining.args.watch.timeout_ns = 300'000'000;
  combining.run({1, 1, 1}, 1);
  CHECK(combining.fault.what == What::kCredit);
  CHECK(combining.fault.peer == 4);
  CHECK(combining.fault.chunk == seq);
  // All of the other sources' chunks are on their way.
  for (std::uint32_t node = 0; node < 2; ++node) {
    CHECK(*combining.one.view.own_word(combining.one.view.layout.consumed(node)) ==
          (combining.plan->rings[node].num_chunks == 0
               ? 0
               : combining.publish_seq[node] + combining.plan->rings[node].num_chunks));
  }
}

TEST_CASE("reduce-refuses-a-header-of-another-chunk-plan-or-cut") {
  using proto::ChunkHeader;
  auto refused = [](std::size_t offset, auto value, What what) {
    auto owned = std::make_unique<Combining>(CombineCase{"refuse", 40, DType::kBf16, DType::kBf16}, 4);
    Combining& combining = *owned;
    std::uint64_t seq = combining.receive_seq[2];
    REQUIRE(combining.plan->send[2].facts.num_chunks > 1);
    std::byte* slot = combining.one.view.own_slots() + combining.one.view.layout.ring_slot(kPhase, 2, seq);
    REQUIRE(std::memcmp(slot + offset, &value, sizeof(value)) != 0);
    std::memcpy(slot + offset, &value, sizeof(value));
    combining.run({1, 1, 1}, 1);
    CAPTURE(offset);
    CHECK(combining.fault.what == what);
    CHECK(combining.fault.peer == 4);
    CHECK(combining.fault.chunk == seq);
    if constexpr (sizeof(value) == 8) CHECK(combining.fault.got == value);
  };
  refused(offsetof(ChunkHeader, seq), std::uint64_t{34}, What::kHeader);
  refused(offsetof(ChunkHeader, epoch), std::uint64_t{6}, What::kHeader);
  refused(offsetof(ChunkHeader, magic), 0u, What::kHeader);
  refused(offsetof(ChunkHeader, version), std::uint16_t{2}, What::kHeader);
  refused(offsetof(ChunkHeader, phase), std::uint8_t{0}, What::kHeader);
  refused(offsetof(ChunkHeader, source_rank), 1u, What::kHeader);
  refused(offsetof(ChunkHeader, plan_id), std::uint64_t{4}, What::kPlan);
  refused(offsetof(ChunkHeader, required_capacity), std::uint64_t{7}, What::kPlan);
  refused(offsetof(ChunkHeader, rows), 77u, What::kRows);
  refused(offsetof(ChunkHeader, first_row), 1u, What::kRows);
  refused(offsetof(ChunkHeader, dtype), 1u, What::kDType);
  refused(offsetof(ChunkHeader, flags), proto::kFlagWeightGrads, What::kDType);
  refused(offsetof(ChunkHeader, flags), proto::kFlagLast, What::kDType);
  refused(offsetof(ChunkHeader, num_entries), 1u, What::kRowEntries);
  refused(offsetof(ChunkHeader, total_bytes), 64u, What::kSize);
}
