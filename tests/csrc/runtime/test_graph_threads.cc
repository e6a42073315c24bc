// Calls in graphs, under a thread sanitizer: ranks are threads, each with an emulated device whose streams are threads
// too. Every replay is a call of the group like any other; after an error, or behind close(), replays fall through.
#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "../device/emulated_device.h"
#include "group_testing.h"
#include "runtime/backoff.h"
#include "runtime/driver.h"

using namespace moe_efa;
using common::StatusCode;
using common::StatusError;
using runtime::Group;
using testing::EmulatedDevice;
using testing::EmulatedStream;

namespace {

constexpr std::uint32_t kHidden = 16, kTokens = 9, kTopK = 2, kExpertsPerRank = 2, kAlignment = 4;
constexpr std::int64_t kCapacity = 96;

void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

// A dispatch whose rows come back unchanged, twice: what it adds up to is known.
struct Round {
  Round(EmulatedDevice& device, std::uint32_t num_ranks)
      : device(device),
        num_experts(num_ranks * kExpertsPerRank),
        x(kTokens * kHidden),
        weights(kTokens * kTopK, 1.0f),
        out(x.size()),
        rows(kCapacity * kHidden),
        row_weights(kCapacity),
        topk_idx(kTokens * kTopK),
        counts(kExpertsPerRank),
        offsets(kExpertsPerRank + 1) {}

  void change(std::uint32_t seed) {
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(seed * 1000 + i);
    for (std::size_t i = 0; i < topk_idx.size(); ++i) {
      topk_idx[i] = static_cast<std::int64_t>((i * i + seed * 7) % num_experts);
    }
    std::fill(out.begin(), out.end(), -1.0f);
    std::fill(rows.begin(), rows.end(), -1.0f);
  }
  runtime::DispatchRequest dispatch_request(Group& group) {
    runtime::DispatchRequest request;
    request.x = x.data();
    request.dtype = proto::DType::kFp32;
    request.num_tokens = kTokens;
    request.topk_idx = topk_idx.data();
    request.topk_weights = weights.data();
    request.expert_alignment = kAlignment;
    request.send_memory = device.allocate(group.device_send_bytes(kTokens));
    return request;
  }
  runtime::CombineRequest combine_request() {
    runtime::CombineRequest request;
    request.y = rows.data();
    request.dtype = proto::DType::kFp32;
    request.plan = plan;
    request.out = out.data();
    return request;
  }
  void capture(Group& group) {
    device.caller_stream().begin_capture();
    runtime::DispatchRequest request = dispatch_request(group);
    request.capacity = kCapacity;
    runtime::RecordedOutput output;
    output.rows = {rows.data(), row_weights.data(), nullptr, false};
    output.plan_memory = device.allocate(group.device_plan_bytes(kCapacity));
    output.tables = {counts.data(), offsets.data()};
    plan = group.record_dispatch(request, output);
    group.record_combine(combine_request());
    graph = device.caller_stream().end_capture();
  }
  void replay() {
    for (auto& work : graph) device.caller_stream().queue(work);
  }
  // The same, and no replay; of exact sizes.
  void call(Group& group) {
    std::shared_ptr<kernels::Plan> exact;
    std::vector<float> got, got_weights;
    group.set_allocate([&](std::uint64_t, const runtime::DispatchSizes& sizes) {
      device.check_beside_captures();
      exact = sizes.plan;
      got.resize(static_cast<std::size_t>(exact->rows()) * kHidden + 1);
      got_weights.resize(static_cast<std::size_t>(exact->rows()) + 1);
      return runtime::DispatchMemory{{got.data(), got_weights.data(), nullptr, false},
                                     device.allocate(std::max<std::size_t>(sizes.plan_bytes, 1))};
    });
    group.catch_up(nullptr);
    group.finish(group.dispatch_start(dispatch_request(group), nullptr));
    runtime::CombineRequest request = combine_request();
    request.plan = exact;
    request.y = got.data();
    group.finish(group.combine_start(request));
    group.synchronize();
    require_back("a call");
  }
  void require_back(const std::string& what) const {
    for (std::size_t i = 0; i < x.size(); ++i) require(out[i] == 2 * x[i], what + " gave something else back");
  }

  EmulatedDevice& device;
  std::uint32_t num_experts;
  std::vector<float> x, weights, out, rows, row_weights;
  std::vector<std::int64_t> topk_idx, counts;
  std::vector<std::int32_t> offsets;
  std::shared_ptr<kernels::Plan> plan;
  EmulatedStream::Graph graph;
};

struct World {
  World(std::uint32_t num_ranks, std::uint32_t node_size, double timeout_s = 60) {
    static int serial = 0;
    std::string key = "graph-threads-" + std::to_string(getpid()) + "-" + std::to_string(serial++);
    for (std::uint32_t rank = 0; rank < num_ranks; ++rank) {
      runtime::GroupConfig config;
      config.topology = {num_ranks, node_size, rank};
      config.num_experts = num_ranks * kExpertsPerRank;
      config.hidden_size = kHidden;
      config.top_k = kTopK;
      config.max_tokens_per_rank = kTokens;
      config.transport = "shm";
      config.timeout_s = timeout_s;
      config.heartbeat_timeout_s = 60;
      config.chunk_rows = 2;
      config.slots = 2;  // most chunks wait for a credit
      config.job_key = key;
      config.ranks_on_host = num_ranks;
      devices.push_back(std::make_shared<EmulatedDevice>(true));
      ranks.push_back({config, devices.back()});
      rounds.push_back(std::make_unique<Round>(*devices.back(), num_ranks));
    }
  }

  std::vector<std::shared_ptr<EmulatedDevice>> devices;
  std::vector<testing::RankOptions> ranks;
  std::vector<std::unique_ptr<Round>> rounds;  // until no kernel runs
};

std::string replay_often(std::uint32_t num_ranks, std::uint32_t node_size) {
  World world(num_ranks, node_size);
  return testing::run_ranks(world.ranks, [&](Group& group, std::uint32_t rank) {
    Round& round = *world.rounds[rank];
    round.capture(group);
    for (std::uint32_t seed = 0; seed < 5; ++seed) {
      round.change(seed * num_ranks + rank);
      round.replay();
      if (seed % 3 == 1) round.call(group);  // comes behind the replay, and before the next one
      group.synchronize();
      round.require_back("replay " + std::to_string(seed));
      std::int64_t total = 0;
      for (std::uint32_t i = 0; i < kExpertsPerRank; ++i) {
        require(round.offsets[i] % kAlignment == 0, "an offset is not aligned");
        require(round.offsets[i + 1] >= round.offsets[i] + round.counts[i], "counts and offsets do not agree");
        total += round.counts[i];
      }
      require(total > 0, "no counts");
    }
    // Several at once: a graph runs to its end before the next one begins.
    for (int i = 0; i < 3; ++i) round.replay();
    group.synchronize();
    round.require_back("the last replay");
    require(group.stats().phases[1].calls == 5 + 2 + 3, "replays are not counted");
    group.close(true, 30);
  });
}

}  // namespace

TEST_CASE("replays of ranks of one node") { CHECK(replay_often(3, 3) == ""); }

TEST_CASE("replays between nodes") { CHECK(replay_often(4, 2) == ""); }

TEST_CASE("a handle is of no use before its graph has been replayed, and after it it is") {
  World world(2, 1);
  std::string failure = testing::run_ranks(world.ranks, [&](Group& group, std::uint32_t rank) {
    Round& round = *world.rounds[rank];
    round.capture(group);
    round.change(rank);
    group.catch_up(nullptr);
    try {
      group.combine_start(round.combine_request());
      require(false, "a combine without rows began");
    } catch (const StatusError& error) {
      require(error.status().code == StatusCode::kInvalid, error.what());
    }
    round.replay();
    group.synchronize();
    std::fill(round.out.begin(), round.out.end(), -1.0f);
    group.finish(group.combine_start(round.combine_request()));
    group.synchronize();
    round.require_back("the combine");
    group.close(true, 30);
  });
  CHECK(failure == "");
}

TEST_CASE("close waits for replays that synchronize was told of, and later ones fall through") {
  World world(2, 1);
  std::string failure = testing::run_ranks(world.ranks, [&](Group& group, std::uint32_t rank) {
    Round& round = *world.rounds[rank];
    round.capture(group);
    round.change(rank);
    world.devices[rank]->delay(0.2);
    round.replay();
    group.synchronize();
    group.close(true, 30);
    round.require_back("the replay before close()");
    round.replay();
    round.device.caller_stream().drain();
  });
  CHECK(failure == "");
}

TEST_CASE("a rank that does not replay is named, and all gates open") {
  World world(2, 1, 1.5);
  std::string failure = testing::run_ranks(world.ranks, [&](Group& group, std::uint32_t rank) {
    Round& round = *world.rounds[rank];
    round.capture(group);
    round.change(rank);
    if (rank == 0) round.replay();
    double begin = runtime::monotonic_s();
    try {
      while (runtime::monotonic_s() - begin < 20) group.synchronize();
      require(false, "no error");
    } catch (const StatusError& error) {
      require(error.status().code == StatusCode::kPeerTimeout, error.what());
      require(error.status().rank == 1, error.what());
      require(error.status().message.find("dispatch epoch 0") != std::string::npos, error.what());
    }
    round.device.caller_stream().drain();
  });
  CHECK(failure == "");
}

TEST_CASE("an error ends replays that wait, on all ranks") {
  World world(4, 2);
  std::string failure = testing::run_ranks(world.ranks, [&](Group& group, std::uint32_t rank) {
    Round& round = *world.rounds[rank];
    round.capture(group);
    round.change(rank);
    if (rank == 3) {
      runtime::sleep_us(300'000);
      return group.abort("enough");
    }
    round.replay();
    try {
      group.synchronize();
      require(false, "no error");
    } catch (const StatusError& error) {
      require(error.status().message.find("enough") != std::string::npos, error.what());
    }
    round.device.caller_stream().drain();
  });
  CHECK(failure == "");
}
