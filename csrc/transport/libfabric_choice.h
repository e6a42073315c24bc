// The decisions of the libfabric rail, as functions of plain facts: which provider, fabric and NIC, whether an endpoint
// can carry the rail, how many receives it needs, which options EFA wants, what its error codes say. Calls nothing of
// libfabric and compiles without its headers, so all of it is tested without a device. Sources: README.md beside this.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace moe_efa::transport {

// What fi_getinfo says of one endpoint.
struct EndpointFacts {
  std::string provider;
  std::string fabric;
  std::string domain;              // the NIC
  bool consumes_receives = false;  // FI_RX_CQ_DATA: every immediate takes a posted receive
  std::uint64_t foreign_mode = 0;  // demands on the application that this rail does not meet
  bool device_memory = false;      // FI_HMEM
  std::uint64_t cq_data_bytes = 0;
  std::uint64_t tx_size = 0, rx_size = 0;
  std::uint64_t max_write_bytes = 0;  // by fi_getinfo; the opened endpoint may know better
  std::uint64_t rma_iov_limit = 0;
};

// What a rail needs.
struct RailNeeds {
  std::uint64_t max_remote_events = 0;
  std::uint64_t max_outstanding = 0;
  std::uint64_t max_write_bytes = 0;
  bool device_memory = false;
};

struct ProviderCandidate {
  std::string provider;
  std::string fabric;  // empty: any

  std::string name() const { return fabric.empty() ? provider : fabric; }
  bool matches(const EndpointFacts& facts) const {
    return facts.provider == provider && (fabric.empty() || facts.fabric == fabric);
  }
};

// What a configured name stands for, in order of preference; "" is the best present.
std::vector<ProviderCandidate> provider_candidates(const std::string& configured);

bool is_efa(const std::string& provider);
bool is_efa_direct(const EndpointFacts& facts);
// One rail has a NIC for itself; software endpoints share an interface.
bool chosen_by_nic(const std::string& provider);
// Equal on ranks that can talk: the provider's name, "efa-direct" for the fabric of that name.
std::string label_of(const EndpointFacts& facts);

// Places in `facts` of the candidate's NICs, one each, in the provider's order.
std::vector<std::size_t> nics_of(const std::vector<EndpointFacts>& facts, const ProviderCandidate& candidate);

// The one of `found` whose domain belongs to the device `name`: its name alone or with a suffix, as efa's
// "rdmap0s6-rdm". facts.size() if there is none.
std::size_t nic_named(const std::vector<EndpointFacts>& facts, const std::vector<std::size_t>& found,
                      const std::string& name);

// Why an endpoint cannot carry the rail, with the numbers; empty if it can.
std::string unfit(const EndpointFacts& facts, const RailNeeds& needs);

// Writes that may be in flight, receives to post before any peer may write (they are its credits, I12), and the length
// of the completion queue.
std::uint64_t outstanding_writes(const EndpointFacts& facts, const RailNeeds& needs);
std::uint64_t posted_receives(const EndpointFacts& facts, const RailNeeds& needs);
std::uint64_t completion_entries(const EndpointFacts& facts, const RailNeeds& needs);

// The libfabric API version to ask for: software providers get that of the headers; EFA's rules for device memory and
// RDMA depend on it, and are those of 1.22 where the library has it.
struct ApiVersion {
  std::uint32_t major = 1, minor = 17;
  bool operator==(const ApiVersion&) const = default;
};
ApiVersion api_version_for(const std::string& provider, ApiVersion library);
// May device memory be registered as a dma-buf? Else by its address.
bool takes_dmabuf(const std::string& provider, ApiVersion library);

// Endpoint options, set before the endpoint is enabled. The numbers are libfabric's ABI; headers of 1.17 lack most.
inline constexpr int kOptTxSize = 6;                                     // size_t
inline constexpr int kOptCudaApiPermitted = 10;                          // bool
inline constexpr int kOptSharedMemoryPermitted = 11;                     // bool
inline constexpr int kOptMaxRmaSize = 14;                                // size_t
inline constexpr int kOptEfaRnrRetry = -(0xefa << 16);                   // size_t
inline constexpr int kOptEfaEmulatedWrite = kOptEfaRnrRetry + 2;         // bool
inline constexpr int kOptEfaUseDeviceRdma = kOptEfaRnrRetry + 4;         // bool
inline constexpr int kOptEfaUnsolicitedWriteRecv = kOptEfaRnrRetry + 8;  // bool
inline constexpr std::size_t kRnrRetryForever = 7;

struct EndpointOption {
  const char* name;
  int number;
  bool is_bool;
  std::size_t value;
  const char* required_for;  // nullptr: a refusal is no failure; else what cannot be done without it
};
std::vector<EndpointOption> efa_options(const EndpointFacts& facts, const RailNeeds& needs);

// What the EFA device or provider means by fi_cq_err_entry.prov_errno, and what to look at; empty for unknown numbers.
std::string efa_status_text(int prov_errno);

}  // namespace moe_efa::transport
