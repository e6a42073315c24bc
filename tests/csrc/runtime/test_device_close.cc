// The end of calls whose kernels run after they have returned, as on a GPU: synchronize() and close() come after
// results, errors come before memory is given up, and a stop ends kernels that wait.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "../device/emulated_device.h"
#include "group_testing.h"
#include "runtime/driver.h"

using namespace moe_efa;
using common::StatusCode;
using common::StatusError;
using runtime::Group;
using testing::EmulatedDevice;

namespace {

constexpr std::uint32_t kHidden = 16, kTokens = 6;
constexpr double kLongerThanADrainS = 2.4;

// A round that gives every token back to its rank, and what it needs until it is done.
struct Round {
  explicit Round(std::uint32_t rank)
      : x(kTokens * kHidden), weights(kTokens, 1.0f), out(x.size(), -1.0f), topk_idx(kTokens) {
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(100 * rank + i);
    for (std::size_t i = 0; i < kTokens; ++i) topk_idx[i] = static_cast<std::int64_t>(i % 2);  // to both ranks
  }

  void dispatch(Group& group, EmulatedDevice& device) {
    runtime::DispatchRequest request;
    request.x = x.data();
    request.dtype = proto::DType::kFp32;
    request.num_tokens = kTokens;
    request.topk_idx = topk_idx.data();
    request.topk_weights = weights.data();
    request.send_memory = device.allocate(group.device_send_bytes(kTokens));
    std::uint64_t ticket = group.dispatch_start(request, nullptr);
    runtime::DispatchSizes sizes = group.dispatch_sizes(ticket);
    plan = sizes.plan;
    rows.resize(static_cast<std::size_t>(plan->rows()) * kHidden);
    row_weights.resize(static_cast<std::size_t>(plan->rows()));
    group.dispatch_place(ticket, {rows.data(), row_weights.data(), nullptr, false}, device.allocate(sizes.plan_bytes));
    group.finish(ticket);
  }
  void combine(Group& group) {
    runtime::CombineRequest request;
    request.y = rows.data();
    request.dtype = proto::DType::kFp32;
    request.plan = plan;
    request.weights = row_weights.data();
    request.out = out.data();
    group.finish(group.combine_start(request));
  }
  bool is_back() const { return out == x; }

  std::vector<float> x, weights, rows, row_weights, out;
  std::vector<std::int64_t> topk_idx;
  std::shared_ptr<kernels::Plan> plan;
};

struct World {
  World() {
    static int serial = 0;
    std::string key = "device-close-" + std::to_string(getpid()) + "-" + std::to_string(serial++);
    for (std::uint32_t rank = 0; rank < 2; ++rank) {
      runtime::GroupConfig config;
      config.topology = {2, 2, rank};
      config.num_experts = 2;
      config.hidden_size = kHidden;
      config.top_k = 1;
      config.max_tokens_per_rank = kTokens;
      config.timeout_s = 20;
      config.heartbeat_timeout_s = 20;
      config.job_key = key;
      devices.push_back(std::make_shared<EmulatedDevice>(true));
      ranks.push_back({config, devices.back()});
      rounds.emplace_back(rank);
    }
  }

  std::vector<std::shared_ptr<EmulatedDevice>> devices;
  std::vector<testing::RankOptions> ranks;
  std::vector<Round> rounds;  // until no kernel runs
};

void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(what);
}

}  // namespace

TEST_CASE("synchronize waits for the results of calls that have returned") {
  World world;
  std::string failure = testing::run_ranks(world.ranks, [&](Group& group, std::uint32_t rank) {
    Round& round = world.rounds[rank];
    round.dispatch(group, *world.devices[rank]);
    world.devices[rank]->delay(0.3);
    round.combine(group);
    require(!round.is_back(), "combine() did not return before its kernels");
    group.synchronize();
    require(round.is_back(), "no results after synchronize()");
    group.close(true, 20);
  });
  CHECK_MESSAGE(failure.empty(), failure);
}

TEST_CASE("close waits for the results of calls that have returned, however long they take") {
  World world;
  std::string failure = testing::run_ranks(world.ranks, [&](Group& group, std::uint32_t rank) {
    Round& round = world.rounds[rank];
    round.dispatch(group, *world.devices[rank]);
    if (rank == 0) world.devices[rank]->delay(kLongerThanADrainS);
    round.combine(group);
    group.close(true, 20);
    require(round.is_back(), "no results after close()");
  });
  CHECK_MESSAGE(failure.empty(), failure);
}

TEST_CASE("close says so where they are not there in time") {
  World world;
  std::string failure = testing::run_ranks(world.ranks, [&](Group& group, std::uint32_t rank) {
    Round& round = world.rounds[rank];
    round.dispatch(group, *world.devices[rank]);
    if (rank == 0) world.devices[rank]->delay(3);
    round.combine(group);
    try {
      group.close(true, 0.5);
      require(false, "close() raised nothing");
    } catch (const StatusError& error) {
      require(error.status().code == StatusCode::kPeerTimeout, error.what());
      require(error.status().message.find("combine epoch 0") != std::string::npos, error.what());
    }
  });
  CHECK_MESSAGE(failure.empty(), failure);
}

TEST_CASE("a failed group ends kernels that wait, and the caller's next call raises soon") {
  World world;
  std::string failure = testing::run_ranks(world.ranks, [&](Group& group, std::uint32_t rank) {
    Round& round = world.rounds[rank];
    round.dispatch(group, *world.devices[rank]);
    if (rank == 0) return group.abort("enough");
    round.combine(group);  // waits for rank 0, which does not come
    double begin = runtime::monotonic_s();
    try {
      group.synchronize();
      require(false, "synchronize() raised nothing");
    } catch (const StatusError& error) {
      require(error.status().rank == 0, error.what());
      require(error.status().message.find("enough") != std::string::npos, error.what());
    }
    require(runtime::monotonic_s() - begin < 5, "it took too long");
  });
  CHECK_MESSAGE(failure.empty(), failure);
}
