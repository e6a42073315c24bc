// Provider selection: the names under which one thing goes in different libfabric versions are known here only.
#include "transport/libfabric_provider.h"

#include "common/status.h"

#if MOE_EFA_HAVE_LIBFABRIC
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>
#endif

namespace moe_efa::transport {

#if !MOE_EFA_HAVE_LIBFABRIC

std::vector<std::string> available_providers(const LibfabricSearch&) { return {}; }
std::vector<std::string> available_nics(const LibfabricSearch&, const std::string&) { return {}; }

#else

namespace {

using common::Status;
using common::StatusCode;
using common::StatusError;

struct Candidate {
  const char* provider;
  const char* fabric;  // nullptr: any
};

// In order of preference.
std::vector<Candidate> candidates(const std::string& provider) {
  if (provider.empty()) {
    std::vector<Candidate> all = candidates("efa");
    for (const Candidate& candidate : candidates("tcp")) all.push_back(candidate);
    return all;
  }
  // One libfabric call per device command, no emulation; the `efa` fabric is the fallback of older libraries.
  if (provider == "efa") return {{"efa", "efa-direct"}, {"efa", "efa"}};
  if (provider == "efa-direct") return {{"efa", "efa-direct"}};
  // Native reliable datagrams are `tcp` in 2.x and `net` in 1.17, whose `tcp` has connections only.
  if (provider == "tcp") return {{"tcp", nullptr}, {"net", nullptr}, {"tcp;ofi_rxm", nullptr}};
  if (provider == "verbs") return {{"verbs;ofi_rxm", nullptr}};
  return {{provider.c_str(), nullptr}};
}

bool is_efa(const char* provider) { return std::strcmp(provider, "efa") == 0; }

bool speaks_ip(const char* provider) {
  return std::strstr(provider, "tcp") != nullptr || std::strcmp(provider, "net") == 0 ||
         std::strcmp(provider, "sockets") == 0 || std::strstr(provider, "udp") != nullptr;
}

// Everything that could carry a rail; with a provider's name only that provider is asked (a full scan takes 0.3 s).
InfoPtr query(const LibfabricApi& api, const char* provider, const std::string& source_address) {
  InfoPtr hints(api.dupinfo(nullptr), FreeInfo{&api});
  hints->caps = FI_MSG | FI_RMA;
  hints->mode = FI_CONTEXT | FI_CONTEXT2 | FI_RX_CQ_DATA;
  hints->ep_attr->type = FI_EP_RDM;
  hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_ENDPOINT;
  hints->domain_attr->threading = FI_THREAD_DOMAIN;
  hints->domain_attr->cq_data_size = sizeof(std::uint32_t);
  const char* node = nullptr;
  if (provider != nullptr) {
    hints->fabric_attr->prov_name = ::strdup(provider);  // freeinfo frees it
    // Without it these providers report success for data that they dropped.
    if (!is_efa(provider)) hints->tx_attr->op_flags = FI_DELIVERY_COMPLETE;
    if (speaks_ip(provider)) {
      hints->addr_format = FI_SOCKADDR_IN;
      if (!source_address.empty()) node = source_address.c_str();
    }
  }
  fi_info* list = nullptr;
  if (api.getinfo(node, node != nullptr ? FI_SOURCE : 0, hints.get(), &list) != 0) list = nullptr;
  return InfoPtr(list, FreeInfo{&api});
}

bool matches(const fi_info& info, const Candidate& candidate) {
  return std::strcmp(info.fabric_attr->prov_name, candidate.provider) == 0 &&
         (candidate.fabric == nullptr || std::strcmp(info.fabric_attr->name, candidate.fabric) == 0);
}

// One entry per NIC, in the provider's order.
std::vector<const fi_info*> nics(const fi_info* list, const Candidate& candidate) {
  std::vector<const fi_info*> found;
  std::set<std::string> names;
  for (const fi_info* info = list; info != nullptr; info = info->next) {
    if (matches(*info, candidate) && names.insert(info->domain_attr->name).second) found.push_back(info);
  }
  return found;
}

std::string label_of(const fi_info& info) {
  const char* provider = info.fabric_attr->prov_name;
  return is_efa(provider) ? info.fabric_attr->name : provider;
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
  const char* queried = "";
  std::string tried;
  for (const Candidate& candidate : candidates(config.provider)) {
    if (std::strcmp(queried, candidate.provider) != 0) {
      list = query(api, candidate.provider, config.source_address);
      queried = candidate.provider;
    }
    const std::string name = candidate.fabric != nullptr ? candidate.fabric : candidate.provider;
    tried += tried.empty() ? name : ", " + name;
    const std::vector<const fi_info*> found = nics(list.get(), candidate);
    if (found.empty()) continue;
    const bool efa = is_efa(candidate.provider);
    // An interface is shared by any number of software endpoints, a NIC belongs to one rail.
    const bool by_index = efa || std::strstr(candidate.provider, "verbs") != nullptr;
    const std::size_t nic = by_index ? config.nic_index : 0;
    if (nic >= found.size()) {
      throw_config(where + ": NIC " + std::to_string(nic) + " asked for, but " + name + " of " + library + " has " +
                   std::to_string(found.size()));
    }
    ProviderChoice choice;
    choice.info = InfoPtr(api.dupinfo(found[nic]), FreeInfo{&api});
    choice.label = label_of(*choice.info);
    choice.is_efa = efa;
    return choice;
  }
  std::string source = config.source_address.empty() ? "" : " at source address " + config.source_address;
  throw_config(where + ": no provider for reliable datagrams with RDMA write" + source + " in " + library +
               "; tried: " + tried);
}

std::vector<std::string> available_providers(const LibfabricSearch& search) {
  std::vector<std::string> names;
  if (!libfabric_info(search).found) return names;
  InfoPtr list = query(load_libfabric(search), nullptr, "");
  for (const fi_info* info = list.get(); info != nullptr; info = info->next) {
    const std::string name = label_of(*info);
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  return names;
}

std::vector<std::string> available_nics(const LibfabricSearch& search, const std::string& provider) {
  std::vector<std::string> names;
  if (!libfabric_info(search).found) return names;
  const LibfabricApi& api = load_libfabric(search);
  for (const Candidate& candidate : candidates(provider)) {
    InfoPtr list = query(api, candidate.provider, "");
    for (const fi_info* info : nics(list.get(), candidate)) names.push_back(info->domain_attr->name);
    if (!names.empty()) break;
  }
  return names;
}

#endif  // MOE_EFA_HAVE_LIBFABRIC

}  // namespace moe_efa::transport
