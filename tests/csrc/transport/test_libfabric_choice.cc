// What the libfabric rail decides from facts alone, EFA's included: no library, no device.
#include <doctest/doctest.h>

#include <algorithm>
#include <set>
#include <string>

#include "transport/libfabric_choice.h"
#include "transport/libfabric_memory.h"

#if MOE_EFA_HAVE_LIBFABRIC
#include <rdma/fi_endpoint.h>
#include <rdma/fi_ext.h>
#endif

using namespace moe_efa::transport;

namespace {

// As fi_info prints them on a host with two EFA NICs.
EndpointFacts efa(const std::string& fabric, int nic) {
  EndpointFacts facts;
  facts.provider = "efa";
  facts.fabric = fabric;
  facts.domain = "rdmap" + std::to_string(nic) + "s6-rdm";
  facts.consumes_receives = fabric == "efa-direct";
  facts.cq_data_bytes = 4;
  facts.tx_size = 4096;
  facts.rx_size = 8192;
  facts.max_write_bytes = 1 << 30;
  facts.rma_iov_limit = 1;
  return facts;
}

EndpointFacts software(const std::string& provider, const std::string& domain = "lo") {
  EndpointFacts facts = efa("", 0);
  facts.provider = provider;
  facts.fabric = "127.0.0.0/8";
  facts.domain = domain;
  facts.consumes_receives = false;
  facts.cq_data_bytes = 8;
  return facts;
}

RailNeeds needs() { return {2000, 64, 474 << 10, false}; }

// The entry that a configured name selects, by label and NIC; "" where nothing fits.
std::string choice(const std::string& configured, const std::vector<EndpointFacts>& present, std::size_t nic = 0) {
  for (const ProviderCandidate& candidate : provider_candidates(configured)) {
    const std::vector<std::size_t> found = nics_of(present, candidate);
    if (found.empty()) continue;
    const std::size_t index = chosen_by_nic(candidate.provider) ? nic : 0;
    if (index >= found.size()) return "no such NIC";
    return label_of(present[found[index]]) + " " + present[found[index]].domain;
  }
  return "";
}

bool mentions(const std::string& text, std::initializer_list<const char*> parts) {
  return std::all_of(parts.begin(), parts.end(),
                     [&](const char* part) { return text.find(part) != std::string::npos; });
}

const EndpointOption* find(const std::vector<EndpointOption>& options, int number) {
  for (const EndpointOption& option : options) {
    if (option.number == number) return &option;
  }
  return nullptr;
}

}  // namespace

TEST_CASE("efa-direct is taken where the library has it, the efa fabric where not, tcp where there is no device") {
  const std::vector<EndpointFacts> modern = {efa("efa-direct", 0), efa("efa-direct", 1), efa("efa", 0), efa("efa", 1),
                                             software("tcp")};
  const std::vector<EndpointFacts> shuffled = {software("tcp"), efa("efa", 0), efa("efa-direct", 0)};
  const std::vector<EndpointFacts> old = {efa("efa", 0), efa("efa", 1), software("net"), software("tcp;ofi_rxm")};
  CHECK(choice("", modern) == "efa-direct rdmap0s6-rdm");
  CHECK(choice("efa", modern) == "efa-direct rdmap0s6-rdm");
  CHECK(choice("efa", shuffled) == "efa-direct rdmap0s6-rdm");
  CHECK(choice("efa", old) == "efa rdmap0s6-rdm");
  CHECK(choice("efa-direct", old) == "");
  CHECK(choice("tcp", modern) == "tcp lo");
  CHECK(choice("tcp", old) == "net lo");
  CHECK(choice("", {software("tcp;ofi_rxm"), software("net")}) == "net lo");
  CHECK(choice("", {software("tcp;ofi_rxm")}) == "tcp;ofi_rxm lo");
  CHECK(choice("verbs", {software("verbs;ofi_rxm", "mlx5_0")}) == "verbs;ofi_rxm mlx5_0");
  CHECK(choice("psm3", {software("psm3", "p")}) == "psm3 p");
  CHECK(choice("", {}) == "");
}

TEST_CASE("each rail has an EFA NIC of its own, software endpoints share the first interface") {
  const std::vector<EndpointFacts> present = {efa("efa-direct", 0), efa("efa", 0),        efa("efa-direct", 1),
                                              efa("efa", 1),        efa("efa-direct", 0), software("tcp", "eth0"),
                                              software("tcp", "lo")};
  CHECK(nics_of(present, {"efa", "efa-direct"}) == std::vector<std::size_t>{0, 2});  // a NIC that is named twice is one
  CHECK(choice("efa", present, 1) == "efa-direct rdmap1s6-rdm");
  CHECK(choice("efa", present, 2) == "no such NIC");
  CHECK(nic_named(present, {0, 2}, "rdmap1s6") == 2);
  CHECK(nic_named(present, {0, 2}, "rdmap1s6-rdm") == 2);
  CHECK(nic_named(present, {0, 2}, "rdmap1s") == present.size());  // not a NIC's name, but how one begins
  CHECK(choice("tcp", present, 3) == "tcp eth0");
}

TEST_CASE("an endpoint that would silently do less is refused, with the numbers") {
  CHECK(unfit(efa("efa-direct", 0), needs()) == "");
  CHECK(unfit(efa("efa", 0), needs()) == "");
  CHECK(unfit(software("tcp"), needs()) == "");

  EndpointFacts facts = efa("efa-direct", 0);
  facts.cq_data_bytes = 2;
  CHECK(mentions(unfit(facts, needs()), {"immediates of 2 bytes", "4 are needed"}));
  facts = efa("efa-direct", 0);
  facts.foreign_mode = 1 << 4;
  CHECK(mentions(unfit(facts, needs()), {"modes 16"}));
  facts = efa("efa-direct", 0);
  facts.rma_iov_limit = 0;
  CHECK(mentions(unfit(facts, needs()), {"rma_iov_limit"}));
  facts = efa("efa-direct", 0);
  facts.tx_size = 0;
  CHECK(unfit(facts, needs()) != "");
  facts = efa("efa-direct", 0);
  facts.max_write_bytes = (474 << 10) - 1;
  CHECK(mentions(unfit(facts, needs()), {"485376", "485375", "chunk_rows"}));
  facts.max_write_bytes = 474 << 10;
  CHECK(unfit(facts, needs()) == "");
  RailNeeds gpu = needs();
  gpu.device_memory = true;
  CHECK(mentions(unfit(efa("efa-direct", 0), gpu), {"FI_HMEM", "buffers=\"host\""}));
  facts = efa("efa-direct", 0);
  facts.device_memory = true;
  CHECK(unfit(facts, gpu) == "");
}

TEST_CASE("posted receives cover all immediates that may come, or construction fails (I12)") {
  RailNeeds many = needs();
  many.max_remote_events = 8192;
  const EndpointFacts direct = efa("efa-direct", 0);
  CHECK(posted_receives(direct, many) == 8192);
  CHECK(unfit(direct, many) == "");
  many.max_remote_events = 8193;
  CHECK(mentions(unfit(direct, many), {"8193", "8192", "slots", "memory_budget_bytes"}));
  CHECK(posted_receives(software("tcp"), many) == 0);  // its immediates take none
  CHECK(unfit(software("tcp"), many) == "");
  CHECK(completion_entries(direct, many) == 8193 + 64);
  EndpointFacts shallow = direct;
  shallow.tx_size = 16;
  CHECK(outstanding_writes(shallow, many) == 16);
  CHECK(completion_entries(shallow, many) == 8193 + 16);
  many.max_outstanding = 0;
  CHECK(outstanding_writes(direct, many) == 1);
}

TEST_CASE("EFA gets the interface whose rules were reviewed, where the library has it") {
  CHECK(api_version_for("tcp", {2, 6}) == ApiVersion{1, 17});
  CHECK(api_version_for("", {2, 6}) == ApiVersion{1, 17});
  CHECK(api_version_for("efa", {2, 6}) == ApiVersion{1, 22});
  CHECK(api_version_for("efa", {1, 22}) == ApiVersion{1, 22});
  CHECK(api_version_for("efa", {1, 18}) == ApiVersion{1, 18});
  CHECK(takes_dmabuf("efa", {2, 6}));
  CHECK(takes_dmabuf("efa", {1, 20}));
  CHECK_FALSE(takes_dmabuf("efa", {1, 19}));
  CHECK_FALSE(takes_dmabuf("verbs;ofi_rxm", {2, 6}));
}

TEST_CASE("EFA endpoints share no memory, take receives as credits, wait for receivers and use the device") {
  for (const char* fabric : {"efa-direct", "efa"}) {
    CAPTURE(fabric);
    const std::vector<EndpointOption> options = efa_options(efa(fabric, 0), needs());
    for (int number : {kOptSharedMemoryPermitted, kOptEfaUnsolicitedWriteRecv}) {
      const EndpointOption* option = find(options, number);
      REQUIRE(option != nullptr);
      CHECK(option->is_bool);
      CHECK(option->value == 0);
      CHECK(option->required_for == nullptr);
    }
    REQUIRE(find(options, kOptEfaRnrRetry) != nullptr);
    CHECK(find(options, kOptEfaRnrRetry)->value == 7);
    CHECK_FALSE(find(options, kOptEfaRnrRetry)->is_bool);
    // Refused by a library without CUDA, and not needed for host memory.
    CHECK(find(options, kOptCudaApiPermitted) == nullptr);
    CHECK((find(options, kOptEfaUseDeviceRdma) != nullptr) == (std::string(fabric) == "efa"));
    RailNeeds gpu = needs();
    gpu.device_memory = true;
    const std::vector<EndpointOption> for_gpu = efa_options(efa(fabric, 0), gpu);
    const EndpointOption* cuda = find(for_gpu, kOptCudaApiPermitted);
    REQUIRE(cuda != nullptr);
    CHECK(cuda->value == 0);
    CHECK(cuda->required_for != nullptr);
  }
}

TEST_CASE("the device's error codes are explained") {
  CHECK(mentions(efa_status_text(7), {"registered"}));
  CHECK(mentions(efa_status_text(9), {"process"}));
  CHECK(mentions(efa_status_text(13), {"no longer"}));
  CHECK(mentions(efa_status_text(14), {"address"}));
  CHECK(mentions(efa_status_text(15), {"security group"}));
  CHECK(mentions(efa_status_text(4100), {"provider"}));
  std::set<std::string> texts;
  for (int status : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 18, 4096})
    texts.insert(efa_status_text(status));
  CHECK(texts.size() == 17);
  CHECK(texts.count("") == 0);
  for (int status : {0, 16, 99, -5}) CHECK(efa_status_text(status) == "");
}

#if MOE_EFA_HAVE_LIBFABRIC

TEST_CASE("options that these headers know have their numbers") {
  CHECK(kOptEfaRnrRetry == FI_OPT_EFA_RNR_RETRY);
  CHECK(kOptTxSize == FI_OPT_TX_SIZE);
  CHECK(kOptCudaApiPermitted == FI_OPT_XPU_TRIGGER + 1);  // the next that was appended
}

TEST_CASE("host memory, GPU memory by address and GPU memory as a dma-buf are described to fi_mr_regattr") {
  static char memory[4096];
  const Registration host(memory, 4096, FI_REMOTE_WRITE, 77, {});
  CHECK(host.flags() == 0);
  CHECK(host.attributes().iface == FI_HMEM_SYSTEM);
  CHECK(host.attributes().iov_count == 1);
  CHECK(host.attributes().mr_iov->iov_base == memory);
  CHECK(host.attributes().mr_iov->iov_len == 4096);
  CHECK(host.attributes().access == FI_REMOTE_WRITE);
  CHECK(host.attributes().requested_key == 77);

  MemoryDescriptor gpu;
  gpu.kind = MemoryDescriptor::Kind::kCuda;
  gpu.device = 3;
  const Registration by_address(memory, 4096, FI_REMOTE_WRITE, 77, gpu);
  CHECK(by_address.flags() == 0);
  CHECK(by_address.attributes().iface == FI_HMEM_CUDA);
  CHECK(by_address.attributes().device.cuda == 3);
  CHECK(by_address.attributes().mr_iov->iov_base == memory);

  gpu.dmabuf_fd = 9;
  gpu.dmabuf_offset = 512;
  const Registration by_dmabuf(memory, 4096, FI_REMOTE_WRITE, 77, gpu);
  CHECK(by_dmabuf.flags() == 1ull << 40);
  CHECK(by_dmabuf.attributes().device.cuda == 3);
  const auto* range = reinterpret_cast<const DmabufRange*>(by_dmabuf.attributes().mr_iov);
  CHECK(range->fd == 9);
  CHECK(range->offset == 512);
  CHECK(range->length == 4096);
  CHECK(range->base == memory);
}

#endif  // MOE_EFA_HAVE_LIBFABRIC
