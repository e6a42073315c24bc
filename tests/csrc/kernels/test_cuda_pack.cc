// The body of the CUDA pack kernel, run on fibers: chunks bitwise as the CPU kernel writes them, each published once
// and only when it is whole, whatever the order of threads and blocks.
#include <doctest/doctest.h>

#include "cuda_testing.h"
#include "kernels/cpu/pack.h"
#include "kernels/cuda/pack_body.h"

using namespace moe_efa;
using namespace moe_efa::testing;
using kernels::cuda::What;

namespace {

struct PackCase {
  std::string id;
  std::uint32_t hidden_size;
  proto::DType x, wire;
  proto::Fp8Scale scale = proto::Fp8Scale::kFp32;
  std::uint32_t tokens = 40;
  const char* routing = "random";
  bool replay = false;
  std::uint32_t chunk_rows = 9;
};

// One source on node 1 of 3; what the kernels write is compared with what the CPU writes into a region alike.
struct Packing {
  Packing(const PackCase& c, std::uint64_t seed)
      : one(c.hidden_size, c.tokens, c.routing, c.scale, seed, 3, c.chunk_rows),
        x(random_rows(c.tokens, c.hidden_size, c.x, seed)) {
    dispatch.x = x.data();
    dispatch.x_dtype = c.x;
    dispatch.wire_dtype = c.wire;
    dispatch.plan = one.plan;
    one.plan->plan_id = 3;
    one.plan->complete = c.replay;
    flat.emplace(*one.plan);
    plan_bytes = flat->bytes();
    args.view = one.view;
    args.plan = flat->place(plan_bytes.data());
    plan_bytes = flat->bytes();
    args.x = x.data();
    args.x_dtype = c.x;
    args.wire_dtype = c.wire;
    args.replay = c.replay;
    args.chunk_begin = 0;
    args.chunk_end = ~0u;
    args.call = &call;
    args.first_seq = first_seq.data();
    arrivals.assign(one.config.num_nodes * args.plan.send_chunks, 0);
    args.arrivals = arrivals.data();
    ready.assign(one.config.num_nodes * one.config.slots, {});
    args.ready = ready.data();
    args.watch = {&grid, &faults, &fault, 20'000'000'000, one.view.topology.rank};
    for (std::uint32_t node = 0; node < 3; ++node) {
      one.free_slots(proto::Phase::kDispatch, node, first_seq[node] + one.plan->send[node].facts.num_chunks);
    }
  }

  void run(std::uint32_t blocks, std::uint64_t seed) {
#if defined(MOE_EFA_TEST_ON_GPU)
    kernels::cuda::launch_pack(args, blocks, nullptr);
    return finish_kernels();
#endif
    run_grid<kernels::cuda::Tickets>(blocks, 64, seed, [&](EmulatedBlock& block, kernels::cuda::Tickets& shared) {
      kernels::cuda::pack_body(block, args, blocks, shared);
    });
  }

  // Compares every slot and every word that tells of it.
  void check() {
    CHECK(fault.set == 0);
    CHECK(grid.ticket == 0);
    CHECK(grid.exited == 0);
    for (std::uint32_t word : arrivals) CHECK(word == 0);
    std::vector<std::byte> expected(one.view.layout.slot_bytes(proto::Phase::kDispatch));
    for (std::uint32_t node = 0; node < 3; ++node) {
      const kernels::RingFacts& facts = one.plan->send[node].facts;
      for (std::uint32_t chunk = 0; chunk < facts.num_chunks; ++chunk) {
        std::uint64_t seq = first_seq[node] + chunk;
        std::fill(expected.begin(), expected.end(), kPoison);
        std::uint32_t bytes =
            kernels::cpu::pack_chunk({&dispatch, node, chunk, seq, call.epoch, expected.data()}, one.view);
        bool own = node == one.view.topology.node();
        const std::byte* slot =
            one.view.own_slots() + (own ? one.view.layout.ring_slot(proto::Phase::kDispatch, node, seq)
                                        : one.view.layout.send_slot(proto::Phase::kDispatch, node, seq));
        CHECK(std::memcmp(slot, expected.data(), expected.size()) == 0);
        if (own) {
          CHECK(*one.view.own_word(one.view.layout.arrived(proto::Phase::kDispatch, node, seq)) == seq + 1);
        } else {
          const kernels::cuda::ChunkReady& word = ready[node * one.config.slots + seq % one.config.slots];
          CHECK(word.seq_plus_1 == seq + 1);
          CHECK(word.rows == facts.rows_in(chunk));
          CHECK(word.bytes == bytes);
        }
      }
    }
  }

  OneRank one;
  std::vector<std::byte> x;
  kernels::DispatchArgs dispatch;
  std::optional<kernels::cuda::FlatPlan> flat;
  AlignedBytes plan_bytes;
  kernels::cuda::CallState call{5, 3};
  std::vector<std::uint64_t> first_seq{7, 9, 1};
  std::vector<std::uint32_t> arrivals;
  std::vector<kernels::cuda::ChunkReady> ready;
  kernels::cuda::GridState grid{};
  std::uint32_t faults = 0;
  kernels::cuda::Fault fault{};
  kernels::cuda::PackArgs args{};
};

}  // namespace

TEST_CASE("chunks-are-bitwise-those-of-the-cpu") {
  using proto::DType;
  const PackCase cases[] = {
      {"bf16-h64", 64, DType::kBf16, DType::kBf16},
      {"bf16-unaligned-rows-h37", 37, DType::kBf16, DType::kBf16},
      {"fp32-h100", 100, DType::kFp32, DType::kFp32},
      {"fp32-to-bf16-h136", 136, DType::kFp32, DType::kBf16},
      {"bf16-to-fp32-h35", 35, DType::kBf16, DType::kFp32},
      {"bf16-to-fp8-h1040", 1040, DType::kBf16, DType::kFp8},
      {"bf16-to-fp8-short-block-h141", 141, DType::kBf16, DType::kFp8},
      {"fp32-to-fp8-ue8m0-h200", 200, DType::kFp32, DType::kFp8, proto::Fp8Scale::kUe8m0},
      {"fp8-replay-h256", 256, DType::kBf16, DType::kFp8, proto::Fp8Scale::kFp32, 40, "random", true},
      {"chunks-of-several-parts", 64, DType::kBf16, DType::kFp8, proto::Fp8Scale::kFp32, 150, "random", false, 40},
      {"no-tokens", 64, DType::kBf16, DType::kFp8, proto::Fp8Scale::kFp32, 0},
      {"no-selections", 64, DType::kBf16, DType::kFp8, proto::Fp8Scale::kFp32, 10, "none"},
      {"one-expert-takes-all", 64, DType::kBf16, DType::kFp8, proto::Fp8Scale::kFp32, 50, "one"},
  };
  std::uint64_t seed = 1;
  for (const PackCase& c : cases) {
    CAPTURE(c.id);
    ++seed;
    auto owned = std::make_unique<Packing>(c, seed);
    Packing& packing = *owned;
    packing.run(3, seed);
    packing.check();
  }
}

TEST_CASE("two-launches-share-the-chunks-and-the-first-stops-where-told") {
  auto owned = std::make_unique<Packing>(PackCase{"split", 96, proto::DType::kBf16, proto::DType::kFp8}, 5);
  Packing& packing = *owned;
  REQUIRE(packing.args.plan.send_chunks > 2);
  packing.args.chunk_end = 1;
  packing.run(2, 1);
  CHECK(packing.ready[(packing.first_seq[0] + 1) % packing.one.config.slots].seq_plus_1 == 0);
  packing.args.chunk_begin = 1;
  packing.args.chunk_end = ~0u;
  packing.run(3, 2);
  packing.check();
}

TEST_CASE("a-credit-that-does-not-come-is-a-fault-that-names-whom-it-waited-for") {
  auto owned = std::make_unique<Packing>(PackCase{"wait", 32, proto::DType::kBf16, proto::DType::kBf16}, 6);
  Packing& packing = *owned;
  packing.first_seq[2] = 11;
  std::uint64_t seq = 12, free = 12 - packing.one.config.slots;  // the slot of chunk 0 is free, that of chunk 1 is not
  REQUIRE(packing.one.plan->send[2].facts.num_chunks > 1);
  *packing.one.view.own_word(packing.one.view.layout.send_free(proto::Phase::kDispatch, 2)) = free;
  packing.args.watch.timeout_ns = 20'000'000;
  packing.run(2, 1);
  CHECK(packing.fault.set == 1);
  CHECK(packing.fault.what == What::kCredit);
  CHECK(packing.fault.peer == packing.one.view.topology.rail_peer(2));
  CHECK(packing.fault.chunk == seq);
  CHECK(packing.fault.expected == free + 1);
  CHECK(packing.fault.got == free);
  try {
    kernels::cuda::raise(packing.fault);
    FAIL("nothing was raised");
  } catch (const common::StatusError& error) {
    CHECK(error.status().code == common::StatusCode::kPeerTimeout);
    CHECK(error.status().rank == static_cast<int>(packing.one.view.topology.rail_peer(2)));
    CHECK(error.status().epoch == 5);
    CHECK(std::string(error.what()).find("no credit in time") != std::string::npos);
  }
}
