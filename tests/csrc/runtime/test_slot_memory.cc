// Groups whose slots lie in memory of a device (one of host memory, which the calls of the CPU can use): the same bits
// as with slots in the region, over every transport; and what does not fit together is refused with its cure.
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "device_rounds.h"
#include "runtime/address.h"
#include "runtime/group.h"
#include "runtime/slot_memory.h"
#include "transport/libfabric_loader.h"

using namespace moe_efa;
using namespace moe_efa::testing;
using common::StatusCode;
using common::StatusError;

namespace {

StatusCode code_of(const std::function<void()>& body, std::string* message) {
  message->clear();
  try {
    body();
  } catch (const StatusError& error) {
    *message = error.what();
    return error.status().code;
  }
  return StatusCode::kOk;
}

}  // namespace

TEST_CASE("slots of a device give the same bits as slots of the region") {
  struct Case {
    std::uint32_t num_ranks, node_size;
    std::string transport;
    bool reorder = false;
  };
  std::vector<Case> cases = {{4, 2, "shm"}, {4, 2, "shm", true}, {2, 2, "none"}};
  if (transport::libfabric_info(search()).found) cases.push_back({4, 2, "libfabric"});
  for (const Case& c : cases) {
    CAPTURE(c.transport);
    CAPTURE(c.reorder);
    Run cpu = run_group(c.num_ranks, c.node_size, c.transport, "", c.reorder);
    Run host = run_group(c.num_ranks, c.node_size, c.transport, "host", c.reorder);
    Run device = run_group(c.num_ranks, c.node_size, c.transport, "device", c.reorder);
    CHECK_MESSAGE(cpu.failure.empty(), cpu.failure);
    CHECK_MESSAGE(host.failure.empty(), host.failure);
    CHECK_MESSAGE(device.failure.empty(), device.failure);
    std::size_t imports = c.node_size - 1 + (c.transport == "shm" ? c.num_ranks / c.node_size - 1 : 0);
    for (std::uint32_t rank = 0; rank < c.num_ranks; ++rank) {
      CHECK(cpu.results[rank] == device.results[rank]);
      CHECK(cpu.results[rank] == host.results[rank]);
      CHECK(!device.results[rank].rows.empty());
      CHECK(host.flags[rank] == "host");
      CHECK((device.flags[rank] == "device") == (c.transport == "none"));  // without a driver, kernels write all
      CHECK(host.devices[rank]->imports() == 0);
      CHECK(host.devices[rank]->flushes() == 0);
      CHECK(static_cast<std::size_t>(device.devices[rank]->imports()) == imports);
      CHECK((device.devices[rank]->flushes() > 0) == (c.transport != "none"));
      CHECK(device.devices[rank]->num_mappings() == 0);  // all given back
    }
  }
}

TEST_CASE("auto takes the memory of a device where NICs, mates and kernels reach it without a flush") {
  auto choose = [](std::uint32_t node_size, const std::string& transport, auto change) {
    EmulatedDevice device(true);
    kernels::DeviceFacts& facts = device.change_facts();
    facts.dma_buf = true;
    facts.flushes_writes = false;
    GroupConfig config = config_of(0, 4, node_size, transport, "auto", "");
    if (transport == "libfabric") config.provider = "efa";
    change(config, facts);
    return runtime::choose_buffers(config, &device);
  };
  auto as_it_is = [](GroupConfig&, kernels::DeviceFacts&) {};
  auto flushes = [](GroupConfig&, kernels::DeviceFacts& facts) { facts.flushes_writes = true; };
  CHECK(choose(2, "libfabric", as_it_is) == "device");
  // A flush may wait for the very kernels that wait for what is flushed.
  CHECK(choose(2, "libfabric", flushes) == "host");
  CHECK(choose(2, "libfabric", [](GroupConfig&, kernels::DeviceFacts& facts) { facts.sees_writes = false; }) == "host");
  CHECK(choose(2, "libfabric", [](GroupConfig&, kernels::DeviceFacts& facts) { facts.dma_buf = false; }) == "host");
  CHECK(choose(2, "libfabric", [](GroupConfig& config, kernels::DeviceFacts&) { config.provider = "tcp"; }) == "host");
  CHECK(choose(2, "shm", as_it_is) == "host");
  CHECK(choose(4, "none", flushes) == "device");  // no NIC writes
  CHECK(choose(4, "none", [](GroupConfig&, kernels::DeviceFacts& facts) { facts.shares_memory = false; }) == "host");
}

TEST_CASE("the memory of a device is shared with another process, and the segment is no larger than it need be") {
  GroupConfig config = config_of(0, 2, 2, "none", "device", unique_key());
  runtime::Sizing sizing = runtime::choose_layout(config);
  proto::RegionLayout layout(sizing.layout, 0);
  auto device = std::make_shared<EmulatedDevice>(true);
  Group group(config, device);
  runtime::Address address = runtime::Address::decode(group.address());
  CHECK(address.segment_bytes == layout.slots_begin());
  CHECK(sizing.region_bytes == layout.total_bytes());
  REQUIRE(!address.slots.empty());
  auto probe = [&](EmulatedDevice& other, int value) {
    auto* bytes = static_cast<unsigned char*>(other.import_memory(address.slots));
    std::uint64_t last = layout.total_bytes() - layout.slots_begin() - 1;
    int found = bytes[last];
    bytes[last] = static_cast<unsigned char>(value);
    other.close_memory(bytes);
    return found;
  };
  pid_t child = fork();
  if (child == 0) {
    EmulatedDevice other(true);
    _exit(probe(other, 7) == 0 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WEXITSTATUS(status) == 0);
  EmulatedDevice here(true);
  CHECK(probe(here, 0) == 7);
}

TEST_CASE("what does not fit together is refused, and the text says what to do") {
  std::string message;
  auto code = [&](GroupConfig config, std::shared_ptr<EmulatedDevice> device) {
    return code_of([&] { Group group(config, device); }, &message);
  };
  auto says = [&](const char* text) { return message.find(text) != std::string::npos; };
  GroupConfig config = config_of(0, 4, 2, "shm", "device", unique_key());
  CHECK(code(config, nullptr) == StatusCode::kConfig);
  CHECK(says("buffers=\"host\""));
  config.buffers = "gpu";
  CHECK(code(config, std::make_shared<EmulatedDevice>(true)) == StatusCode::kConfig);
  CHECK(says("\"host\" or \"device\""));
  config.buffers = "device";
  auto lonely = std::make_shared<EmulatedDevice>(true);
  lonely->change_facts().shares_memory = false;
  CHECK(code(config, lonely) == StatusCode::kConfig);
  CHECK(says("buffers=\"host\""));
  auto cuda = std::make_shared<EmulatedDevice>(true);
  cuda->change_facts().kind = "cuda";
  CHECK(code(config, cuda) == StatusCode::kConfig);  // the CPU copies
  CHECK(says("buffers=\"host\""));
  CHECK(cuda->num_mappings() == 0);
  auto blind = std::make_shared<EmulatedDevice>(true);
  blind->change_facts().sees_writes = false;
  config.transport = "libfabric";
  CHECK(code(config, blind) == StatusCode::kConfig);
  CHECK(says("may not see"));
  CHECK(says("buffers=\"host\""));
  if (transport::libfabric_info(search()).found) {
    config.provider = "tcp";
    CHECK(code(config, cuda) == StatusCode::kConfig);
    CHECK(says("FI_HMEM"));
    CHECK(says("buffers=\"host\""));
    CHECK(cuda->num_mappings() == 0);
    CHECK(code(config, std::make_shared<EmulatedDevice>(true)) == StatusCode::kOk);
  }
}

TEST_CASE("all ranks have their slots in the same kind of memory") {
  std::string key = unique_key(), message;
  auto device = std::make_shared<EmulatedDevice>(true);
  Group host(config_of(0, 2, 2, "none", "host", key)), apart(config_of(1, 2, 2, "none", "device", key), device);
  std::vector<std::string> addresses = {host.address(), apart.address()};
  CHECK(code_of([&] { host.connect(addresses); }, &message) == StatusCode::kConfig);
  CHECK(message.find("differs between rank 0 and rank 1") != std::string::npos);
  CHECK(code_of([&] { apart.connect(addresses); }, &message) == StatusCode::kConfig);
}

TEST_CASE("an address comes back as it was, and damaged ones are refused") {
  runtime::Address address;
  address.rank = 3;
  address.layout_hash = 77;
  address.host = "10.0.0.1";
  address.port = 4711;
  address.segment = "moe_efa-x";
  address.segment_bytes = 1 << 20;
  address.slots = std::string("any\0bytes", 9);
  address.kernel_words = true;
  address.rails = {{std::byte{1}, std::byte{2}}, {}};
  const std::string good = address.encode();
  runtime::Address back = runtime::Address::decode(good);
  CHECK(back.encode() == good);
  CHECK(back.slots == address.slots);
  CHECK(back.kernel_words);
  CHECK(back.rails == address.rails);
  std::string message;
  auto refused = [&](const std::string& bytes) {
    return code_of([&] { runtime::Address::decode(bytes); }, &message) == StatusCode::kConfig;
  };
  for (std::size_t end = 0; end < good.size(); ++end) CHECK(refused(good.substr(0, end)));
  CHECK(refused(good + '\0'));
  std::uint32_t state = 1;
  for (int i = 0; i < 2000; ++i) {  // never a crash, nor memory for lengths that cannot be
    std::string bad = good;
    state = state * 1664525u + 1013904223u;
    bad[(state >> 8) % bad.size()] = static_cast<char>(state >> 24);
    code_of([&] { runtime::Address::decode(bad); }, &message);
  }
  address.slots.assign(5000, 'x');
  CHECK(refused(address.encode()));
}
