// Where a rank stands: rank r = node * node_size + local rank. Rail peers share a local rank, mates share a node.
#pragma once

#include <cstdint>

namespace moe_efa::proto {

enum class Phase : std::uint8_t { kDispatch = 0, kCombine = 1 };
inline constexpr std::uint32_t kNumPhases = 2;

inline const char* phase_name(Phase phase) { return phase == Phase::kDispatch ? "dispatch" : "combine"; }

struct Topology {
  std::uint32_t num_ranks = 1;
  std::uint32_t node_size = 1;  // ranks per node (L)
  std::uint32_t rank = 0;

  constexpr std::uint32_t num_nodes() const { return num_ranks / node_size; }
  constexpr std::uint32_t node() const { return rank / node_size; }
  constexpr std::uint32_t local_rank() const { return rank % node_size; }
  constexpr std::uint32_t rank_of(std::uint32_t node, std::uint32_t local) const { return node * node_size + local; }
  constexpr std::uint32_t rail_peer(std::uint32_t node) const { return rank_of(node, local_rank()); }
};

}  // namespace moe_efa::proto
