// ShmRail between objects, threads and processes.
#include <doctest/doctest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "common/status.h"
#include "transport/shm_rail.h"

using namespace moe_efa::transport;
using moe_efa::common::StatusCode;
using moe_efa::common::StatusError;

namespace {

constexpr std::uint64_t kRegionBytes = 1 << 20;
constexpr auto kPatience = std::chrono::seconds(60);

// Regions and rails of nodes 0..n-1, all in this process.
struct World {
  std::vector<Segment> regions;
  std::vector<std::unique_ptr<ShmRail>> rails;

  explicit World(std::uint32_t num_nodes, std::uint32_t inbox_entries = 64, bool joined = true) {
    std::string key = "rail" + std::to_string(::getpid());
    for (std::uint32_t node = 0; node < num_nodes; ++node) {
      regions.push_back(Segment::create(segment_name(key, static_cast<int>(node)), kRegionBytes));
      ShmRailConfig config;
      config.memory = {regions.back().data(), nullptr, 0, kRegionBytes};
      config.region_name = regions.back().name();
      config.inbox_name = segment_name(key, static_cast<int>(node), "inbox");
      config.own_node = node;
      config.num_nodes = num_nodes;
      config.inbox_entries = inbox_entries;
      rails.push_back(std::make_unique<ShmRail>(config));
    }
    for (std::uint32_t node = 0; joined && node < num_nodes; ++node) join(node);
  }
  void join(std::uint32_t node) {
    for (std::uint32_t peer = 0; peer < rails.size(); ++peer) {
      if (peer != node) rails[node]->add_peer(peer, rails[peer]->local_address());
    }
  }
};

StatusCode code_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const StatusError& error) {
    return error.status().code;
  }
  return StatusCode::kOk;
}

}  // namespace

TEST_CASE("bytes and immediate arrive, and completion is reported by a later poll") {
  World world(2);
  std::memcpy(world.regions[0].data() + 100, "payload", 8);
  CHECK(world.rails[0]->post_write({1, 8, 100, 5000, 0xdeadbeef, 42}) == PostResult::kPosted);
  CHECK(world.rails[0]->post_write({1, 0, 0, 0, 7, 43}) == PostResult::kPosted);  // immediate only
  RailEvent events[8];
  REQUIRE(world.rails[1]->poll(events) == 2);
  CHECK(events[0].kind == RailEvent::Kind::kRemoteImm);
  CHECK(events[0].imm == 0xdeadbeef);
  CHECK(events[0].bytes == 8);
  CHECK(std::strcmp(reinterpret_cast<char*>(world.regions[1].data() + 5000), "payload") == 0);
  CHECK(events[1].imm == 7);
  CHECK(events[1].bytes == 0);
  CHECK(world.rails[1]->poll(events) == 0);
  REQUIRE(world.rails[0]->poll(std::span(events, 1)) == 1);  // no more than there is room for
  CHECK(events[0].kind == RailEvent::Kind::kWriteDone);
  CHECK(events[0].id == 42);
  REQUIRE(world.rails[0]->poll(events) == 1);
  CHECK(events[0].id == 43);
  CHECK(world.rails[0]->poll(std::span<RailEvent>{}) == 0);
}

TEST_CASE("a write without an immediate is told to nobody but its writer, and needs no room in the inbox") {
  World world(2, 2);
  std::memcpy(world.regions[0].data() + 100, "piece", 6);
  WriteRequest piece = {1, 6, 100, 5000, 99, 42};
  piece.with_imm = false;
  for (int i = 0; i < 3; ++i) CHECK(world.rails[0]->post_write(piece) == PostResult::kPosted);
  RailEvent events[8];
  CHECK(world.rails[1]->poll(events) == 0);
  CHECK(std::memcmp(world.regions[1].data() + 5000, "piece", 6) == 0);
  REQUIRE(world.rails[0]->poll(events) == 3);
  for (int i = 0; i < 3; ++i) CHECK(events[i].id == 42);
  for (int i = 0; i < 2; ++i) CHECK(world.rails[0]->post_write({1, 0, 0, 0, 7, 43}) == PostResult::kPosted);
  CHECK(world.rails[0]->post_write({1, 0, 0, 0, 7, 43}) == PostResult::kAgain);
  CHECK(world.rails[0]->post_write(piece) == PostResult::kPosted);
}

TEST_CASE("a full inbox and a full completion queue are kAgain, and nothing is sent then") {
  World world(2, 4);
  for (std::uint32_t i = 0; i < 4; ++i) CHECK(world.rails[0]->post_write({1, 0, 0, 0, i, i}) == PostResult::kPosted);
  world.regions[0].data()[0] = std::byte{9};
  CHECK(world.rails[0]->post_write({1, 1, 0, 0, 99, 99}) == PostResult::kAgain);
  CHECK(world.regions[1].data()[0] == std::byte{0});
  RailEvent events[3];
  CHECK(world.rails[1]->poll(events) == 3);
  CHECK(world.rails[0]->post_write({1, 1, 0, 0, 4, 4}) == PostResult::kPosted);
  CHECK(world.regions[1].data()[0] == std::byte{9});
  CHECK(world.rails[1]->poll(events) == 2);
  CHECK(events[0].imm == 3);
  CHECK(events[1].imm == 4);
  std::uint64_t posted = 5;
  while (world.rails[0]->post_write({1, 0, 0, 0, 0, posted}) == PostResult::kPosted) {
    ++posted;
    world.rails[1]->poll(events);
    REQUIRE(posted < 1u << 20);
  }
  std::uint64_t next = 0;
  while (std::size_t count = world.rails[0]->poll(events)) {
    for (std::size_t i = 0; i < count; ++i) CHECK(events[i].id == next++);
  }
  CHECK(next == posted);
  CHECK(world.rails[0]->post_write({1, 0, 0, 0, 0, 0}) == PostResult::kPosted);
}

TEST_CASE("a write outside either region is refused before a byte moves") {
  World world(2);
  auto post = [&](std::uint32_t node, std::uint32_t bytes, std::uint64_t from, std::uint64_t to) {
    return code_of([&] { world.rails[0]->post_write({node, bytes, from, to, 1, 1}); });
  };
  CHECK(post(1, 8, kRegionBytes - 8, kRegionBytes - 8) == StatusCode::kOk);
  CHECK(post(1, 9, kRegionBytes - 8, 0) == StatusCode::kInternal);
  CHECK(post(1, 9, 0, kRegionBytes - 8) == StatusCode::kInternal);
  CHECK(post(1, 1, ~0ull, 0) == StatusCode::kInternal);
  CHECK(post(1, 1, 0, ~0ull) == StatusCode::kInternal);
  CHECK(post(0, 1, 0, 0) == StatusCode::kInternal);  // the own node
  CHECK(post(2, 1, 0, 0) == StatusCode::kInternal);
  RailEvent events[8];
  CHECK(world.rails[1]->poll(events) == 1);
}

TEST_CASE("a writer that talks all the time does not starve the others") {
  World world(3, 8);
  RailEvent events[4];
  bool heard = false;
  world.rails[2]->post_write({0, 0, 0, 0, 222, 0});
  for (int round = 0; round < 4 && !heard; ++round) {
    for (std::uint32_t i = 0; i < 8; ++i) world.rails[1]->post_write({0, 0, 0, 0, 111, i});
    std::size_t count = world.rails[0]->poll(events);
    for (std::size_t i = 0; i < count; ++i) heard = heard || events[i].imm == 222;
    RailEvent done[8];
    world.rails[1]->poll(done);
  }
  CHECK(heard);
}

TEST_CASE("an arrival before add_peer is kept") {
  World world(2, 64, false);
  world.join(0);
  CHECK(world.rails[0]->post_write({1, 0, 0, 0, 5, 0}) == PostResult::kPosted);
  world.join(1);
  RailEvent events[2];
  REQUIRE(world.rails[1]->poll(events) == 1);
  CHECK(events[0].imm == 5);
}

TEST_CASE("an address that does not fit is a configuration error") {
  World world(2, 64, false);
  auto blob = world.rails[1]->local_address();
  auto add = [&](std::uint32_t node, std::vector<std::byte> bytes) {
    return code_of([&] { world.rails[0]->add_peer(node, bytes); });
  };
  CHECK(add(0, blob) == StatusCode::kInternal);
  auto changed = blob;
  changed.pop_back();
  CHECK(add(1, changed) == StatusCode::kConfig);
  for (std::size_t at : {0, 4, 8, 12, 16, 24, 32, 40, 48, 52, 61, 317}) {  // every field, and both names
    changed = blob;
    changed[at] ^= std::byte{1};
    CHECK_MESSAGE(add(1, changed) == StatusCode::kConfig, "byte " << at);
  }
  changed = blob;
  for (std::size_t i = 56; i < changed.size(); ++i) changed[i] = std::byte{'x'};  // names without an end
  CHECK(add(1, changed) == StatusCode::kConfig);
  CHECK(add(1, blob) == StatusCode::kOk);
  CHECK(add(1, blob) == StatusCode::kInternal);  // twice
}

TEST_CASE("a corrupt inbox is one error event, not a read out of bounds") {
  World world(2, 4);
  std::string name = "rail" + std::to_string(::getpid());
  Segment inbox = Segment::open(segment_name(name, 1, "inbox"), 2 * (128 + 64));
  std::memset(inbox.data(), 0xff, 8);  // the cursor of node 0
  RailEvent events[4];
  REQUIRE(world.rails[1]->poll(events) == 1);
  CHECK(events[0].kind == RailEvent::Kind::kError);
  CHECK_FALSE(events[0].own_write);
  CHECK(events[0].peer_node == 0);
  CHECK(world.rails[1]->poll(events) == 0);
}

TEST_CASE("slots that lie apart are reached through what their owner exports") {
  static constexpr std::uint64_t kBorder = 1 << 16;
  std::string key = "apart" + std::to_string(::getpid());
  std::vector<Segment> words, slots, imported;
  std::vector<std::unique_ptr<ShmRail>> rails;
  auto config_of = [&](std::uint32_t node) {
    ShmRailConfig config;
    config.memory = {words[node].data(), slots[node].data(), kBorder, kRegionBytes};
    config.region_name = words[node].name();
    config.inbox_name = segment_name(key, static_cast<int>(node), "inbox");
    config.own_node = node;
    config.num_nodes = 2;
    config.exported_slots = slots[node].name();
    config.import_slots = [&imported](const std::string& exported) {
      imported.push_back(Segment::open(exported, kRegionBytes - kBorder));
      return imported.back().data();
    };
    return config;
  };
  for (std::uint32_t node = 0; node < 2; ++node) {
    words.push_back(Segment::create(segment_name(key, static_cast<int>(node)), kBorder));
    slots.push_back(Segment::create(segment_name(key, static_cast<int>(node), "slots"), kRegionBytes - kBorder));
    rails.push_back(std::make_unique<ShmRail>(config_of(node)));
  }
  for (std::uint32_t node = 0; node < 2; ++node) rails[node]->add_peer(1 - node, rails[1 - node]->local_address());
  std::memcpy(words[0].data() + kBorder - 8, "payload", 8);
  std::memcpy(slots[0].data() + 100, "slotful", 8);
  CHECK(rails[0]->post_write({1, 8, kBorder - 8, kBorder, 1, 1}) == PostResult::kPosted);
  CHECK(rails[0]->post_write({1, 8, kBorder + 100, 16, 2, 2}) == PostResult::kPosted);
  CHECK(rails[0]->post_write({1, 8, kBorder + 100, kRegionBytes - 8, 3, 3}) == PostResult::kPosted);
  RailEvent events[4];
  REQUIRE(rails[1]->poll(events) == 3);
  CHECK(std::memcmp(slots[1].data(), "payload", 8) == 0);
  CHECK(std::memcmp(words[1].data() + 16, "slotful", 8) == 0);
  CHECK(std::memcmp(slots[1].data() + slots[1].size() - 8, "slotful", 8) == 0);
  CHECK(code_of([&] { rails[0]->post_write({1, 8, kBorder - 4, kBorder, 1, 1}); }) == StatusCode::kInternal);
  CHECK(code_of([&] { rails[0]->post_write({1, 8, kBorder, kBorder - 4, 1, 1}); }) == StatusCode::kInternal);

  // A node whose slots are in its region has another configuration.
  ShmRailConfig whole = config_of(1);
  whole.memory = {words[1].data(), nullptr, 0, kBorder};
  whole.exported_slots.clear();
  whole.inbox_name += "2";
  ShmRail other(whole);
  ShmRailConfig third = config_of(0);
  third.inbox_name += "3";
  ShmRail own(third);
  CHECK(code_of([&] { own.add_peer(1, other.local_address()); }) == StatusCode::kConfig);
}

TEST_CASE("after unlink nothing is left in /dev/shm and the rails still work") {
  World world(2);
  for (std::uint32_t node = 0; node < 2; ++node) {
    world.rails[node]->unlink();
    world.regions[node].unlink();
    struct stat info{};
    std::string path = "/dev/shm/" + segment_name("rail" + std::to_string(::getpid()), static_cast<int>(node), "inbox");
    CHECK(::stat(path.c_str(), &info) != 0);
  }
  CHECK(world.rails[0]->post_write({1, 4, 0, 0, 5, 0}) == PostResult::kPosted);
  RailEvent events[2];
  CHECK(world.rails[1]->poll(events) == 1);
}

namespace {

// Every node sends `count` messages to each other node and checks all that it gets; the payload is a pattern of
// (writer, sequence number) in a slot of the writer's, reused only after the receiver's echo.
int exchange(World& world, std::uint32_t own, std::uint32_t num_nodes, std::uint32_t count) {
  constexpr std::uint32_t kSlots = 8, kBytes = 2048, kEcho = 1u << 31;
  ShmRail& rail = *world.rails[own];
  std::byte* region = world.regions[own].data();
  std::vector<std::uint32_t> sent(num_nodes, 0), echoed(num_nodes, 0), got(num_nodes, 0), owed(num_nodes, 0);
  std::uint64_t posts = 0, done = 0;
  auto deadline = std::chrono::steady_clock::now() + kPatience;
  std::uint64_t want = std::uint64_t{num_nodes - 1} * count;
  std::uint64_t total_echoed = 0, total_got = 0, total_owed = 0;
  while (total_echoed < want || total_got < want || total_owed > 0 || done < posts) {
    if (std::chrono::steady_clock::now() > deadline) return 2;
    for (std::uint32_t node = 0; node < num_nodes; ++node) {
      if (node == own) continue;
      while (owed[node] > 0 && rail.post_write({node, 0, 0, 0, kEcho | own << 16, posts}) == PostResult::kPosted) {
        --owed[node], --total_owed, ++posts;
      }
      if (sent[node] == count || sent[node] - echoed[node] == kSlots) continue;
      std::uint32_t slot = (node * kSlots + sent[node] % kSlots) * kBytes;
      std::memset(region + slot, static_cast<int>((own * 31 + sent[node]) & 0xff), kBytes);
      std::uint64_t target = kRegionBytes / 2 + (own * kSlots + sent[node] % kSlots) * kBytes;
      std::uint32_t imm = own << 16 | (sent[node] & 0xffff);
      if (rail.post_write({node, kBytes, slot, target, imm, posts}) == PostResult::kPosted) ++sent[node], ++posts;
    }
    RailEvent events[5];
    std::size_t filled = rail.poll(events);
    for (std::size_t i = 0; i < filled; ++i) {
      if (events[i].kind == RailEvent::Kind::kError) return 3;
      if (events[i].kind == RailEvent::Kind::kWriteDone) {
        if (events[i].id != done++) return 4;
        continue;
      }
      std::uint32_t node = events[i].imm >> 16 & 0x7fff;
      if ((events[i].imm & kEcho) != 0) {
        ++echoed[node], ++total_echoed;
        continue;
      }
      if ((events[i].imm & 0xffff) != (got[node] & 0xffff) || events[i].bytes != kBytes) return 5;
      const std::byte* slot = region + kRegionBytes / 2 + (node * kSlots + got[node] % kSlots) * kBytes;
      std::byte expected{static_cast<unsigned char>(node * 31 + got[node])};
      for (std::uint32_t k = 0; k < kBytes; k += 64) {
        if (slot[k] != expected) return 6;
      }
      ++got[node], ++total_got, ++owed[node], ++total_owed;
    }
    if (filled == 0) std::this_thread::sleep_for(std::chrono::microseconds(20));  // yields even on a loaded host
  }
  return 0;
}

}  // namespace

TEST_CASE("processes exchange many messages, in order and intact, through small inboxes") {
  constexpr std::uint32_t kNodes = 4, kCount = 3000;
  World world(kNodes, 4);
  std::vector<pid_t> pids;
  for (std::uint32_t node = 0; node < kNodes; ++node) {
    pid_t pid = ::fork();
    if (pid == 0) ::_exit(exchange(world, node, kNodes, kCount));
    pids.push_back(pid);
  }
  for (pid_t pid : pids) {
    int status = 0;
    ::waitpid(pid, &status, 0);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
  }
}

TEST_CASE("threads exchange many messages, in order and intact") {
  constexpr std::uint32_t kNodes = 3, kCount = 3000;
  World world(kNodes, 16);
  std::vector<std::thread> threads;
  std::vector<int> results(kNodes, -1);
  for (std::uint32_t node = 0; node < kNodes; ++node) {
    threads.emplace_back([&, node] { results[node] = exchange(world, node, kNodes, kCount); });
  }
  for (std::thread& thread : threads) thread.join();
  for (int result : results) CHECK(result == 0);
}
