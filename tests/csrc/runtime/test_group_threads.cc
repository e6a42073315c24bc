// Whole groups as threads of one process, built with a thread sanitizer: what the caller, the background thread, the
// driver and the failure detector of a rank share. (Ranks meet in segments that each of them maps for itself, where no
// race shows; that part is test_driver_threads.cc.) Results are compared bit by bit with those of calls in one.
#include <doctest/doctest.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "group_testing.h"
#include "runtime/backoff.h"
#include "runtime/group.h"

using namespace moe_efa;
using runtime::CombineRequest;
using runtime::DispatchBuffers;
using runtime::DispatchRequest;
using runtime::Group;
using runtime::GroupConfig;

namespace {

constexpr std::uint32_t kHidden = 24, kTopK = 2, kExpertsPerRank = 2, kMostTokens = 20;

using Body = std::function<void(Group&, std::uint32_t rank)>;

// Runs `body` on every rank, each in a thread of its own; "" or the first failure.
std::string run_ranks(std::uint32_t num_ranks, std::uint32_t node_size, bool reorder, const Body& body) {
  static int serial = 0;
  std::string job_key = "group-threads-" + std::to_string(getpid()) + "-" + std::to_string(serial++);
  std::vector<testing::RankOptions> ranks;
  for (std::uint32_t rank = 0; rank < num_ranks; ++rank) {
    GroupConfig config;
    config.topology = {num_ranks, node_size, rank};
    config.num_experts = num_ranks * kExpertsPerRank;
    config.hidden_size = kHidden;
    config.top_k = kTopK;
    config.max_tokens_per_rank = kMostTokens;
    config.transport = node_size == num_ranks ? "none" : "shm";
    config.timeout_s = 60;
    config.job_key = job_key;
    config.ranks_on_host = num_ranks;
    config.chunk_rows = 2;
    config.slots = 2;  // most chunks wait for a credit
    config.reorder = reorder;
    config.reorder_seed = 7;
    ranks.push_back({config, nullptr});
  }
  return testing::run_ranks(ranks, body);
}

void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(what);
}

// The tokens of one dispatch.
struct Tokens {
  std::vector<float> x, weights;
  std::vector<std::int64_t> topk_idx;

  Tokens(std::uint32_t rank, std::uint32_t num_ranks, std::uint32_t seed) {
    std::uint32_t state = seed * 7919 + rank * 104729 + 1;
    auto random = [&state] { return (state = state * 1664525u + 1013904223u) >> 8; };
    std::uint32_t tokens = seed % 5 == 4 ? 0 : kMostTokens - random() % 7;
    for (std::uint32_t i = 0; i < tokens * kHidden; ++i) x.push_back(static_cast<float>(random() % 1000) - 500.0f);
    for (std::uint32_t i = 0; i < tokens * kTopK; ++i) {
      topk_idx.push_back(static_cast<std::int64_t>(random() % (num_ranks * kExpertsPerRank + 1)) - 1);
      weights.push_back(static_cast<float>(random() % 100) / 64.0f);
    }
  }

  std::uint32_t count() const { return static_cast<std::uint32_t>(topk_idx.size() / kTopK); }
  DispatchRequest request() const {
    static const float kNone = 0;
    static const std::int64_t kNoIdx = 0;
    DispatchRequest request;
    request.x = x.empty() ? &kNone : x.data();
    request.dtype = proto::DType::kFp32;
    request.num_tokens = count();
    request.topk_idx = topk_idx.empty() ? &kNoIdx : topk_idx.data();
    request.topk_weights = weights.empty() ? &kNone : weights.data();
    return request;
  }
};

struct Round {
  std::shared_ptr<kernels::Plan> plan;
  std::vector<float> rows, weights, out;
};

CombineRequest combine_request(const Round& round, std::vector<float>& out, std::uint32_t tokens) {
  static const float kNone = 0;
  out.assign(std::size_t{tokens} * kHidden + 1, -1.0f);
  CombineRequest request;
  request.y = round.rows.empty() ? &kNone : round.rows.data();
  request.dtype = proto::DType::kFp32;
  request.plan = round.plan;
  request.out = out.data();
  request.weights = round.weights.empty() ? &kNone : round.weights.data();
  return request;
}

Round in_one(Group& group, const Tokens& tokens) {
  Round round;
  round.plan = group.dispatch_begin(tokens.request());
  auto rows = static_cast<std::size_t>(round.plan->rows());
  round.rows.assign(rows * kHidden + 1, 0.0f);  // never without memory
  round.weights.assign(rows + 1, 0.0f);
  group.dispatch_finish({round.rows.data(), round.weights.data(), nullptr, false});
  group.combine(combine_request(round, round.out, tokens.count()));
  return round;
}

void check_rows(const DispatchBuffers& found, const Round& expected) {
  auto rows = static_cast<std::size_t>(expected.plan->rows());
  require(static_cast<std::size_t>(found.plan->rows()) == rows, "the number of rows differs");
  require(std::memcmp(found.x->data(), expected.rows.data(), rows * kHidden * 4) == 0, "rows differ");
  require(std::memcmp(found.weights->data(), expected.weights.data(), rows * 4) == 0, "weights differ");
}

// Python's lock lets any thread call, one after the other.
template <typename Call>
void in_another_thread(const Call& call) {
  std::exception_ptr error;
  std::thread([&] {
    try {
      call();
    } catch (...) {
      error = std::current_exception();
    }
  }).join();
  if (error) std::rethrow_exception(error);
}

void use_halves(Group& group, std::uint32_t rank, std::uint32_t num_ranks) {
  auto pool = std::make_shared<runtime::HostPool>(1 << 20);
  for (std::uint32_t turn = 0; turn < 12; ++turn) {
    std::vector<Tokens> tokens;
    std::vector<Round> expected;
    for (std::uint32_t i = 0; i < 3; ++i) {
      tokens.emplace_back(rank, num_ranks, 3 * turn + i);
      expected.push_back(in_one(group, tokens[i]));
    }
    std::uint64_t first = group.dispatch_start(tokens[0].request(), pool);
    std::uint64_t second = group.dispatch_start(tokens[1].request(), pool);
    runtime::sleep_us(rank == 0 ? 3000 : 200);  // the background's turn
    in_another_thread([&] { check_rows(group.finish(second), expected[1]); });
    std::vector<float> outs[3];
    std::uint64_t third = group.combine_start(combine_request(expected[0], outs[0], tokens[0].count()));
    std::uint64_t fourth = group.dispatch_start(tokens[2].request(), pool);  // both phases under way
    in_one(group, tokens[1]);                                                // behind what was started
    group.stats();
    require(group.ended(third), "a combine in one ended before one that was started earlier");
    check_rows(group.finish(first), expected[0]);
    std::uint64_t dropped = group.combine_start(combine_request(expected[1], outs[1], tokens[1].count()));
    in_another_thread([&] {
      while (!group.ended(fourth)) runtime::sleep_us(100);
      check_rows(group.finish(fourth), expected[2]);
    });
    group.finish(third);
    require(outs[0] == expected[0].out, "sums differ");
    while (!group.forget(dropped)) runtime::sleep_us(100);
    require(outs[1] == expected[1].out, "sums that nobody fetched differ");
  }
  // Closing lets what was started run out, here by the background alone.
  Tokens last(rank, num_ranks, 1);
  group.dispatch_start(last.request(), pool);
  group.dispatch_start(last.request(), pool);
  group.close(true, 30);
}

}  // namespace

TEST_CASE("callers, background and driver share calls without a race") {
  for (bool reorder : {false, true}) {
    CAPTURE(reorder);
    std::string failure =
        run_ranks(2, 1, reorder, [](Group& group, std::uint32_t rank) { use_halves(group, rank, 2); });
    CHECK_MESSAGE(failure.empty(), failure);
  }
}

TEST_CASE("also in nodes of two ranks, and within one node") {
  for (std::uint32_t node_size : {2u, 4u}) {
    CAPTURE(node_size);
    std::string failure =
        run_ranks(4, node_size, false, [](Group& group, std::uint32_t rank) { use_halves(group, rank, 4); });
    CHECK_MESSAGE(failure.empty(), failure);
  }
}

TEST_CASE("a failure finds calls in the background, and ends them") {
  std::atomic<bool> started{false};
  std::string failure = run_ranks(2, 1, false, [&](Group& group, std::uint32_t rank) {
    auto pool = std::make_shared<runtime::HostPool>(1 << 20);
    Tokens tokens(rank, 2, 1);
    in_one(group, tokens);
    std::uint64_t first = group.dispatch_start(tokens.request(), pool);
    if (rank == 1) {
      while (!started) runtime::sleep_us(100);
      group.abort("of its own accord");
    } else {
      std::uint64_t never = group.dispatch_start(tokens.request(), pool);  // rank 1 does not enter this one
      started = true;
      bool failed = false;
      try {
        group.finish(first);
        group.finish(never);
      } catch (const common::StatusError& error) {
        failed = error.status().message.find("of its own accord") != std::string::npos;
      }
      require(failed, "the failure did not arrive");
      require(group.ended(never) && group.forget(never), "a failed group keeps the caller's memory");
    }
    group.close(true, 30);
  });
  CHECK_MESSAGE(failure.empty(), failure);
}
