// Rounds of whole groups whose ranks are threads with an emulated device each, or without one, for comparison.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "../device/emulated_device.h"
#include "group_testing.h"
#include "runtime/group.h"
#include "transport/libfabric_loader.h"

namespace moe_efa::testing {

using runtime::Group;
using runtime::GroupConfig;

inline constexpr std::uint32_t kHidden = 24, kTopK = 3, kExpertsPerRank = 2, kMostTokens = 20, kRounds = 4;

inline std::string unique_key() {
  static int serial = 0;
  return "device-rounds-" + std::to_string(getpid()) + "-" + std::to_string(serial++);
}

inline transport::LibfabricSearch search() {
  const char* library = std::getenv("MOE_EFA_LIBFABRIC");
  return {library != nullptr ? library : "", {}};
}

inline GroupConfig config_of(std::uint32_t rank, std::uint32_t num_ranks, std::uint32_t node_size,
                             const std::string& transport, const std::string& buffers, const std::string& job_key) {
  GroupConfig config;
  config.topology = {num_ranks, node_size, rank};
  config.num_experts = num_ranks * kExpertsPerRank;
  config.hidden_size = kHidden;
  config.top_k = kTopK;
  config.max_tokens_per_rank = kMostTokens;
  config.transport = transport;
  if (transport == "libfabric") config.provider = "tcp";
  config.libfabric = search().library;
  config.timeout_s = 60;
  config.job_key = job_key;
  config.ranks_on_host = num_ranks;
  config.chunk_rows = 4;
  config.slots = 3;  // most chunks wait for a credit
  config.buffers = buffers;
  config.gdrcopy = runtime::kNoGdrcopy;
  return config;
}

// What a rank got, all rounds.
struct Results {
  std::vector<float> rows, weights, out;
  bool operator==(const Results&) const = default;
};

inline Results run_rounds(Group& group, EmulatedDevice* device, std::uint32_t rank, std::uint32_t num_ranks) {
  Results results;
  std::uint32_t state = rank * 104729 + 1;
  auto random = [&state] { return (state = state * 1664525u + 1013904223u) >> 8; };
  for (std::uint32_t round = 0; round < kRounds; ++round) {
    std::uint32_t tokens = round == 2 && rank == 1 ? 0 : kMostTokens - random() % 7;
    std::vector<float> x(tokens * kHidden + 1), weights(tokens * kTopK + 1);
    std::vector<std::int64_t> topk(tokens * kTopK + 1);
    for (float& value : x) value = static_cast<float>(random() % 1000) / 7 - 70.0f;
    for (float& value : weights) value = static_cast<float>(random() % 100) / 64.0f;
    for (std::int64_t& expert : topk) {
      expert = static_cast<std::int64_t>(random() % (num_ranks * kExpertsPerRank + 1)) - 1;
      if (round == 1) expert = 2;  // one takes all
      if (round == 3 && rank == 0) expert = -1;
    }
    runtime::DispatchRequest request;
    request.x = x.data();
    request.dtype = proto::DType::kFp32;
    request.num_tokens = tokens;
    request.topk_idx = topk.data();
    request.topk_weights = weights.data();
    std::vector<float> got, row_weights, out(tokens * kHidden + 1, -1.0f);
    auto make_room = [&](const kernels::Plan& plan) {
      got.assign(static_cast<std::size_t>(plan.rows()) * kHidden + 1, 0.0f);
      row_weights.assign(static_cast<std::size_t>(plan.rows()) + 1, 0.0f);
      return kernels::DispatchOutput{got.data(), row_weights.data(), nullptr, false};
    };
    runtime::CombineRequest combine;
    combine.dtype = proto::DType::kFp32;
    combine.out = out.data();
    if (device == nullptr) {
      combine.plan = group.dispatch_begin(request);
      group.dispatch_finish(make_room(*combine.plan));
      combine.y = got.data();
      combine.weights = row_weights.data();
      group.combine(combine);
    } else {
      void* send = request.send_memory = device->allocate(group.device_send_bytes(tokens));
      void* plan = nullptr;
      group.set_allocate([&](std::uint64_t, const runtime::DispatchSizes& sizes) {
        device->check_beside_captures();
        combine.plan = sizes.plan;
        plan = device->allocate(std::max<std::size_t>(sizes.plan_bytes, 1));
        return runtime::DispatchMemory{make_room(*sizes.plan), plan};
      });
      group.finish(group.dispatch_start(request, nullptr));
      combine.y = got.data();
      combine.weights = row_weights.data();
      group.finish(group.combine_start(combine));
      group.synchronize();
      device->free(send);
      device->free(plan);
    }
    results.rows.insert(results.rows.end(), got.begin(), got.end());
    results.weights.insert(results.weights.end(), row_weights.begin(), row_weights.end());
    results.out.insert(results.out.end(), out.begin(), out.end());
  }
  return results;
}

struct Run {
  std::vector<Results> results;  // by rank
  std::vector<std::shared_ptr<EmulatedDevice>> devices;
  std::vector<std::string> flags;  // GroupInfo's
  std::string failure;
};

// `buffers` "": on the CPU. `gdrcopy`: of each rank, or none.
inline Run run_group(std::uint32_t num_ranks, std::uint32_t node_size, const std::string& transport,
                     const std::string& buffers, bool reorder, const std::vector<std::string>& gdrcopy = {}) {
  Run run;
  run.results.resize(num_ranks);
  run.flags.resize(num_ranks);
  std::vector<RankOptions> ranks;
  std::string key = unique_key();
  for (std::uint32_t rank = 0; rank < num_ranks; ++rank) {
    GroupConfig config = config_of(rank, num_ranks, node_size, transport, buffers.empty() ? "host" : buffers, key);
    if (!gdrcopy.empty()) config.gdrcopy = gdrcopy[rank];
    config.reorder = reorder;
    config.reorder_seed = 11;
    run.devices.push_back(buffers.empty() ? nullptr : std::make_shared<EmulatedDevice>(true));
    ranks.push_back({config, run.devices.back()});
  }
  run.failure = run_ranks(ranks, [&](Group& group, std::uint32_t rank) {
    run.flags[rank] = group.info().flags;
    run.results[rank] = run_rounds(group, run.devices[rank].get(), rank, num_ranks);
    group.close(true, 30);
  });
  return run;
}

}  // namespace moe_efa::testing
