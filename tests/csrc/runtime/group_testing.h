// Groups of ranks that are threads of this process, for tests of csrc/runtime.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "runtime/group.h"

namespace moe_efa::testing {

struct RankOptions {
  runtime::GroupConfig config;
  std::shared_ptr<kernels::Device> device;  // null: the CPU
};

// Runs `body` on every rank, each in a thread of its own; "" or the first failure. The groups live until all have
// ended.
inline std::string run_ranks(const std::vector<RankOptions>& ranks,
                             const std::function<void(runtime::Group&, std::uint32_t rank)>& body) {
  std::vector<std::unique_ptr<runtime::Group>> groups;
  std::vector<std::string> addresses;
  for (const RankOptions& rank : ranks) {
    groups.push_back(std::make_unique<runtime::Group>(rank.config, rank.device));
    addresses.push_back(groups.back()->address());
  }
  for (auto& group : groups) group->connect(addresses);
  std::mutex mutex;
  std::string failure;
  std::vector<std::thread> threads;
  for (std::uint32_t rank = 0; rank < groups.size(); ++rank) {
    threads.emplace_back([&, rank] {
      try {
        groups[rank]->meet({});
        groups[rank]->start();
        body(*groups[rank], rank);
      } catch (const std::exception& error) {
        std::lock_guard lock(mutex);
        if (failure.empty()) failure = "rank " + std::to_string(rank) + ": " + error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return failure;
}

}  // namespace moe_efa::testing
