// Configuration of one rank of a group, and the layout that follows from it: the one place where the memory budget
// becomes slots and chunk rows (I9). Knows nothing of segments or rails.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "proto/region.h"
#include "proto/topology.h"

namespace moe_efa::runtime {

struct GroupConfig {
  proto::Topology topology;
  std::uint32_t num_experts = 0;
  std::uint32_t hidden_size = 0;
  std::uint32_t top_k = 0;
  std::uint32_t max_tokens_per_rank = 0;
  // What dispatches and combines send, of values and of gradients: "auto" (as the tensor) | "bf16" | "fp32" | "fp8".
  // The rule that fills the two words for gradients is ExpertParallelConfig's.
  std::string wire_dtype = "auto";
  std::string combine_dtype = "auto";
  std::string grad_wire_dtype = "auto";
  std::string grad_combine_dtype = "auto";
  std::string fp8_scale = "fp32";      // | "ue8m0"
  std::string transport = "none";      // what joins nodes: "none" | "shm" | "libfabric"
  std::string provider;                // of libfabric; empty = the best present
  std::uint32_t num_nics = 1;          // rails of this rank, equal on all ranks
  std::vector<std::string> nic_names;  // which NICs they take, one each; empty = as the provider finds them
  double timeout_s = 600;
  double heartbeat_timeout_s = 20;
  double warn_after_s = 30;  // a call that waits so long says for whom, once
  std::uint64_t memory_budget_bytes = 1ull << 30;
  std::string buffers = "host";  // where slots lie: with the rest of the region | "device": in memory of the GPU
  std::string job_key;           // equal on all ranks, unique to this group
  std::string listen_host = "127.0.0.1";
  std::string libfabric;  // path given by the user; empty = search
  std::vector<std::string> libfabric_hints;
  std::uint32_t num_threads = 1;    // of the CPU kernels
  std::uint32_t ranks_on_host = 0;  // 0 = node_size; more where one host plays several nodes
  std::uint32_t chunk_rows = 0;     // 0 = derived from the budget
  std::uint32_t slots = 0;          // 0 = derived from the budget
  std::string device_library;       // path of the library that runs the kernels; empty = the CPU's
  std::int32_t device_index = 0;    // on this host
  std::string gdrcopy;              // path of its library; empty = search; kNoGdrcopy
  // For tests: the rails reorder, with these faults (transport/reorder_rail.h).
  bool reorder = false;
  std::uint64_t reorder_seed = 0;
  std::int32_t reorder_drop_node = -1;
  std::uint64_t reorder_drop_after = 0;
  std::int32_t reorder_drop_nic = -1;  // all
};

inline constexpr char kNoGdrcopy[] = "off";
inline constexpr std::uint32_t kWritesPerNic = 64;  // own writes in flight
inline constexpr std::uint32_t kMaxNics = 32;       // per rank

struct Sizing {
  proto::LayoutConfig layout;
  std::uint64_t region_bytes = 0;
};

// Throws StatusError(kConfig): bad numbers, or a budget below the least that works, which it names.
Sizing choose_layout(const GroupConfig& config);

// Everything that must be equal on all ranks, in one number (I15).
std::uint64_t layout_hash(const proto::LayoutConfig& layout, const std::string& buffers);

}  // namespace moe_efa::runtime
