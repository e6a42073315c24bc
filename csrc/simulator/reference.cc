#include "simulator/reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace moe_efa::simulator {

using proto::DType;

namespace {

constexpr std::int64_t kNone = -1, kLost = -2;

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

// The e4m3 numbers that are not negative, by their codes.
const std::vector<float>& e4m3_numbers() {
  static const std::vector<float> numbers = [] {
    std::vector<float> all;
    for (int code = 0; code < 0x7f; ++code) {
      int exponent = code / 8, mantissa = code % 8;
      all.push_back(exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                  : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10));
    }
    return all;
  }();
  return numbers;
}

// The nearest code to a finite value within +-448; of a tie the even one.
std::uint8_t to_e4m3(float value) {
  const std::vector<float>& numbers = e4m3_numbers();
  float magnitude = std::min(std::fabs(value), numbers.back());
  auto code = static_cast<std::size_t>(std::lower_bound(numbers.begin(), numbers.end(), magnitude) - numbers.begin());
  if (code > 0) {
    double up = double{numbers[code]} - magnitude, down = double{magnitude} - numbers[code - 1];
    if (down < up || (down == up && code % 2 == 1)) --code;
  }
  return static_cast<std::uint8_t>(code | (std::signbit(value) ? 0x80 : 0));
}

struct Fp8 {
  std::vector<std::uint8_t> codes;
  std::vector<float> scales;  // of 128 codes each
};

Fp8 quantized(const std::vector<float>& row, proto::Fp8Scale format) {
  Fp8 out;
  for (std::size_t begin = 0; begin < row.size(); begin += 128) {
    std::size_t end = std::min(row.size(), begin + 128);
    float amax = 0;
    for (std::size_t i = begin; i < end; ++i) amax = std::max(amax, std::fabs(row[i]));
    float scale = std::max(amax / 448.0f, 0x1p-126f);
    if (format == proto::Fp8Scale::kUe8m0) {
      int exponent;
      float mantissa = std::frexp(scale, &exponent);  // in [0.5, 1)
      scale = std::ldexp(1.0f, mantissa == 0.5f ? exponent - 1 : exponent);
    }
    if (amax == 0) scale = 1;
    out.scales.push_back(scale);
    for (std::size_t i = begin; i < end; ++i) out.codes.push_back(to_e4m3(row[i] / scale));
  }
  return out;
}

// Rounds the values of a row to what a wire's dtype can hold.
void round_row(std::vector<float>& row, DType dtype, proto::Fp8Scale format) {
  if (dtype != DType::kFp8) {
    for (float& value : row) value = rounded(value, dtype);
    return;
  }
  Fp8 fp8 = quantized(row, format);
  for (std::size_t i = 0; i < row.size(); ++i) {
    float magnitude = e4m3_numbers()[fp8.codes[i] & 0x7f];
    row[i] = (fp8.codes[i] >= 0x80 ? -magnitude : magnitude) * fp8.scales[i / 128];
  }
}

// A sum of rows that starts with its first term.
struct Sum {
  std::vector<float> row;  // empty: no term yet
  void add(const std::vector<float>& term) {
    if (row.empty()) {
      row = term;
    } else {
      for (std::size_t i = 0; i < row.size(); ++i) row[i] = row[i] + term[i];
    }
  }
};

std::vector<float> load_row(const std::vector<std::byte>& rows, std::uint64_t row, std::uint32_t hidden, DType dtype) {
  std::vector<float> values(hidden);
  for (std::uint32_t h = 0; h < hidden; ++h) values[h] = load(rows.data(), row * hidden + h, dtype);
  return values;
}

void store_row(std::vector<std::byte>& rows, std::uint64_t row, const std::vector<float>& values, DType dtype) {
  for (std::size_t h = 0; h < values.size(); ++h) store(rows.data(), row * values.size() + h, values[h], dtype);
}

}  // namespace

Reference::Reference(const Workload& world) : world_(world) {
  std::uint32_t experts_per_rank = world.layout.experts_per_rank, top_k = world.layout.top_k;
  for (std::uint32_t plan = 0; plan < world.routings.size(); ++plan) {
    const std::vector<Routing>& routings = world.routings[plan];
    rows_.emplace_back(world.num_ranks);
    row_of_.emplace_back(world.num_ranks);
    for (std::uint32_t rank = 0; rank < world.num_ranks; ++rank) {
      row_of_.back()[rank].assign(routings[rank].topk_idx.size(), kNone);
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
        while (row % world.alignment(owner) != 0) ++row;
        out.offsets.push_back(row);
      }
      out.num_rows = out.offsets.back();
      if (world.is_static(plan)) cut_off(plan, owner);
    }
  }
}

void Reference::cut_off(std::uint32_t plan, std::uint32_t owner) {
  RankRows& out = rows_[plan][owner];
  std::int64_t required = out.num_rows, usable = world_.capacities[plan][owner];
  out.num_rows = usable;
  while (usable % world_.alignment(owner) != 0) --usable;
  for (std::size_t expert = 0; expert < out.tokens_per_expert.size(); ++expert) {
    while (out.tokens_per_expert[expert] > 0 && out.offsets[expert] + out.tokens_per_expert[expert] > usable) {
      --out.tokens_per_expert[expert];
    }
  }
  for (std::int64_t& offset : out.offsets) offset = std::min(offset, usable);
  std::vector<std::pair<std::int64_t, RowOrigin>> kept;
  for (const auto& [row, origin] : out.rows) {
    if (row < usable) {
      kept.push_back({row, origin});
      continue;
    }
    row_of_[plan][origin.rank][origin.token * world_.layout.top_k + origin.topk_pos] = kLost;
    out.own_overflow = required;
    RankRows& source = rows_[plan][origin.rank];
    source.overflow = std::max(source.overflow, required);
  }
  out.overflow = std::max(out.overflow, out.own_overflow);
  out.rows = std::move(kept);
}

Reference::Dispatched Reference::dispatched(std::size_t call_idx, std::uint32_t rank) const {
  const ScriptCall& call = world_.script[call_idx];
  const RankRows& expected = rows_[call.plan][rank];
  std::uint32_t hidden = world_.layout.hidden_size;
  auto num_rows = static_cast<std::size_t>(expected.num_rows);
  Dispatched result;
  std::size_t blocks = (hidden + 127) / 128;
  result.x.assign(num_rows * hidden * (call.fp8_output ? 1 : proto::dtype_bytes(call.user_dtype)), std::byte{0});
  result.weights.assign(num_rows, 0.0f);
  result.scales.assign(call.fp8_output ? num_rows * blocks : 0, 1.0f);
  std::vector<std::vector<std::byte>> inputs;
  for (std::uint32_t source = 0; source < world_.num_ranks; ++source) {
    inputs.push_back(
        random_rows(world_.seed, call_idx, source, world_.routing(call, source).num_tokens, hidden, call.user_dtype));
  }
  for (const auto& [row, origin] : expected.rows) {
    std::vector<float> values = load_row(inputs[origin.rank], origin.token, hidden, call.user_dtype);
    auto at = static_cast<std::size_t>(row);
    if (call.fp8_output) {
      Fp8 fp8 = quantized(values, world_.layout.fp8_scale);
      std::memcpy(result.x.data() + at * hidden, fp8.codes.data(), hidden);
      std::copy(fp8.scales.begin(), fp8.scales.end(), result.scales.data() + at * blocks);
    } else {
      round_row(values, call.wire_dtype, world_.layout.fp8_scale);
      store_row(result.x, at, values, call.user_dtype);
    }
    result.weights[static_cast<std::size_t>(row)] =
        world_.routing(call, origin.rank).topk_weights[origin.token * world_.layout.top_k + origin.topk_pos];
  }
  return result;
}

Reference::CombineInput Reference::combine_input(std::size_t call_idx, std::uint32_t rank) const {
  const ScriptCall& call = world_.script[call_idx];
  const RankRows& facts = rows_[call.plan][rank];
  auto num_rows = static_cast<std::uint64_t>(facts.num_rows);
  std::uint64_t stride = std::uint64_t{world_.layout.hidden_size} * proto::dtype_bytes(call.user_dtype);
  CombineInput input;
  input.y = random_rows(world_.seed, call_idx, rank, num_rows, world_.layout.hidden_size, call.user_dtype);
  for (std::size_t expert = 0; expert + 1 < facts.offsets.size(); ++expert) {
    auto begin = static_cast<std::uint64_t>(facts.offsets[expert] + facts.tokens_per_expert[expert]);
    auto end = static_cast<std::uint64_t>(facts.offsets[expert + 1]);
    if (begin < end) std::memset(input.y.data() + begin * stride, 0xff, (end - begin) * stride);  // NaN, never read
  }
  auto behind = static_cast<std::uint64_t>(facts.offsets.back());
  if (behind < num_rows) std::memset(input.y.data() + behind * stride, 0xff, (num_rows - behind) * stride);
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

  DType publish_dtype = call.wire_dtype == DType::kFp8 ? DType::kBf16 : call.wire_dtype;
  for (std::uint32_t token = 0; token < routing.num_tokens; ++token) {
    const std::int64_t* experts = routing.topk_idx.data() + token * top_k;
    const std::int64_t* rows = row_of_[call.plan][rank].data() + token * top_k;
    Sum over_nodes;
    for (std::uint32_t node = 0; node < world_.num_nodes(); ++node) {
      Sum over_mates;
      bool lost = false;
      for (std::uint32_t local = 0; local < world_.node_size; ++local) {
        std::uint32_t owner = node * world_.node_size + local;
        Sum own;
        for (std::uint32_t e = 0; e < world_.layout.experts_per_rank; ++e) {
          for (std::uint32_t k = 0; k < top_k; ++k) {
            if (experts[k] != std::int64_t{owner} * world_.layout.experts_per_rank + e) continue;
            lost |= rows[k] == kLost;
            if (rows[k] == kLost) continue;
            auto row = static_cast<std::size_t>(rows[k]);
            std::vector<float> y = load_row(inputs[owner].y, row, hidden, call.user_dtype);
            if (call.weighted) {
              for (float& value : y) value = inputs[owner].weights[row] * value;
            }
            own.add(y);
          }
        }
        if (own.row.empty()) continue;
        round_row(own.row, publish_dtype, world_.layout.fp8_scale);
        over_mates.add(own.row);
      }
      if (over_mates.row.empty() && lost) over_mates.row.assign(hidden, 0.0f);  // the row is announced, and comes
      if (over_mates.row.empty()) continue;
      round_row(over_mates.row, call.wire_dtype, world_.layout.fp8_scale);
      over_nodes.add(over_mates.row);
    }
    if (!over_nodes.row.empty()) store_row(result.out, token, over_nodes.row, call.user_dtype);
    if (!call.weight_grads) continue;
    for (std::uint32_t k = 0; k < top_k; ++k) {
      if (rows[k] < 0) continue;
      auto owner = static_cast<std::size_t>(experts[k] / world_.layout.experts_per_rank);
      result.topk_weight_grads[token * top_k + k] = inputs[owner].weight_grads[static_cast<std::size_t>(rows[k])];
    }
  }
  return result;
}

}  // namespace moe_efa::simulator
