// FutexDoorbell: a ring wakes a sleeper, one that came before it fell asleep too, and no other rank.
#include "runtime/futex_doorbell.h"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

using namespace moe_efa;

namespace {

constexpr long kForeverUs = 20'000'000;

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Node {
  proto::LayoutConfig config;
  proto::RegionLayout layout;
  std::vector<std::vector<std::byte>> memory;
  std::vector<std::byte*> regions;

  Node() {
    config.node_size = 2;
    layout = proto::RegionLayout(config, 0);
    for (std::uint32_t local = 0; local < 2; ++local) {
      memory.emplace_back(layout.total_bytes() + 64, std::byte{0});
      auto address = reinterpret_cast<std::uintptr_t>(memory.back().data());
      regions.push_back(memory.back().data() + (64 - address % 64) % 64);
    }
  }
  proto::NodeView view(std::uint32_t rank) { return {{2, 2, rank}, layout, regions.data()}; }
};

}  // namespace

TEST_CASE("a ring wakes a sleeper") {
  Node node;
  proto::NodeView mine = node.view(0), theirs = node.view(1);
  runtime::FutexDoorbell sleeper(mine), ringer(theirs);
  std::atomic<bool> awake{false};
  double begin = now_s();
  std::thread thread([&] {
    sleeper.sleep(sleeper.rings(), kForeverUs);
    awake.store(true);
  });
  while (!awake.load()) {  // at the latest the ring after it fell asleep
    ringer.ring(0);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  thread.join();
  CHECK(now_s() - begin < 10);
}

TEST_CASE("a ring between the look and the sleep is not missed") {
  Node node;
  proto::NodeView mine = node.view(0), theirs = node.view(1);
  runtime::FutexDoorbell sleeper(mine), ringer(theirs);
  std::uint32_t seen = sleeper.rings();
  ringer.ring_all();
  double begin = now_s();
  sleeper.sleep(seen, kForeverUs);
  CHECK(now_s() - begin < 10);
}

TEST_CASE("two that ring each other in turn never stand still") {
  Node node;
  proto::NodeView views[] = {node.view(0), node.view(1)};
  std::atomic<std::uint32_t> turn{0};
  constexpr std::uint32_t kTurns = 20'000;
  double begin = now_s();
  auto play = [&](std::uint32_t rank) {
    runtime::FutexDoorbell bell(views[rank]);
    for (;;) {
      std::uint32_t seen = bell.rings();
      std::uint32_t now = turn.load();
      if (now >= kTurns) return;
      if (now % 2 != rank) {
        bell.sleep(seen, kForeverUs);
        continue;
      }
      turn.store(now + 1);
      bell.ring(1 - rank);
    }
  };
  std::thread other([&] { play(1); });
  play(0);
  other.join();
  CHECK(turn.load() == kTurns);
  CHECK(now_s() - begin < 19);  // one missed ring costs twenty seconds
}

TEST_CASE("a sleep ends by itself, and a ring for another rank does not end it") {
  Node node;
  proto::NodeView mine = node.view(0), theirs = node.view(1);
  runtime::FutexDoorbell sleeper(mine), ringer(theirs);
  std::uint32_t seen = sleeper.rings();
  ringer.ring(1);
  double begin = now_s();
  sleeper.sleep(seen, 50'000);
  CHECK(now_s() - begin >= 0.045);
}
