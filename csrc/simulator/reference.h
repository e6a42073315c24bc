// Reference: what every call must produce, by plain serial loops over the whole group's routing. It shares no code with
// the kernels; the order of its sums is the specification: own experts by (expert, top-k position), then ranks of a
// node, then nodes, each stage rounded once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "simulator/workload.h"

namespace moe_efa::simulator {

struct RowOrigin {
  std::uint32_t rank, token, topk_pos;
};

// Rows of one rank's output, without those that a capacity cut off. The padding of an expert is not listed.
struct RankRows {
  std::vector<std::int64_t> tokens_per_expert, offsets;
  std::vector<std::pair<std::int64_t, RowOrigin>> rows;
  std::int64_t num_rows = 0;
  std::int64_t own_overflow = 0;  // 0, or the rows that the rank needed and did not have
  std::int64_t overflow = 0;      // the same of all ranks that lost rows of this one's tokens, and of itself
};

class Reference {
 public:
  explicit Reference(const Workload& world);

  const RankRows& rows(std::uint32_t plan, std::uint32_t rank) const { return rows_[plan][rank]; }

  struct Dispatched {
    std::vector<std::byte> x;  // in the user's dtype, or the codes of FP8 rows
    std::vector<float> weights, scales;
  };
  Dispatched dispatched(std::size_t call, std::uint32_t rank) const;

  struct Combined {
    std::vector<std::byte> out;
    std::vector<float> topk_weight_grads;
  };
  Combined combined(std::size_t call, std::uint32_t rank) const;

  // Inputs of a combine: y with NaN in the padding, weights and their gradients per row.
  struct CombineInput {
    std::vector<std::byte> y;
    std::vector<float> weights, weight_grads;
  };
  CombineInput combine_input(std::size_t call, std::uint32_t rank) const;

 private:
  void cut_off(std::uint32_t plan, std::uint32_t owner);

  const Workload& world_;
  std::vector<std::vector<RankRows>> rows_;                     // [plan][rank]
  std::vector<std::vector<std::vector<std::int64_t>>> row_of_;  // [plan][rank][token * top_k + k]: on the owner;
                                                                // kNone, kLost
};

}  // namespace moe_efa::simulator
