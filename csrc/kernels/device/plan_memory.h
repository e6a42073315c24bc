// Where a plan lies on a device: two blocks of bytes that its handle keeps. The first holds what plan makes and replays
// read, the second, whose size is known once all sources have announced theirs, what pull makes and combine reads, and
// in static mode, first of all, the word that tells the user what is lost.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/plan.h"
#include "kernels/cuda/plan_view.h"
#include "kernels/device/upload.h"
#include "kernels/plan.h"
#include "proto/region.h"

namespace moe_efa::kernels::device {

// [num_nodes] views | [plan_rows] tokens.
struct SendMemory {
  cuda::SendView* send;
  std::uint32_t* row_token;
};
std::size_t send_bytes(const proto::LayoutConfig& config, std::uint32_t num_tokens);
SendMemory place_send(const proto::LayoutConfig& config, std::byte* memory);

// What place_pulls puts into `tables`.
std::size_t table_bytes(const proto::LayoutConfig& config);
// Of a plan whose rings and sizes are known.
std::size_t pull_bytes(const Plan& plan, const proto::LayoutConfig& config, std::uint32_t local_rank);
// The most that pull_bytes() of a plan in static mode can be.
std::size_t most_pull_bytes(const proto::LayoutConfig& config, std::int64_t capacity, std::uint32_t max_tokens,
                            std::uint32_t most_chunks);

// Lays out `memory` for the plan's pulls and masks, puts what is known of them into `tables` (to be copied to the start
// of `memory`) and completes `view`. pulls[ring]: rows of the ring for this rank's experts that it
// has room for.
void place_pulls(const Plan& plan, const proto::LayoutConfig& config, std::uint32_t local_rank,
                 const std::uint32_t* pulls, std::byte* memory, Upload& tables, cuda::PlanView* view);

}  // namespace moe_efa::kernels::device
