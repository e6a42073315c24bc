// Provider selection: the names under which one thing goes in different libfabric versions are known here only.
#include "transport/libfabric_provider.h"

#include "common/status.h"

#if MOE_EFA_HAVE_LIBFABRIC
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>

#include <algorithm>
#include <cstring>
#include <utility>
#endif

namespace moe_efa::transport {

#if !MOE_EFA_HAVE_LIBFABRIC

std::vector<std::string> available_providers(const LibfabricSearch&) { return {}; }
std::vector<std::string> available_nics(const LibfabricSearch&, const std::string&) { return {}; }
std::string default_provider(const LibfabricSearch&) { return ""; }

#else

namespace {

using common::Status;
using common::StatusCode;
using common::StatusError;

constexpr std::uint64_t kModes = FI_CONTEXT | FI_CONTEXT2 | FI_RX_CQ_DATA;  // what this rail can live with

bool speaks_ip(const std::string& provider) {
  return provider.find("tcp") != std::string::npos || provider == "net" || provider == "sockets" ||
         provider.find("udp") != std::string::npos;
}

const char* text(const char* string) { return string != nullptr ? string : ""; }

EndpointFacts facts_of(const fi_info& info) {
  const std::uint64_t mode = info.mode | info.tx_attr->mode | info.rx_attr->mode | info.domain_attr->mode;
  EndpointFacts facts;
  facts.provider = text(info.fabric_attr->prov_name);
  facts.fabric = text(info.fabric_attr->name);
  facts.domain = text(info.domain_attr->name);
  facts.consumes_receives = (mode & FI_RX_CQ_DATA) != 0;
  facts.foreign_mode = mode & ~kModes;
  facts.device_memory = (info.caps & FI_HMEM) != 0;
  facts.cq_data_bytes = info.domain_attr->cq_data_size;
  facts.tx_size = info.tx_attr->size;
  facts.rx_size = info.rx_attr->size;
  facts.max_write_bytes = info.ep_attr->max_msg_size;
  facts.rma_iov_limit = info.tx_attr->rma_iov_limit;
  return facts;
}

std::vector<const fi_info*> entries_of(const InfoPtr& list) {
  std::vector<const fi_info*> entries;
  for (const fi_info* info = list.get(); info != nullptr; info = info->next) entries.push_back(info);
  return entries;
}

std::vector<EndpointFacts> facts_of(const std::vector<const fi_info*>& entries) {
  std::vector<EndpointFacts> facts;
  for (const fi_info* info : entries) facts.push_back(facts_of(*info));
  return facts;
}

// Everything that could carry a rail; with a provider's name only that provider is asked (a full scan takes 0.3 s).
InfoPtr query(const LibfabricApi& api, const std::string& provider, const std::string& source_address,
              bool device_memory = false) {
  InfoPtr hints(api.dupinfo(nullptr), FreeInfo{&api});
  hints->caps = FI_MSG | FI_RMA;
  // `efa-direct` demands FI_CONTEXT2; FI_RX_CQ_DATA makes posted receives its credits.
  hints->mode = kModes;
  hints->ep_attr->type = FI_EP_RDM;
  hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_ENDPOINT;
  if (device_memory) {
    hints->caps |= FI_HMEM;
    hints->domain_attr->mr_mode |= FI_MR_HMEM;
  }
  hints->domain_attr->threading = FI_THREAD_DOMAIN;
  hints->domain_attr->cq_data_size = sizeof(std::uint32_t);
  const char* node = nullptr;
  if (!provider.empty()) {
    hints->fabric_attr->prov_name = ::strdup(provider.c_str());  // freeinfo frees it
    // Without it these providers report success for data that they dropped.
    if (!is_efa(provider)) hints->tx_attr->op_flags = FI_DELIVERY_COMPLETE;
    if (speaks_ip(provider)) {
      hints->addr_format = FI_SOCKADDR_IN;
      if (!source_address.empty()) node = source_address.c_str();
    }
  }
  const ApiVersion version = api_version_for(provider, {FI_MAJOR(api.version), FI_MINOR(api.version)});
  fi_info* list = nullptr;
  const std::uint64_t flags = node != nullptr ? FI_SOURCE : 0;
  if (api.getinfo(FI_VERSION(version.major, version.minor), node, flags, hints.get(), &list) != 0) list = nullptr;
  return InfoPtr(list, FreeInfo{&api});
}

[[noreturn]] void throw_config(const std::string& message) {
  Status status;
  status.code = StatusCode::kConfig;
  status.message = message;
  throw StatusError(std::move(status));
}

}  // namespace

ProviderChoice choose_provider(const LibfabricApi& api, const LibfabricRailConfig& config) {
  const std::string where = "rail " + std::to_string(config.rail_index);
  const std::string library = "libfabric " + api.version_text() + " (" + api.path + ")";
  InfoPtr list(nullptr, FreeInfo{&api});
  // Measured: 1.17 never completes a write, 2.x crashes inside one process, neither notices a bad key or a death.
  if (config.provider == "shm") {
    throw_config(where + ": libfabric's shm provider is not reliable enough; use the library's own shared memory");
  }
  const bool device_memory = config.slots.kind != MemoryDescriptor::Kind::kSystem;
  std::string queried, tried;
  std::vector<const fi_info*> entries;
  std::vector<EndpointFacts> facts;
  for (const ProviderCandidate& candidate : provider_candidates(config.provider)) {
    if (queried != candidate.provider) {
      list = query(api, candidate.provider, config.source_address, device_memory);
      entries = entries_of(list);
      facts = facts_of(entries);
      queried = candidate.provider;
    }
    tried += tried.empty() ? candidate.name() : ", " + candidate.name();
    const std::vector<std::size_t> found = nics_of(facts, candidate);
    if (found.empty()) continue;
    const std::size_t nic = chosen_by_nic(candidate.provider) ? config.nic_index : 0;
    std::size_t place = nic < found.size() ? found[nic] : facts.size();
    if (!config.nic_name.empty()) place = nic_named(facts, found, config.nic_name);
    if (place == facts.size()) {
      const std::string wanted = config.nic_name.empty() ? std::to_string(nic) : config.nic_name;
      throw_config(where + ": NIC " + wanted + " asked for, but " + candidate.name() + " of " + library + " has " +
                   std::to_string(found.size()) + (config.nic_name.empty() ? "" : " others"));
    }
    ProviderChoice choice;
    choice.info = InfoPtr(api.dupinfo(entries[place]), FreeInfo{&api});
    choice.facts = facts[place];
    return choice;
  }
  std::string source = config.source_address.empty() ? "" : " at source address " + config.source_address;
  throw_config(where + ": no provider for reliable datagrams with RDMA write" +
               (device_memory ? " from and to GPU memory (FI_HMEM)" : "") + source + " in " + library +
               "; tried: " + tried + (device_memory ? "; or keep the slots in host memory (buffers=\"host\")" : ""));
}

std::vector<std::string> available_providers(const LibfabricSearch& search) {
  std::vector<std::string> names;
  if (!libfabric_info(search).found) return names;
  InfoPtr list = query(load_libfabric(search), "", "");
  for (const EndpointFacts& facts : facts_of(entries_of(list))) {
    const std::string name = label_of(facts);
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  return names;
}

std::string default_provider(const LibfabricSearch& search) {
  if (!libfabric_info(search).found) return "";
  LibfabricRailConfig config;
  config.search = search;
  try {
    return label_of(choose_provider(load_libfabric(search), config).facts);
  } catch (const StatusError&) {
    return "";
  }
}

std::vector<std::string> available_nics(const LibfabricSearch& search, const std::string& provider) {
  std::vector<std::string> names;
  if (!libfabric_info(search).found) return names;
  const LibfabricApi& api = load_libfabric(search);
  for (const ProviderCandidate& candidate : provider_candidates(provider)) {
    InfoPtr list = query(api, candidate.provider, "");
    const std::vector<EndpointFacts> facts = facts_of(entries_of(list));
    for (std::size_t nic : nics_of(facts, candidate)) names.push_back(facts[nic].domain);
    if (!names.empty()) break;
  }
  return names;
}

#endif  // MOE_EFA_HAVE_LIBFABRIC

}  // namespace moe_efa::transport
