// LibfabricRail: one libfabric endpoint (efa, tcp, verbs) as a Rail. It registers the region once, or its
// two parts where slots lie apart, writes with a 32-bit immediate, and keeps at most max_outstanding writes in flight
// whatever the provider would accept. Knows nothing of the protocol, and judges neither deadlines nor liveness: no
// provider reports a peer's death reliably.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "proto/region_memory.h"
#include "transport/libfabric_loader.h"
#include "transport/rail.h"

namespace moe_efa::transport {

// What the slots are, where they lie apart; the rest is host memory. A GPU's memory is registered as a dma-buf where
// there is one and the library takes it (1.20), else by address, which the kernel must know (peer memory). Its device
// address is never dereferenced.
struct MemoryDescriptor {
  enum class Kind { kSystem, kCuda };
  Kind kind = Kind::kSystem;
  int device = 0;                   // CUDA's number of the GPU
  int dmabuf_fd = -1;               // stays open until the rail is made
  std::uint64_t dmabuf_offset = 0;  // of the slots' first byte
};

struct LibfabricRailConfig {
  LibfabricSearch search;
  std::string provider;        // "efa", "efa-direct", "tcp", "verbs", or a name as fi_info prints it;
                               // empty: efa where there is a device, else tcp
  proto::RegionMemory memory;  // stays mapped until the rail is destroyed
  MemoryDescriptor slots;
  std::uint64_t max_write_bytes = 0;       // the longest write that will be posted
  std::uint32_t num_peers = 1;             // add_peer calls to expect
  std::uint32_t max_outstanding = 128;     // own writes in flight; the provider's queue may lower it
  std::uint32_t max_remote_events = 1024;  // immediates in flight towards this rail (I12): sizes the completion
                                           // queue and, where the provider wants them, the posted receives
  std::string source_address;              // IPv4 address to bind; empty: the provider's first. Software providers only
  std::uint32_t nic_index = 0;             // among the provider's NICs in its own order; ignored by software providers
  std::string nic_name;                    // the NIC by its name instead, such as "rdmap0s6"; empty: by nic_index
  int rail_index = 0, num_rails = 1;       // of this rank, for messages
};

// Throws StatusError: kConfig when the library, the provider or the NIC is missing or unfit, kTransport otherwise.
std::unique_ptr<Rail> make_libfabric_rail(const LibfabricRailConfig& config);

// Providers on this host that could carry a rail, as fi_info names them, "efa-direct" apart from "efa". Empty
// without libfabric. Scans everything: takes a second.
std::vector<std::string> available_providers(const LibfabricSearch& search);

// The provider that an empty name stands for here, as fi_info names it; empty if none would do.
std::string default_provider(const LibfabricSearch& search);

// NICs of a provider in the order of nic_index: domain names such as "rdmap0s6-rdm" or "eth0". Empty without any.
std::vector<std::string> available_nics(const LibfabricSearch& search, const std::string& provider);

}  // namespace moe_efa::transport
