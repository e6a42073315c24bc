#include "transport/libfabric_choice.h"

#include <algorithm>
#include <set>

namespace moe_efa::transport {

std::vector<ProviderCandidate> provider_candidates(const std::string& configured) {
  if (configured.empty()) {
    std::vector<ProviderCandidate> all = provider_candidates("efa");
    for (ProviderCandidate& candidate : provider_candidates("tcp")) all.push_back(std::move(candidate));
    return all;
  }
  // One libfabric call per device command, no emulation; the `efa` fabric is the fallback of older libraries.
  if (configured == "efa") return {{"efa", "efa-direct"}, {"efa", "efa"}};
  if (configured == "efa-direct") return {{"efa", "efa-direct"}};
  // Native reliable datagrams are `tcp` in 2.x and `net` in 1.17, whose `tcp` has connections only.
  if (configured == "tcp") return {{"tcp", ""}, {"net", ""}, {"tcp;ofi_rxm", ""}};
  if (configured == "verbs") return {{"verbs;ofi_rxm", ""}};
  return {{configured, ""}};
}

bool is_efa(const std::string& provider) { return provider == "efa"; }

bool is_efa_direct(const EndpointFacts& facts) { return is_efa(facts.provider) && facts.fabric == "efa-direct"; }

bool chosen_by_nic(const std::string& provider) {
  return is_efa(provider) || provider.find("verbs") != std::string::npos;
}

std::string label_of(const EndpointFacts& facts) { return is_efa(facts.provider) ? facts.fabric : facts.provider; }

std::vector<std::size_t> nics_of(const std::vector<EndpointFacts>& facts, const ProviderCandidate& candidate) {
  std::vector<std::size_t> found;
  std::set<std::string> names;
  for (std::size_t i = 0; i < facts.size(); ++i) {
    if (candidate.matches(facts[i]) && names.insert(facts[i].domain).second) found.push_back(i);
  }
  return found;
}

std::size_t nic_named(const std::vector<EndpointFacts>& facts, const std::vector<std::size_t>& found,
                      const std::string& name) {
  for (std::size_t place : found) {
    const std::string& domain = facts[place].domain;
    if (domain == name || domain.compare(0, name.size() + 1, name + "-") == 0) return place;
  }
  return facts.size();
}

std::string unfit(const EndpointFacts& facts, const RailNeeds& needs) {
  if (facts.foreign_mode != 0) {
    return "it asks for modes " + std::to_string(facts.foreign_mode) + " of its application, which are not supported";
  }
  if (facts.cq_data_bytes < sizeof(std::uint32_t)) {
    return "immediates of " + std::to_string(facts.cq_data_bytes) + " bytes, 4 are needed";
  }
  if (facts.rma_iov_limit < 1) return "it cannot write to remote memory (rma_iov_limit 0)";
  if (needs.device_memory && !facts.device_memory) {
    return "it cannot reach device memory (FI_HMEM): keep the slots in host memory (buffers=\"host\")";
  }
  if (facts.tx_size < 1) return "a send queue of length 0";
  const std::uint64_t receives = posted_receives(facts, needs);
  if (receives > facts.rx_size) {
    return "up to " + std::to_string(receives) +
           " immediates may be on their way to this rank at a time, each takes a posted receive, and the NIC's receive"
           " queue holds " +
           std::to_string(facts.rx_size) + ": use fewer slots per ring (`slots`, memory_budget_bytes) or fewer nodes";
  }
  if (facts.max_write_bytes < needs.max_write_bytes) {
    return "chunks of up to " + std::to_string(needs.max_write_bytes) + " bytes, one write takes at most " +
           std::to_string(facts.max_write_bytes) + ": use fewer rows per chunk (`chunk_rows`)";
  }
  return "";
}

std::uint64_t outstanding_writes(const EndpointFacts& facts, const RailNeeds& needs) {
  return std::min(std::max<std::uint64_t>(needs.max_outstanding, 1), facts.tx_size);
}

std::uint64_t posted_receives(const EndpointFacts& facts, const RailNeeds& needs) {
  return facts.consumes_receives ? needs.max_remote_events : 0;
}

std::uint64_t completion_entries(const EndpointFacts& facts, const RailNeeds& needs) {
  return needs.max_remote_events + outstanding_writes(facts, needs);
}

ApiVersion api_version_for(const std::string& provider, ApiVersion library) {
  constexpr ApiVersion kHeaders{1, 17}, kEfa{1, 22};
  if (!is_efa(provider)) return kHeaders;
  const bool older = library.major == kEfa.major && library.minor < kEfa.minor;
  return older ? library : kEfa;
}

bool takes_dmabuf(const std::string& provider, ApiVersion library) {
  const ApiVersion asked = api_version_for(provider, library);
  return asked.major > 1 || asked.minor >= 20;
}

std::vector<EndpointOption> efa_options(const EndpointFacts& facts, const RailNeeds& needs) {
  std::vector<EndpointOption> options;
  // Ordering, progress and the consequences of a death would be those of another provider. Libraries that do not know
  // it are told by FI_EFA_ENABLE_SHM_TRANSFER when they are loaded.
  options.push_back({"FI_OPT_SHARED_MEMORY_PERMITTED", kOptSharedMemoryPermitted, true, false, nullptr});
  // Refused by the `efa` fabric where there is no CUDA, so it is asked only where device memory is.
  if (needs.device_memory) {
    options.push_back(
        {"FI_OPT_CUDA_API_PERMITTED", kOptCudaApiPermitted, true, false,
         "writing between GPU memory and the NIC without copies (peer to peer; otherwise buffers=\"host\")"});
  }
  // Unsolicited, nothing would push back when the completion queue overruns; posted receives do. `efa-direct` allows it
  // to an endpoint with FI_RX_CQ_DATA only; without, the queue's length alone bounds what may come (I12).
  options.push_back({"FI_OPT_EFA_USE_UNSOLICITED_WRITE_RECV", kOptEfaUnsolicitedWriteRecv, true, false, nullptr});
  // A write that finds no receive waits in the NIC until there is one.
  options.push_back({"FI_OPT_EFA_RNR_RETRY", kOptEfaRnrRetry, false, kRnrRetryForever, nullptr});
  // Whether it took is asserted when the endpoint is open.
  if (!is_efa_direct(facts)) {
    options.push_back({"FI_OPT_EFA_USE_DEVICE_RDMA", kOptEfaUseDeviceRdma, true, true, nullptr});
  }
  return options;
}

std::string efa_status_text(int prov_errno) {
  switch (prov_errno) {
    case 1:
      return "flushed: the endpoint was closed or had failed before";
    case 2:
      return "the queue pair broke down";
    case 3:
      return "the device does not support this operation";
    case 4:
      return "the address handle is not valid";
    case 5:
      return "the local memory is not registered with this NIC";
    case 6:
      return "the write is longer than the device takes";
    case 7:
      return "the remote memory is not registered there, or no longer: has the peer closed?";
    case 8:
      return "the peer aborted the connection";
    case 9:
      return "the peer's queue pair is gone: its process has ended or closed";
    case 10:
      return "the peer had no receive posted";
    case 11:
      return "the peer's receive is too short";
    case 12:
      return "the peer's NIC answered something unexpected";
    case 13:
      return "the peer's NIC answered before and does no longer: host or network down";
    case 14:
      return "the peer does not know this rank's address: it had not inserted it before the first write";
    case 15:
      return "the peer's NIC never answered: does the security group allow all traffic to and from itself?";
    case 18:
      return "the NICs differ in features";
    default:
      return prov_errno >= 4096 ? "an error of the libfabric provider, not of the device" : "";
  }
}

}  // namespace moe_efa::transport
