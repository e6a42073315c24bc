// Calls whose kernels run after they have returned, as on a GPU: they need no later call of their caller, synchronize()
// and close() come after results, errors come before memory is given up, and a stop ends kernels that wait.
#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <functional>
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

  std::uint64_t start_dispatch(Group& group, EmulatedDevice& device, const std::function<void()>& before_memory = {}) {
    group.set_allocate([this, &device, before_memory](std::uint64_t, const runtime::DispatchSizes& sizes) {
      device.check_beside_captures();
      if (before_memory) before_memory();
      plan = sizes.plan;
      rows.resize(static_cast<std::size_t>(plan->rows()) * kHidden);
      row_weights.resize(static_cast<std::size_t>(plan->rows()));
      return runtime::DispatchMemory{{rows.data(), row_weights.data(), nullptr, false},
                                     device.allocate(sizes.plan_bytes)};
    });
    runtime::DispatchRequest request;
    request.x = x.data();
    request.dtype = proto::DType::kFp32;
    request.num_tokens = kTokens;
    request.topk_idx = topk_idx.data();
    request.topk_weights = weights.data();
    request.send_memory = device.allocate(group.device_send_bytes(kTokens));
    return group.dispatch_start(request, nullptr);
  }
  void dispatch(Group& group, EmulatedDevice& device) { group.finish(start_dispatch(group, device)); }
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
  explicit World(std::uint32_t slots = 0) {
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
      config.slots = slots;
      config.chunk_rows = slots == 0 ? 0 : 1;
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

bool comes_true(const std::atomic<bool>& flag) {
  double begin = runtime::monotonic_s();
  while (!flag && runtime::monotonic_s() - begin < 10) runtime::sleep_us(1000);
  return flag;
}

}  // namespace

TEST_CASE("a started dispatch needs no later call of its caller") {
  World world(2);  // fewer slots than rows
  std::atomic<bool> served{false};
  std::string failure = testing::run_ranks(world.ranks, [&](Group& group, std::uint32_t rank) {
    Round& round = world.rounds[rank];
    if (rank == 0) {
      std::uint64_t ticket = round.start_dispatch(group, *world.devices[rank]);
      require(comes_true(served), "it held up the other rank");
      group.finish(ticket);
    } else {
      round.dispatch(group, *world.devices[rank]);
      group.synchronize();
      served = true;
    }
    round.combine(group);
    group.synchronize();
    require(round.is_back(), "wrong results");
    group.close(true, 20);
  });
  CHECK_MESSAGE(failure.empty(), failure);
}

TEST_CASE("no memory for a dispatch is an error on all ranks, whoever asked for it") {
  for (bool caller_waits : {false, true}) {
    CAPTURE(caller_waits);
    World world(2);
    std::atomic<bool> heard{false};
    std::string failure = testing::run_ranks(world.ranks, [&](Group& group, std::uint32_t rank) {
      Round& round = world.rounds[rank];
      std::uint64_t ticket = round.start_dispatch(group, *world.devices[rank], [&] {
        if (rank == 0) throw runtime::NoMemory("all is full");
      });
      if (rank == 0 && !caller_waits) require(comes_true(heard), "the other rank heard nothing");
      try {
        group.finish(ticket);
        group.synchronize();
        require(false, "it succeeded");
      } catch (const StatusError& error) {
        const common::Status& status = error.status();
        require(status.rank == 0 && status.phase == 0 && status.epoch == 0, error.what());
        require(status.message.find("all is full") != std::string::npos, error.what());
      }
      if (rank == 1) heard = true;
      group.close(false, 1);
    });
    CHECK_MESSAGE(failure.empty(), failure);
  }
}

TEST_CASE("memory may take its time: nobody else waits for a lock meanwhile") {
  World world;
  std::atomic<bool> asked{false}, looked{false};
  std::string failure = testing::run_ranks(world.ranks, [&](Group& group, std::uint32_t rank) {
    Round& round = world.rounds[rank];
    std::uint64_t ticket = round.start_dispatch(group, *world.devices[rank], [&] {
      if (rank != 0) return;
      asked = true;
      comes_true(looked);
    });
    if (rank == 0) {
      require(comes_true(asked), "nobody asked for memory");
      require(!group.ended(ticket) && !group.forget(ticket), "it ended without memory");
      looked = true;
    }
    group.finish(ticket);
    round.combine(group);
    group.close(true, 20);
    require(round.is_back(), "wrong results");
  });
  CHECK_MESSAGE(failure.empty(), failure);
}

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

TEST_CASE("results that an error cut short are no results") {
  World world;
  std::atomic<bool> heard{false};
  std::string failure = testing::run_ranks(world.ranks, [&](Group& group, std::uint32_t rank) {
    Round& round = world.rounds[rank];
    round.dispatch(group, *world.devices[rank]);
    if (rank == 0) world.devices[rank]->delay(2);  // it enters the combine, and its kernels do not
    round.combine(group);
    if (rank == 0) {
      require(comes_true(heard), "the other rank heard nothing");
      return group.close(false, 1);
    }
    bool aborted = false;
    group.set_interrupt_check([&] {  // where synchronize() waits; the next thing that it sees is kernels that have left
      if (aborted) return;
      aborted = true;
      group.abort("enough");
      runtime::sleep_us(300'000);
    });
    bool failed = false;
    try {
      group.synchronize();
    } catch (const StatusError& error) {
      failed = error.status().message.find("enough") != std::string::npos;
    }
    heard = true;
    require(aborted && failed, "synchronize() raised nothing");
    group.close(false, 1);
  });
  CHECK_MESSAGE(failure.empty(), failure);
}

TEST_CASE("a failed group ends kernels that wait, and the caller's next call raises soon") {
  World world;
  std::atomic<bool> waits{false};
  std::string failure = testing::run_ranks(world.ranks, [&](Group& group, std::uint32_t rank) {
    Round& round = world.rounds[rank];
    round.dispatch(group, *world.devices[rank]);
    if (rank == 0) {
      require(comes_true(waits), "the other rank did not come to its combine");
      return group.abort("enough");
    }
    round.combine(group);  // its kernels wait for rank 0, which does not come
    waits = true;
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
