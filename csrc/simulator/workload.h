// Workload: the world's shape and the script of calls that every rank runs, all drawn from one seed. Inputs are
// functions of (seed, call, rank), so that the reference can compute them again. Nothing here runs anything.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "proto/chunk.h"
#include "proto/region.h"
#include "proto/topology.h"
#include "simulator/profile.h"

namespace moe_efa::simulator {

struct ScriptCall {
  enum class Kind { kDispatch, kReplay, kCombine };
  Kind kind = Kind::kDispatch;
  std::uint32_t plan = 0;                         // number of the dispatch that makes, or made, the plan
  proto::DType user_dtype = proto::DType::kFp32;  // of x or y
  proto::DType wire_dtype = proto::DType::kFp32;
  bool fp8_output = false;  // a dispatch that hands FP8 rows and their scales through
  bool weighted = false;
  bool weight_grads = false;
};

struct Routing {
  std::uint32_t num_tokens = 0;
  std::vector<std::int64_t> topk_idx;
  std::vector<float> topk_weights;  // NaN where nothing is selected
};

struct Workload {
  std::uint64_t seed = 0;
  std::uint32_t num_ranks = 1, node_size = 1, num_nics = 1, max_writes_per_nic = 64, writes_per_step = 32;
  std::uint32_t expert_alignment = 1;
  proto::LayoutConfig layout;
  std::vector<ScriptCall> script;
  std::vector<std::vector<Routing>> routings;         // [plan][rank]
  std::vector<std::vector<std::int64_t>> capacities;  // [plan][rank] of static mode; [plan] is empty for an exact plan
  bool own_alignments = false;                        // every rank pads its output in its own way
  bool slots_apart = false;                           // from words and counts: in memory of their own, as a GPU's
  std::uint32_t calls_ahead = 1;  // most calls that are started and not done, as of halves and waves
  std::vector<double> pace;       // [rank]: how often the scheduler picks it
  double event_share = 0.5;       // of the turns that let the network move
  double pause_probability = 0;   // of a rank sleeping between two calls
  double pause_ns = 0;

  std::uint32_t num_nodes() const { return num_ranks / node_size; }
  std::uint32_t num_experts() const { return num_ranks * layout.experts_per_rank; }
  std::uint32_t alignment(std::uint32_t rank) const { return expert_alignment + (own_alignments ? rank % 3 : 0); }
  bool is_static(std::uint32_t plan) const { return !capacities[plan].empty(); }
  const Routing& routing(const ScriptCall& call, std::uint32_t rank) const { return routings[call.plan][rank]; }
};

// num_ranks 0: from the seed.
Workload make_workload(std::uint64_t seed, std::uint32_t num_ranks);

// `rows` rows of random finite values of widely differing sizes, so that the order of a sum shows in its bits.
std::vector<std::byte> random_rows(std::uint64_t seed, std::uint64_t call, std::uint32_t rank, std::uint64_t rows,
                                   std::uint32_t hidden_size, proto::DType dtype);
std::vector<float> random_floats(std::uint64_t seed, std::uint64_t call, std::uint32_t rank, std::uint64_t count,
                                 bool gradient);

}  // namespace moe_efa::simulator
