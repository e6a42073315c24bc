// Chooses what a LibfabricRail opens: provider, fabric and NIC. Internal to the libfabric files.
#pragma once

#include "transport/libfabric_choice.h"
#include "transport/libfabric_rail.h"

#if MOE_EFA_HAVE_LIBFABRIC

namespace moe_efa::transport {

struct FreeInfo {
  const LibfabricApi* api = nullptr;
  void operator()(fi_info* info) const { api->freeinfo(info); }
};
using InfoPtr = std::unique_ptr<fi_info, FreeInfo>;

struct ProviderChoice {
  InfoPtr info;  // exactly one entry
  EndpointFacts facts;
};

// Throws StatusError(kConfig) naming what was looked for.
ProviderChoice choose_provider(const LibfabricApi& api, const LibfabricRailConfig& config);

}  // namespace moe_efa::transport

#endif  // MOE_EFA_HAVE_LIBFABRIC
