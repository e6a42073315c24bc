// GDRCopy, played by a library beside this program: what is stored into a window arrives, what cannot work is told in
// words, and groups that use it give the bits of the CPU.
#include <doctest/doctest.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "common/atomic.h"
#include "device_rounds.h"
#include "gdrcopy_testing.h"
#include "runtime/gdrcopy.h"

using namespace moe_efa;
using namespace moe_efa::testing;
using runtime::GdrWindow;

namespace {

constexpr char kAbsent[] = "/nonexistent/libgdrapi.so";

bool becomes(const std::uint64_t* word, std::uint64_t value) {
  auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (common::load_acquire(word) != value) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::yield();
  }
  return true;
}

void check_run(const Run& run, const Run& cpu, const std::vector<std::string>& flags) {
  CHECK_MESSAGE(run.failure.empty(), run.failure);
  CHECK(run.flags == flags);
  for (std::size_t rank = 0; rank < flags.size(); ++rank) {
    CHECK(run.results[rank] == cpu.results[rank]);
    CHECK(!run.results[rank].rows.empty());
    CHECK(run.devices[rank]->num_mappings() == 0);
  }
  CHECK(stand_in().live() == 0);
}

}  // namespace

TEST_CASE("what is stored into a window arrives in the memory behind it, wherever that begins") {
  EmulatedDevice device(true);
  for (std::size_t shift : {std::size_t{0}, std::size_t{192}, (std::size_t{64} << 10) - 8}) {
    CAPTURE(shift);
    auto* memory = static_cast<std::byte*>(device.allocate(256 << 10)) + shift;
    auto* word = reinterpret_cast<std::uint64_t*>(memory + 64);
    *word = 5;
    {
      GdrWindow window(stand_in().path, memory, 128);
      auto* seen = reinterpret_cast<std::uint64_t*>(window.data() + 64);
      CHECK(*seen == 5);
      common::store_release(seen, 7);
      common::store_fence();
      CHECK(becomes(word, 7));
      CHECK(stand_in().live() == 3);
    }
    CHECK(stand_in().live() == 0);
  }
}

TEST_CASE("what cannot work is told in words, and nothing is left behind") {
  EmulatedDevice device(true);
  auto* memory = static_cast<std::byte*>(device.allocate(64 << 10));
  auto reason = [&](const char* fails, const std::string& library) {
    Failing failing(fails);
    try {
      GdrWindow window(library, memory, 64);
    } catch (const common::StatusError& error) {
      CHECK(error.status().code == common::StatusCode::kConfig);
      CHECK(stand_in().live() == 0);
      return std::string(error.what());
    }
    return std::string();
  };
  auto says = [](const std::string& text, const char* word) { return text.find(word) != std::string::npos; };
  CHECK(reason("", stand_in().path).empty());
  CHECK(says(reason("", kAbsent), kAbsent));
  CHECK(says(reason("", "libm.so.6"), "libm.so.6 has no gdr_"));
  CHECK(says(reason("version", stand_in().path), "version 3.5, not 2.x"));
  CHECK(says(reason("gdr_open", stand_in().path), "gdrdrv"));
  CHECK(says(reason("gdr_pin_buffer", stand_in().path), "gdr_pin_buffer failed: Operation not permitted"));
  CHECK(says(reason("gdr_map", stand_in().path), "gdr_map failed"));

  runtime::GdrcopyInfo info = runtime::gdrcopy_info(stand_in().path);
  CHECK(info.usable);
  CHECK(info.version == "2.5");
  CHECK(info.path == stand_in().path);
  CHECK(says(runtime::gdrcopy_info(kAbsent).error, kAbsent));
  Failing failing("gdr_open");
  info = runtime::gdrcopy_info(stand_in().path);
  CHECK(!info.usable);
  CHECK(says(info.error, "gdrdrv"));
}

TEST_CASE("flags that go through a window give the bits of the CPU") {
  struct Case {
    const char* transport;
    bool reorder;
  };
  std::vector<Case> cases = {{"shm", false}, {"shm", true}};
  if (transport::libfabric_info(search()).found) cases.push_back({"libfabric", false});
  for (const Case& c : cases) {
    CAPTURE(c.transport);
    CAPTURE(c.reorder);
    Run cpu = run_group(4, 2, c.transport, "", c.reorder);
    long before = stand_in().stores();
    Run run = run_group(4, 2, c.transport, "device", c.reorder, std::vector<std::string>(4, stand_in().path));
    check_run(run, cpu, {"device", "device", "device", "device"});
    // Every rank has got chunks from the other node, and slots back, in both phases.
    CHECK(stand_in().stores() - before > 4 * kRounds);
  }
}

TEST_CASE("ranks of one node need no window, since kernels write all that kernels read") {
  Run cpu = run_group(2, 2, "none", "", false);
  long before = stand_in().stores();
  check_run(run_group(2, 2, "none", "device", false, {kAbsent, stand_in().path}), cpu, {"device", "device"});
  CHECK(stand_in().stores() == before);
}

TEST_CASE("a rank without GDRCopy keeps its node's flags in host memory, and no other's") {
  Run cpu = run_group(4, 2, "shm", "", false);
  long before = stand_in().stores();
  const std::string& path = stand_in().path;
  check_run(run_group(4, 2, "shm", "device", false, {path, kAbsent, path, path}), cpu,
            {"host", "host", "device", "device"});
  CHECK(stand_in().stores() > before);
  before = stand_in().stores();
  check_run(run_group(4, 2, "shm", "device", false, {path, path, runtime::kNoGdrcopy, path}), cpu,
            {"device", "device", "host", "host"});
  CHECK(stand_in().stores() > before);
}

TEST_CASE("where nothing can be pinned, or a window leads elsewhere, flags stay in host memory") {
  Run cpu = run_group(4, 2, "shm", "", false);
  long before = stand_in().stores();
  std::vector<std::string> hosts(4, "host");
  for (const char* fails : {"gdr_pin_buffer", "gdr_map", "elsewhere"}) {
    CAPTURE(fails);
    Failing failing(fails);
    check_run(run_group(4, 2, "shm", "device", false, std::vector<std::string>(4, stand_in().path)), cpu, hosts);
  }
  check_run(run_group(4, 2, "shm", "host", false, std::vector<std::string>(4, stand_in().path)), cpu, hosts);
  CHECK(stand_in().stores() == before);
}
