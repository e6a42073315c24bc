#include "simulator/reference.h"

#include <cstring>

namespace moe_efa::simulator {

using proto::DType;

namespace {

// Written out here on purpose: the kernels' own conversion is under test.
float load(const std::byte* from, std::uint64_t i, DType dtype) {
  float value;
  if (dtype == DType::kFp32) {
    std::memcpy(&value, from + i * 4, 4);
  } else {
    std::uint16_t half;
    std::memcpy(&half, from + i * 2, 2);
    std::uint32_t bits = std::uint32_t{half} << 16;
    std::memcpy(&value, &bits, 4);
  }
  return value;
}

// Rounds a finite value to nearest, ties to even.
float rounded(float value, DType dtype) {
  if (dtype == DType::kFp32) return value;
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  std::uint32_t low = bits & 0xffff, kept = bits >> 16;
  if (low > 0x8000 || (low == 0x8000 && (kept & 1) == 1)) ++kept;
  bits = kept << 16;
  std::memcpy(&value, &bits, 4);
  return value;
}

void store(std::byte* to, std::uint64_t i, float value, DType dtype) {
  if (dtype == DType::kFp32) {
    std::memcpy(to + i * 4, &value, 4);
    return;
  }
  value = rounded(value, dtype);
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  auto half = static_cast<std::uint16_t>(bits >> 16);
  std::memcpy(to + i * 2, &half, 2);
}

// A sum that starts with its first term.
struct Sum {
  bool any = false;
  float value = 0;
  void add(float term) {
    value = any ? value + term : term;
    any = true;
  }
};

}  // namespace

Reference::Reference(const Workload& world) : world_(world) {
  std::uint32_t experts_per_rank = world.layout.experts_per_rank, top_k = world.layout.top_k;
  for (const std::vector<Routing>& routings : world.routings) {
    rows_.emplace_back(world.num_ranks);
    row_of_.emplace_back(world.num_ranks);
    for (std::uint32_t rank = 0; rank < world.num_ranks; ++rank) {
      row_of_.back()[rank].assign(routings[rank].topk_idx.size(), -1);
    }
    for (std::uint32_t owner = 0; owner < world.num_ranks; ++owner) {
      RankRows& out = rows_.back()[owner];
      out.offsets.push_back(0);
      for (std::uint32_t local = 0; local < experts_per_rank; ++local) {
        std::int64_t expert = std::int64_t{owner} * experts_per_rank + local, row = out.offsets.back();
        for (std::uint32_t source = 0; source < world.num_ranks; ++source) {
          for (std::uint32_t token = 0; token < routings[source].num_tokens; ++token) {
            for (std::uint32_t k = 0; k < top_k; ++k) {
              if (routings[source].topk_idx[token * top_k + k] != expert) continue;
              row_of_.back()[source][token * top_k + k] = row;
              out.rows.push_back({row++, {source, token, k}});
            }
          }
        }
        out.tokens_per_expert.push_back(row - out.offsets.back());
        while (row % world.expert_alignment != 0) ++row;
        out.offsets.push_back(row);
      }
    }
  }
}

Reference::Dispatched Reference::dispatched(std::size_t call_idx, std::uint32_t rank) const {
  const ScriptCall& call = world_.script[call_idx];
  const RankRows& expected = rows_[call.plan][rank];
  std::uint32_t hidden = world_.layout.hidden_size;
  auto num_rows = static_cast<std::size_t>(expected.offsets.back());
  Dispatched result;
  result.x.assign(num_rows * hidden * proto::dtype_bytes(call.user_dtype), std::byte{0});
  result.weights.assign(num_rows, 0.0f);
  std::vector<std::vector<std::byte>> inputs;
  for (std::uint32_t source = 0; source < world_.num_ranks; ++source) {
    inputs.push_back(
        random_rows(world_.seed, call_idx, source, world_.routing(call, source).num_tokens, hidden, call.user_dtype));
  }
  for (const auto& [row, origin] : expected.rows) {
    for (std::uint32_t h = 0; h < hidden; ++h) {
      float value = load(inputs[origin.rank].data(), std::uint64_t{origin.token} * hidden + h, call.user_dtype);
      store(result.x.data(), static_cast<std::uint64_t>(row) * hidden + h, rounded(value, call.wire_dtype),
            call.user_dtype);
    }
    result.weights[static_cast<std::size_t>(row)] =
        world_.routing(call, origin.rank).topk_weights[origin.token * world_.layout.top_k + origin.topk_pos];
  }
  return result;
}

Reference::CombineInput Reference::combine_input(std::size_t call_idx, std::uint32_t rank) const {
  const ScriptCall& call = world_.script[call_idx];
  const RankRows& facts = rows_[call.plan][rank];
  auto num_rows = static_cast<std::uint64_t>(facts.offsets.back());
  std::uint64_t stride = std::uint64_t{world_.layout.hidden_size} * proto::dtype_bytes(call.user_dtype);
  CombineInput input;
  input.y = random_rows(world_.seed, call_idx, rank, num_rows, world_.layout.hidden_size, call.user_dtype);
  for (std::size_t expert = 0; expert + 1 < facts.offsets.size(); ++expert) {
    auto begin = static_cast<std::uint64_t>(facts.offsets[expert] + facts.tokens_per_expert[expert]);
    auto end = static_cast<std::uint64_t>(facts.offsets[expert + 1]);
    if (begin < end) std::memset(input.y.data() + begin * stride, 0xff, (end - begin) * stride);  // NaN, never read
  }
  if (call.weighted) input.weights = random_floats(world_.seed, call_idx, rank, num_rows, false);
  if (call.weight_grads) input.weight_grads = random_floats(world_.seed, call_idx, rank, num_rows, true);
  return input;
}

Reference::Combined Reference::combined(std::size_t call_idx, std::uint32_t rank) const {
  const ScriptCall& call = world_.script[call_idx];
  const Routing& routing = world_.routing(call, rank);
  std::uint32_t hidden = world_.layout.hidden_size, top_k = world_.layout.top_k;
  Combined result;
  result.out.assign(std::size_t{routing.num_tokens} * hidden * proto::dtype_bytes(call.user_dtype), std::byte{0});
  result.topk_weight_grads.assign(std::size_t{routing.num_tokens} * top_k, 0.0f);
  std::vector<CombineInput> inputs;
  for (std::uint32_t owner = 0; owner < world_.num_ranks; ++owner) inputs.push_back(combine_input(call_idx, owner));

  for (std::uint32_t token = 0; token < routing.num_tokens; ++token) {
    const std::int64_t* experts = routing.topk_idx.data() + token * top_k;
    const std::int64_t* rows = row_of_[call.plan][rank].data() + token * top_k;
    for (std::uint32_t h = 0; h < hidden; ++h) {
      Sum over_nodes;
      for (std::uint32_t node = 0; node < world_.num_nodes(); ++node) {
        Sum over_mates;
        for (std::uint32_t local = 0; local < world_.node_size; ++local) {
          std::uint32_t owner = node * world_.node_size + local;
          Sum own;
          for (std::uint32_t e = 0; e < world_.layout.experts_per_rank; ++e) {
            for (std::uint32_t k = 0; k < top_k; ++k) {
              if (experts[k] != std::int64_t{owner} * world_.layout.experts_per_rank + e) continue;
              float y = load(inputs[owner].y.data(), static_cast<std::uint64_t>(rows[k]) * hidden + h, call.user_dtype);
              own.add(call.weighted ? inputs[owner].weights[static_cast<std::size_t>(rows[k])] * y : y);
            }
          }
          if (own.any) over_mates.add(rounded(own.value, call.wire_dtype));
        }
        if (over_mates.any) over_nodes.add(rounded(over_mates.value, call.wire_dtype));
      }
      store(result.out.data(), std::uint64_t{token} * hidden + h, over_nodes.value, call.user_dtype);
    }
    if (!call.weight_grads) continue;
    for (std::uint32_t k = 0; k < top_k; ++k) {
      if (experts[k] < 0) continue;
      auto owner = static_cast<std::size_t>(experts[k] / world_.layout.experts_per_rank);
      result.topk_weight_grads[token * top_k + k] = inputs[owner].weight_grads[static_cast<std::size_t>(rows[k])];
    }
  }
  return result;
}

}  // namespace moe_efa::simulator
