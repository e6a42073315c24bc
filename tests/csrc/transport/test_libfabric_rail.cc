// LibfabricRail over a software provider, several rails in one process. MOE_EFA_LIBFABRIC and MOE_EFA_TEST_PROVIDER
// (default tcp) choose what is tested; everything is skipped where no libfabric can be opened.
#include <doctest/doctest.h>
#include <signal.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>

#include "proto/imm.h"
#include "transport/libfabric_rail.h"

using moe_efa::common::StatusCode;
using moe_efa::common::StatusError;
using moe_efa::proto::Imm;
using moe_efa::proto::ImmKind;
using namespace moe_efa::transport;
namespace proto = moe_efa::proto;

namespace {

constexpr std::uint64_t kRegionBytes = 4 << 20;
using Clock = std::chrono::steady_clock;

LibfabricSearch test_search() {
  LibfabricSearch search;
  if (const char* library = std::getenv("MOE_EFA_LIBFABRIC")) search.library = library;
  return search;
}

LibfabricRailConfig test_config() {
  LibfabricRailConfig config;
  config.search = test_search();
  const char* provider = std::getenv("MOE_EFA_TEST_PROVIDER");
  config.provider = provider != nullptr ? provider : "tcp";
  return config;
}

bool available() {
  static const LibfabricInfo info = libfabric_info(test_search());
  if (!info.found) MESSAGE("skipped: " << info.error);
  return info.found;
}

StatusCode code_of(const std::function<void()>& action, std::string* message = nullptr) {
  try {
    action();
  } catch (const StatusError& error) {
    if (message != nullptr) *message = error.what();
    return error.status().code;
  }
  return StatusCode::kOk;
}

// One rail and what it has seen.
struct Node {
  std::vector<std::byte> region = std::vector<std::byte>(kRegionBytes);
  std::unique_ptr<Rail> rail;
  std::vector<std::uint64_t> done;
  std::vector<RailEvent> arrived;
  std::vector<RailEvent> errors;

  explicit Node(LibfabricRailConfig config) {
    if (config.memory.region == nullptr) config.memory = {region.data(), nullptr, 0, region.size()};
    rail = make_libfabric_rail(config);
  }

  std::size_t poll() {
    RailEvent events[16];
    const std::size_t count = rail->poll(events);
    for (std::size_t i = 0; i < count; ++i) {
      if (events[i].kind == RailEvent::Kind::kWriteDone) done.push_back(events[i].id);
      if (events[i].kind == RailEvent::Kind::kRemoteImm) arrived.push_back(events[i]);
      if (events[i].kind == RailEvent::Kind::kError) errors.push_back(events[i]);
    }
    return count;
  }
};

struct Group {
  std::vector<std::unique_ptr<Node>> nodes;

  explicit Group(std::uint32_t size, LibfabricRailConfig config = test_config()) {
    config.num_peers = size;
    for (std::uint32_t i = 0; i < size; ++i) nodes.push_back(std::make_unique<Node>(config));
    for (std::uint32_t i = 0; i < size; ++i) {
      for (std::uint32_t j = 0; j < size; ++j) {
        if (i != j) nodes[i]->rail->add_peer(j, nodes[j]->rail->local_address());
      }
    }
  }

  Node& operator[](std::size_t i) { return *nodes[i]; }

  void poll() {
    for (auto& node : nodes) {
      if (node) node->poll();
    }
  }

  bool until(const std::function<bool()>& condition, double seconds = 20) {
    const auto deadline = Clock::now() + std::chrono::duration<double>(seconds);
    while (!condition()) {
      if (Clock::now() > deadline) return false;
      poll();
    }
    return true;
  }

  bool post(std::size_t from, const WriteRequest& request) {
    bool posted = false;
    return until([&] { return posted = posted || (*this)[from].rail->post_write(request) == PostResult::kPosted; });
  }
};

WriteRequest hello(std::uint32_t from, std::uint32_t to) {
  WriteRequest request;
  request.peer_node = to;
  request.imm = Imm::make(ImmKind::kHello, false, 0, from, 0).encode();
  request.id = 1000 + to;
  return request;
}

std::byte pattern(std::uint64_t seed, std::uint64_t i) {
  return static_cast<std::byte>((seed * 131 + i * 7 + i / 251) & 0xff);
}

extern "C" void ignore_signal(int) {}

}  // namespace

// First in the file: the library is loaded once per process.
TEST_CASE("loading the library leaves the process's signal handlers alone") {
  const int signals[] = {SIGINT, SIGTERM, SIGSEGV, SIGBUS, SIGABRT};
  std::map<int, struct sigaction> before;
  struct sigaction mine = {};
  mine.sa_handler = ignore_signal;
  for (int number : signals) sigaction(number, &mine, &before[number]);
  const bool found = available();
  if (found) Node node(test_config());
  for (int number : signals) {
    struct sigaction now = {};
    sigaction(number, &before[number], &now);
    CHECK((now.sa_handler == ignore_signal));
  }
}

TEST_CASE("the library and its providers are described") {
  if (!available()) return;
  const LibfabricInfo info = libfabric_info(test_search());
  CHECK(info.built);
  CHECK(info.path.find("libfabric") != std::string::npos);
  CHECK(std::atof(info.version.c_str()) >= 1.17);
  std::string names;
  for (const std::string& name : available_providers(test_search())) names += name + " ";
  Node node(test_config());
  MESSAGE(info.path << " " << info.version << ": " << names << "| " << node.rail->describe());
  CHECK_FALSE(names.empty());
  CHECK_FALSE(available_nics(test_search(), "tcp").empty());
}

TEST_CASE("an unknown provider and an empty region are configuration errors") {
  if (!available()) return;
  LibfabricRailConfig config = test_config();
  config.provider = "nonesuch";
  std::string message;
  CHECK(code_of([&] { Node node(config); }, &message) == StatusCode::kConfig);
  CHECK(message.find("nonesuch") != std::string::npos);
  config.provider = "shm";
  CHECK(code_of([&] { Node node(config); }) == StatusCode::kConfig);
  CHECK(code_of([&] { make_libfabric_rail(test_config()); }) == StatusCode::kConfig);
}

TEST_CASE("a rail that cannot do what is asked is not constructed, and says what is missing") {
  if (!available()) return;
  LibfabricRailConfig config = test_config();
  config.slots.kind = MemoryDescriptor::Kind::kCuda;
  std::string message;
  CHECK(code_of([&] { Node node(config); }, &message) == StatusCode::kConfig);
  CHECK(message.find("FI_HMEM") != std::string::npos);
  CHECK(message.find("buffers=\"host\"") != std::string::npos);
  const std::string chosen = default_provider(test_search());
  CHECK_FALSE(chosen.empty());
  MESSAGE("without a name: " << chosen);
}

TEST_CASE("a write without an immediate is seen by its bytes alone") {
  if (!available()) return;
  Group group(2);
  REQUIRE(group.post(0, hello(0, 1)));
  REQUIRE(group.until([&] { return group[1].arrived.size() == 1 && group[0].done.size() == 1; }));
  group[0].region[10] = std::byte{0x77};
  WriteRequest request = {1, 1, 10, 20, 4711, 8};
  request.with_imm = false;
  REQUIRE(group.post(0, request));
  REQUIRE(group.until([&] { return group[0].done.size() == 2; }));
  CHECK(group[1].region[20] == std::byte{0x77});
  REQUIRE(group.post(0, {1, 0, 0, 0, 12, 9}));
  REQUIRE(group.until([&] { return group[1].arrived.size() == 2; }));
  CHECK(group[1].arrived[1].imm == 12);
}

TEST_CASE("two rails greet each other and carry payloads with their immediates") {
  if (!available()) return;
  Group group(2);
  REQUIRE(group.post(0, hello(0, 1)));
  REQUIRE(group.post(1, hello(1, 0)));
  REQUIRE(group.until([&] { return group[0].arrived.size() == 1 && group[1].arrived.size() == 1; }));
  CHECK(Imm::decode(group[1].arrived[0].imm).kind == ImmKind::kHello);
  CHECK(Imm::decode(group[1].arrived[0].imm).source_node == 0);
  CHECK(Imm::decode(group[0].arrived[0].imm).source_node == 1);
  REQUIRE(group.until([&] { return group[0].done.size() == 1 && group[1].done.size() == 1; }));
  CHECK(group[0].done[0] == 1001);

  for (std::uint32_t bytes : {1u, 64u, 4096u, 474u << 10, 3u << 20}) {
    CAPTURE(bytes);
    group[0].arrived.clear();
    group[0].done.clear(), group[1].done.clear();
    std::memset(group[0].region.data(), 0xee, kRegionBytes);
    for (std::uint32_t i = 0; i < bytes; ++i) group[1].region[100 + i] = pattern(bytes, i);
    REQUIRE(group.post(1, {0, bytes, 100, 777, 0xfedcba98u, 42}));
    REQUIRE(group.until([&] { return group[0].arrived.size() == 1 && group[1].done.size() == 1; }));
    CHECK(group[0].arrived[0].imm == 0xfedcba98u);
    CHECK((group[0].arrived[0].bytes == bytes || group[0].arrived[0].bytes == 0));  // 1.17 does not tell
    CHECK(group[1].done[0] == 42);
    CHECK(std::memcmp(&group[0].region[777], &group[1].region[100], bytes) == 0);
    CHECK(group[0].region[776] == std::byte{0xee});
    CHECK(group[0].region[777 + bytes] == std::byte{0xee});
  }
  CHECK(group[0].errors.empty());
  CHECK(group[1].errors.empty());
}

TEST_CASE("slots that lie apart are written and read at their offsets, and no write crosses into them") {
  if (!available()) return;
  constexpr std::uint64_t kBorder = 1 << 20, kGuard = 4096;
  std::vector<std::byte> words[2], slots[2];
  Group group(0);
  for (int i = 0; i < 2; ++i) {
    words[i].assign(kBorder + kGuard, std::byte{0xee});
    slots[i].assign(kRegionBytes - kBorder + kGuard, std::byte{0xee});
    LibfabricRailConfig config = test_config();
    config.num_peers = 2;
    config.memory = {words[i].data(), slots[i].data(), kBorder, kRegionBytes};
    group.nodes.push_back(std::make_unique<Node>(config));
  }
  for (std::uint32_t i = 0; i < 2; ++i) group[i].rail->add_peer(1 - i, group[1 - i].rail->local_address());
  const proto::RegionMemory from{words[0].data(), slots[0].data(), kBorder, kRegionBytes};
  const proto::RegionMemory to{words[1].data(), slots[1].data(), kBorder, kRegionBytes};
  struct Range {
    std::uint64_t local, remote;
    std::uint32_t bytes;
  };
  const Range ranges[] = {{0, 64, 100},                                   // words to words
                          {kBorder, kBorder, 5000},                       // slots to slots
                          {kBorder - 256, kBorder + 8192, 256},           // up to the border
                          {kBorder + 6000, kBorder - 512, 512},           // into what ends there
                          {kRegionBytes - 300, kRegionBytes - 300, 300},  // up to the end
                          {kBorder + 1000, kBorder + 20000, 1u << 20}};
  std::size_t posted = 0;
  for (const Range& range : ranges) {
    CAPTURE(range.local);
    for (std::uint32_t i = 0; i < range.bytes; ++i) from.at(range.local)[i] = pattern(range.local, i);
    REQUIRE(group.post(0, {1, range.bytes, range.local, range.remote, 9, 1}));
    ++posted;
    REQUIRE(group.until([&] { return group[1].arrived.size() == posted && group[0].done.size() == posted; }));
    CHECK(std::memcmp(to.at(range.remote), from.at(range.local), range.bytes) == 0);
  }
  for (std::uint64_t offset : {std::uint64_t{0}, kBorder, kRegionBytes}) {  // immediates without bytes
    REQUIRE(group.post(0, {1, 0, offset, offset, 77, 5}));
    ++posted;
  }
  REQUIRE(group.until([&] { return group[1].arrived.size() == posted && group[0].done.size() == posted; }));
  for (int i = 0; i < 2; ++i) {
    for (std::uint64_t k = 0; k < kGuard; ++k) {
      REQUIRE(words[i][kBorder + k] == std::byte{0xee});
      REQUIRE(slots[i][kRegionBytes - kBorder + k] == std::byte{0xee});
    }
  }
  auto code = [&](const WriteRequest& request) { return code_of([&] { group[0].rail->post_write(request); }); };
  CHECK(code({1, 512, kBorder - 256, kBorder, 1, 1}) == StatusCode::kInternal);
  CHECK(code({1, 512, kBorder, kBorder - 256, 1, 1}) == StatusCode::kInternal);
  CHECK(code({1, 1, kBorder, kRegionBytes, 1, 1}) == StatusCode::kInternal);
  CHECK(code({1, 1, kRegionBytes, kBorder, 1, 1}) == StatusCode::kInternal);
  CHECK(code({1, 4096, kBorder, ~0ull - 10, 1, 1}) == StatusCode::kInternal);
  group.nodes.clear();  // before what they registered
}

TEST_CASE("an immediate without bytes may stand at the very end of both regions") {
  if (!available()) return;
  Group group(2);
  REQUIRE(group.post(0, {1, 0, kRegionBytes, kRegionBytes, 77, 5}));
  REQUIRE(group.until([&] { return group[1].arrived.size() == 1 && group[0].done.size() == 1; }));
  CHECK(group[1].arrived[0].imm == 77);
  CHECK(group[1].arrived[0].bytes == 0);
}

TEST_CASE("four rails exchange 2000 windowed writes each, every payload intact at its event") {
  if (!available()) return;
  constexpr std::uint32_t kNodes = 4, kWrites = 2000, kWindow = 8, kBytes = 4096;
  Group group(kNodes);
  // Ring k of node n: kWindow slots; a slot is refilled after its arrival was checked (all nodes are in this process).
  auto slot = [](std::uint32_t from, std::uint64_t seq) { return (from * kWindow + seq % kWindow) * kBytes; };
  const std::uint64_t send_base = std::uint64_t{kNodes} * kWindow * kBytes;
  std::uint64_t sent[kNodes][kNodes] = {}, seen[kNodes][kNodes] = {}, total[kNodes] = {};
  std::uint64_t completed[kNodes] = {}, mismatches = 0;
  auto finished = [&] {
    for (std::uint32_t n = 0; n < kNodes; ++n) {
      if (total[n] != kWrites || completed[n] != kWrites) return false;
    }
    return true;
  };
  auto step = [&] {
    for (std::uint32_t n = 0; n < kNodes; ++n) {
      for (std::uint32_t to = 0; to < kNodes; ++to) {
        const std::uint64_t seq = sent[n][to];
        if (to == n || total[n] == kWrites || seq - seen[to][n] >= kWindow) continue;
        // A source slot is free when all posted before the window are done; wait for everything, to keep it plain.
        if (seq % kWindow == 0 && completed[n] < total[n]) continue;
        const std::uint64_t source = send_base + slot(to, seq);
        for (std::uint32_t i = 0; i < kBytes; ++i) group[n].region[source + i] = pattern(n * 10000 + seq, i);
        const Imm imm = Imm::make(ImmKind::kDispatchChunk, false, 3, n, seq);
        const WriteRequest request = {to, kBytes, source, slot(n, seq), imm.encode(), seq};
        if (group[n].rail->post_write(request) == PostResult::kAgain) continue;
        ++sent[n][to], ++total[n];
      }
      group[n].poll();
      completed[n] += group[n].done.size();
      group[n].done.clear();
      for (const RailEvent& event : group[n].arrived) {
        const Imm imm = Imm::decode(event.imm);
        const std::uint64_t seq = imm.value;
        for (std::uint32_t i = 0; i < kBytes; ++i) {
          mismatches += group[n].region[slot(imm.source_node, seq) + i] != pattern(imm.source_node * 10000 + seq, i);
        }
        ++seen[n][imm.source_node];
      }
      group[n].arrived.clear();
    }
    return finished();
  };
  REQUIRE(group.until(step, 60));
  CHECK(mismatches == 0);
  for (std::uint32_t n = 0; n < kNodes; ++n) {
    CHECK(group[n].errors.empty());
    for (std::uint32_t to = 0; to < kNodes; ++to) CHECK(seen[to][n] == sent[n][to]);
  }
}

TEST_CASE("writes outside either region, to strangers, or past the address space are refused before posting") {
  if (!available()) return;
  Group group(2);
  auto code = [&](const WriteRequest& request) { return code_of([&] { group[0].rail->post_write(request); }); };
  CHECK(code({1, 1, kRegionBytes, 0, 1, 1}) == StatusCode::kInternal);
  CHECK(code({1, 1, 0, kRegionBytes, 1, 1}) == StatusCode::kInternal);
  CHECK(code({1, 4096, 0, kRegionBytes - 4095, 1, 1}) == StatusCode::kInternal);
  CHECK(code({1, 4096, ~0ull - 10, 0, 1, 1}) == StatusCode::kInternal);
  CHECK(code({1, 4096, 0, ~0ull - 10, 1, 1}) == StatusCode::kInternal);
  CHECK(code({1, 0, 0, kRegionBytes + 1, 1, 1}) == StatusCode::kInternal);
  CHECK(code({7, 0, 0, 0, 1, 1}) == StatusCode::kInternal);
  CHECK(code({0, 0, 0, 0, 1, 1}) == StatusCode::kInternal);  // itself was never added
  std::string message;
  code_of([&] { group[0].rail->post_write({1, 4096, 0, kRegionBytes, 1, 1}); }, &message);
  CHECK(message.find("peer node 1") != std::string::npos);
  REQUIRE(group.post(0, hello(0, 1)));  // nothing was broken by it
  REQUIRE(group.until([&] { return group[1].arrived.size() == 1; }));
}

TEST_CASE("addresses that are damaged or of another provider are refused by name") {
  if (!available()) return;
  Node own(test_config()), other(test_config());
  const std::vector<std::byte> good = other.rail->local_address();
  std::string message;
  auto refused = [&](std::vector<std::byte> address) {
    message.clear();
    return code_of([&] { own.rail->add_peer(1, address); }, &message) == StatusCode::kConfig;
  };
  CHECK(refused({}));
  CHECK(refused(std::vector<std::byte>(good.size(), std::byte{0x5a})));
  CHECK(refused({good.begin(), good.begin() + 40}));
  CHECK(refused({good.begin(), good.end() - 1}));
  std::vector<std::byte> bad = good;
  bad.push_back(std::byte{0});
  CHECK(refused(bad));
  bad = good;
  bad[4] = std::byte{9};
  CHECK(refused(bad));
  CHECK(message.find("version 9") != std::string::npos);
  bad = good;
  bad[8] ^= std::byte{0x40};  // provider version
  CHECK(refused(bad));
  bad = good;
  std::memcpy(&bad[68], "efa-direct", 11);
  CHECK(refused(bad));
  CHECK(message.find("efa-direct") != std::string::npos);
  CHECK(message.find("peer node 1") != std::string::npos);
  own.rail->add_peer(1, good);
  CHECK(code_of([&] { own.rail->add_peer(1, good); }) == StatusCode::kInternal);
}

TEST_CASE("no more writes are in flight than configured") {
  if (!available()) return;
  LibfabricRailConfig config = test_config();
  config.max_outstanding = 8;
  Group group(2, config);
  REQUIRE(group.post(0, hello(0, 1)));  // connects
  REQUIRE(group.until([&] { return group[0].done.size() == 1 && group[1].arrived.size() == 1; }));
  int posted = 0;
  while (group[0].rail->post_write({1, 64, 0, 0, 9, 9}) == PostResult::kPosted && posted < 100) ++posted;
  CHECK(posted <= 8);
  CHECK(posted >= 1);
  REQUIRE(group.until([&] { return group[0].done.size() == 1 + static_cast<std::size_t>(posted); }));
  CHECK(group[0].rail->post_write({1, 64, 0, 0, 9, 9}) == PostResult::kPosted);
}

TEST_CASE("poll returns no more events than asked for and loses none") {
  if (!available()) return;
  Group group(2);
  for (std::uint32_t i = 0; i < 50; ++i) REQUIRE(group.post(0, {1, 16, 0, 0, 100 + i, 0}));
  std::size_t arrived = group[1].arrived.size();  // read while posting
  const auto deadline = Clock::now() + std::chrono::seconds(10);
  while (arrived < 50 && Clock::now() < deadline) {
    RailEvent one[1];
    group[0].poll();
    const std::size_t count = group[1].rail->poll(one);
    REQUIRE(count <= 1);
    arrived += count == 1 && one[0].kind == RailEvent::Kind::kRemoteImm;
  }
  CHECK(arrived == 50);
  CHECK(group[0].rail->poll({}) == 0);
}

TEST_CASE("a peer that is destroyed ends in errors or refusals, never in a crash or a lost completion") {
  if (!available()) return;
  Group group(2);
  REQUIRE(group.post(0, hello(0, 1)));
  REQUIRE(group.until([&] { return group[0].done.size() == 1 && group[1].arrived.size() == 1; }));
  int posted = 0;
  for (int i = 0; i < 16; ++i) {
    posted += group[0].rail->post_write({1, 256 << 10, 0, 0, 9, 500u + i}) == PostResult::kPosted;
  }
  REQUIRE(posted > 0);
  group.nodes[1].reset();
  const auto settled = [&] {
    return group[0].done.size() - 1 + group[0].errors.size() >= static_cast<std::size_t>(posted);
  };
  CHECK(group.until(settled, 10));
  for (const RailEvent& event : group[0].errors) {
    CHECK(event.own_write);
    CHECK(event.peer_node == 1);
    CHECK(event.id >= 500);
    CHECK(event.error.find("peer node 1") != std::string::npos);
  }
  if (!group[0].errors.empty()) MESSAGE(group[0].errors[0].error);
  // Later writes: refused, failed, or "try again" for as long as anyone tries; a deadline is the caller's.
  const auto deadline = Clock::now() + std::chrono::milliseconds(300);
  std::string message;
  const StatusCode code = code_of(
      [&] {
        while (Clock::now() < deadline) {
          group[0].rail->post_write({1, 64, 0, 0, 9, 600});
          group[0].poll();
        }
      },
      &message);
  CHECK((code == StatusCode::kOk || code == StatusCode::kTransport));
}

TEST_CASE("a rail is destroyed with writes in flight") {
  if (!available()) return;
  Group group(2);
  for (int i = 0; i < 32; ++i) group[0].rail->post_write({1, 64 << 10, 0, 0, 9, 9});
  group.nodes[0].reset();
  for (int i = 0; i < 1000; ++i) group[1].poll();
  group.nodes[1].reset();
}

TEST_CASE("a source address is bound") {
  if (!available()) return;
  LibfabricRailConfig config = test_config();
  if (config.provider != "tcp") return;
  config.source_address = "127.0.0.1";
  Group group(2, config);
  REQUIRE(group.post(0, hello(0, 1)));
  REQUIRE(group.until([&] { return group[1].arrived.size() == 1; }));
  config.source_address = "203.0.113.7";  // nobody's
  CHECK(code_of([&] { Node node(config); }) != StatusCode::kOk);
}
