#include "simulator/workload.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "simulator/rng.h"

namespace moe_efa::simulator {

using proto::DType;

namespace {

float random_value(Rng& rng) {
  return static_cast<float>((rng.uniform() - 0.5) * std::ldexp(1.0, static_cast<int>(rng.below(14)) - 6));
}

Routing make_routing(const Workload& world, std::uint32_t plan, std::uint32_t rank, std::uint32_t style,
                     std::uint32_t most_tokens) {
  Rng rng(world.seed, Stream::kRouting, plan, rank);
  std::uint32_t top_k = world.layout.top_k;
  Routing routing;
  routing.num_tokens = rng.chance(0.15) ? 0 : rng.between(0, most_tokens);
  bool all_none = style == 1 || rng.chance(0.05);
  double none = rng.chance(0.4) ? 0.3 : 0.0;
  auto favourite = static_cast<std::int64_t>(Rng(world.seed, Stream::kRouting, plan).below(world.num_experts()));
  for (std::uint32_t token = 0; token < routing.num_tokens; ++token) {
    std::int64_t last = -1;
    for (std::uint32_t k = 0; k < top_k; ++k) {
      std::int64_t expert = static_cast<std::int64_t>(rng.below(world.num_experts()));
      if (style == 2 || (style == 3 && rng.chance(0.7))) expert = favourite;  // one expert takes (nearly) all
      if (rng.chance(0.05) && last >= 0) expert = last;                       // the same expert twice
      if (all_none || rng.chance(none)) expert = -1;
      last = expert;
      routing.topk_idx.push_back(expert);
      routing.topk_weights.push_back(expert < 0 ? std::numeric_limits<float>::quiet_NaN() : random_value(rng));
    }
  }
  return routing;
}

// Rows that a rank needs, padding included.
std::int64_t required_rows(const Workload& world, std::uint32_t plan, std::uint32_t rank) {
  std::vector<std::int64_t> counts(world.layout.experts_per_rank, 0);
  for (const Routing& routing : world.routings[plan]) {
    for (std::int64_t expert : routing.topk_idx) {
      if (expert >= 0 && expert / world.layout.experts_per_rank == rank) {
        ++counts[static_cast<std::size_t>(expert % world.layout.experts_per_rank)];
      }
    }
  }
  std::int64_t rows = 0, alignment = world.alignment(rank);
  for (std::int64_t count : counts) rows += (count + alignment - 1) / alignment * alignment;
  return rows;
}

// Of one rank: room for everything, for nearly everything, for some or for nothing.
std::int64_t make_capacity(std::int64_t rows, Rng& rng) {
  switch (rng.below(6)) {
    case 0:
      return 0;
    case 1:
      return rows > 0 ? rows - 1 : 0;
    case 2:
      return static_cast<std::int64_t>(rng.below(static_cast<std::uint64_t>(rows) + 1));
    case 3:
      return rows + static_cast<std::int64_t>(rng.below(9));
    default:
      return rows;
  }
}

}  // namespace

Workload make_workload(std::uint64_t seed, std::uint32_t num_ranks) {
  Rng rng(seed, Stream::kShape);
  Workload world;
  world.seed = seed;
  if (num_ranks == 0) {
    // Small worlds are run most: they are fast and fail with short traces.
    constexpr std::uint32_t kSizes[] = {2, 2, 3, 4, 4, 4, 6, 6, 8, 8, 9, 12, 16};
    num_ranks = kSizes[rng.below(std::size(kSizes))];
  }
  std::vector<std::uint32_t> node_sizes;
  for (std::uint32_t size = 1; size <= num_ranks && size <= 4; ++size) {
    if (num_ranks % size == 0 && (size < num_ranks || rng.chance(0.2))) node_sizes.push_back(size);
  }
  world.num_ranks = num_ranks;
  world.node_size = node_sizes[rng.below(node_sizes.size())];
  world.num_nics = rng.chance(0.6) ? 1 : rng.between(2, 4);
  world.max_writes_per_nic = rng.chance(0.3) ? rng.between(1, 4) : 64;
  world.writes_per_step = rng.chance(0.3) ? rng.between(1, 3) : 32;
  world.expert_alignment = rng.chance(0.5) ? 1 : rng.between(2, 9);

  proto::LayoutConfig& layout = world.layout;
  layout.num_nodes = world.num_nodes();
  layout.node_size = world.node_size;
  layout.experts_per_rank = rng.chance(0.2) ? rng.between(8, 24) : rng.between(1, 4);
  layout.top_k = rng.between(1, 6);
  layout.hidden_size = rng.between(1, 40);
  DType dispatch_dtype = rng.chance(0.5) ? DType::kBf16 : DType::kFp32;
  DType combine_dtype = rng.chance(0.5) ? DType::kBf16 : DType::kFp32;
  layout.dispatch_dtypes = dispatch_dtype;
  layout.combine_dtypes = combine_dtype;
  // FP8 beside the others, as where values travel in FP8 and gradients do not; some rows of more than one block.
  Rng fp8(seed, Stream::kFp8);
  bool fp8_dispatch = fp8.chance(0.3), fp8_combine = fp8.chance(0.3);
  if (fp8_dispatch) layout.dispatch_dtypes = layout.dispatch_dtypes | DType::kFp8;
  if (fp8_combine) layout.combine_dtypes = layout.combine_dtypes | DType::kFp8;
  if (fp8.chance(0.5)) layout.fp8_scale = proto::Fp8Scale::kUe8m0;
  if ((fp8_dispatch || fp8_combine) && num_ranks <= 8 && fp8.chance(0.3)) layout.hidden_size = fp8.between(100, 300);
  layout.chunk_rows = rng.between(1, 8);
  constexpr std::uint32_t kSlots[] = {1, 1, 2, 2, 3, 4, 5, 8, 9, 13};
  layout.slots = kSlots[rng.below(std::size(kSlots))];
  layout.own_slots = rng.between(1, 4);
  layout.publish_slots = rng.between(1, 3);

  bool many_epochs = rng.chance(0.06);
  std::uint32_t calls = many_epochs ? rng.between(85, 100) : rng.between(2, 12);
  std::uint32_t most_tokens = many_epochs ? 2 : rng.between(1, num_ranks > 8 ? 10 : 24);
  if (!many_epochs && num_ranks <= 4 && rng.chance(0.06)) {  // long streams through few slots
    calls = rng.between(2, 4);
    most_tokens = 300;
    layout.chunk_rows = 1;
    layout.slots = rng.between(1, 4);
  }
  for (std::uint32_t rank = 0; rank < num_ranks; ++rank) world.pace.push_back(rng.chance(0.15) ? 0.05 : 1.0);
  world.event_share = rng.chance(0.3) ? 0.1 : rng.uniform() * 0.8;
  if (rng.chance(0.5)) {
    world.pause_probability = 0.3;
    world.pause_ns = rng.chance(0.5) ? 20e3 : 2e6;
  }

  Rng ahead(seed, Stream::kAhead);
  if (ahead.chance(0.5)) world.calls_ahead = ahead.between(2, 6);

  world.slots_apart = Rng(seed, Stream::kMemory).chance(0.5);

  Rng script(seed, Stream::kScript);
  auto pick = [&](DType widest) { return widest == DType::kFp32 && script.chance(0.6) ? DType::kFp32 : DType::kBf16; };
  for (std::uint32_t i = 0; i < calls; ++i) {
    ScriptCall call;
    auto plans = static_cast<std::uint32_t>(world.routings.size());
    bool fresh = plans == 0 || script.chance(0.4);
    call.user_dtype = script.chance(0.5) ? DType::kBf16 : DType::kFp32;
    if (fresh) {
      call.plan = plans;
      std::uint32_t style = static_cast<std::uint32_t>(script.below(10));
      world.routings.emplace_back();
      for (std::uint32_t rank = 0; rank < num_ranks; ++rank) {
        world.routings.back().push_back(make_routing(world, plans, rank, style, most_tokens));
      }
    } else {
      // Any live plan, the newest most often.
      call.plan = plans - 1 - static_cast<std::uint32_t>(script.chance(0.5) ? 0 : script.below(std::min(plans, 4u)));
      call.kind = script.chance(0.35) ? ScriptCall::Kind::kReplay : ScriptCall::Kind::kCombine;
    }
    call.wire_dtype = pick(call.kind == ScriptCall::Kind::kCombine ? combine_dtype : dispatch_dtype);
    bool may_be_fp8 = call.kind == ScriptCall::Kind::kCombine ? fp8_combine : fp8_dispatch;
    if (may_be_fp8 && fp8.chance(0.6)) {
      call.wire_dtype = DType::kFp8;
      call.fp8_output = call.kind != ScriptCall::Kind::kCombine && fp8.chance(0.4);
    }
    call.weighted = script.chance(0.5);
    call.weight_grads = script.chance(0.4);
    world.script.push_back(call);
  }
  Rng fixed(seed, Stream::kStatic);
  world.own_alignments = fixed.chance(0.3);
  for (std::uint32_t plan = 0; plan < world.routings.size(); ++plan) {
    world.capacities.emplace_back();
    if (!fixed.chance(0.35)) continue;
    for (std::uint32_t rank = 0; rank < num_ranks; ++rank) {
      world.capacities.back().push_back(make_capacity(required_rows(world, plan, rank), fixed));
    }
  }
  return world;
}

std::vector<std::byte> random_rows(std::uint64_t seed, std::uint64_t call, std::uint32_t rank, std::uint64_t rows,
                                   std::uint32_t hidden_size, DType dtype) {
  Rng rng(seed, Stream::kInput, call, rank);
  std::uint64_t count = rows * hidden_size;
  std::vector<std::byte> bytes(count * proto::dtype_bytes(dtype));
  for (std::uint64_t i = 0; i < count; ++i) {
    float value = random_value(rng);
    if (dtype == DType::kFp32) {
      std::memcpy(bytes.data() + i * 4, &value, 4);
    } else {
      std::uint32_t bits;
      std::memcpy(&bits, &value, 4);
      auto half = static_cast<std::uint16_t>(bits >> 16);
      std::memcpy(bytes.data() + i * 2, &half, 2);
    }
  }
  return bytes;
}

std::vector<float> random_floats(std::uint64_t seed, std::uint64_t call, std::uint32_t rank, std::uint64_t count,
                                 bool gradient) {
  Rng rng(seed, gradient ? Stream::kGradient : Stream::kWeight, call, rank);
  std::vector<float> values(count);
  for (float& value : values) value = random_value(rng);
  return values;
}

}  // namespace moe_efa::simulator
