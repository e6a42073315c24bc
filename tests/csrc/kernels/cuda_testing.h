// Ranks, routings and rows for the tests of CUDA bodies, and memory aligned as a device's is.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "common/status.h"
#include "device_memory.h"
#include "emulated_block.h"
#include "kernels/cpu/pack.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/static_sizes.h"
#include "kernels/cuda/plan_view.h"
#include "kernels/launch.h"
#include "kernels/row_math.h"
#include "proto/region_memory.h"

namespace moe_efa::testing {

inline constexpr std::byte kPoison{0xEE};

// Bytes that start at a multiple of 256.
class AlignedBytes {
 public:
  AlignedBytes() = default;
  explicit AlignedBytes(std::size_t bytes, std::byte fill = std::byte{0}) { assign(bytes, fill); }
  AlignedBytes& operator=(const std::vector<std::byte>& bytes) {
    if (bytes.size() != size_) assign(bytes.size(), std::byte{0});
    std::copy(bytes.begin(), bytes.end(), data());
    return *this;
  }
  void assign(std::size_t bytes, std::byte fill) {
    size_ = bytes;
    memory_.reset(new std::byte[bytes + kAlign]);
    std::fill_n(data(), bytes, fill);
  }
  std::byte* data() const {
    auto at = reinterpret_cast<std::uintptr_t>(memory_.get());
    return memory_.get() + (common::round_up<std::uintptr_t>(at, kAlign) - at);
  }
  std::size_t size() const { return size_; }

 private:
  static constexpr std::size_t kAlign = 256;
  std::unique_ptr<std::byte[]> memory_{new std::byte[kAlign]};
  std::size_t size_ = 0;
};

// Rows of any magnitude, with zeros, subnormals and, rarely, something that is not finite.
inline std::vector<std::byte> random_rows(std::uint32_t rows, std::uint32_t hidden_size, proto::DType dtype,
                                          std::uint64_t seed, bool finite = false) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<std::byte> bytes(std::size_t{rows} * hidden_size * proto::dtype_bytes(dtype));
  std::size_t count = std::size_t{rows} * hidden_size;
  for (std::size_t i = 0; i < count; ++i) {
    float value = normal(random) * std::exp2(static_cast<float>(static_cast<int>(random() % 9) - 4));
    if (random() % 16 == 0) value = 0;
    if (random() % 64 == 0) value *= 1e-39f;
    if (!finite && random() % 2048 == 0) value = random() % 2 == 0 ? INFINITY : NAN;
    if (dtype == proto::DType::kBf16) {
      std::uint16_t narrow = kernels::float_to_bf16(value);
      std::memcpy(bytes.data() + i * 2, &narrow, 2);
    } else {
      std::memcpy(bytes.data() + i * 4, &value, 4);
    }
  }
  return bytes;
}

inline std::vector<std::int64_t> random_routing(std::uint32_t tokens, std::uint32_t top_k, std::uint32_t num_experts,
                                                const std::string& routing, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::int64_t> topk(std::size_t{tokens} * top_k);
  for (std::int64_t& id : topk) {
    if (routing == "none") {
      id = -1;
    } else if (routing == "one") {
      id = 1;
    } else {  // -1 and duplicates among them
      id = static_cast<std::int64_t>(random() % (num_experts + 1)) - 1;
    }
  }
  return topk;
}

// Rank 2 (node 1, local rank 0) of 6 ranks on 3 nodes, or rank 0 of 2 on one, with its region and its mate's, and a
// send plan.
struct OneRank {
  OneRank(std::uint32_t hidden_size, std::uint32_t tokens, const std::string& routing, proto::Fp8Scale scale,
          std::uint64_t seed, std::uint32_t nodes = 3, std::uint32_t chunk_rows = 9) {
    using proto::DType;
    std::uint32_t node = nodes == 1 ? 0 : 1;
    config.num_nodes = nodes;
    config.node_size = 2;
    config.experts_per_rank = 3;
    config.top_k = 4;
    config.hidden_size = hidden_size;
    config.dispatch_dtypes = config.combine_dtypes = proto::DTypeSet(DType::kFp32) | DType::kBf16 | DType::kFp8;
    config.fp8_scale = scale;
    config.chunk_rows = chunk_rows;
    config.slots = 7;
    config.own_slots = 7;
    config.publish_slots = 7;
    proto::RegionLayout layout(config, node);
    bool apart = seed % 2 == 1;  // slots in memory of their own, as a GPU's
    for (int i = 0; i < 2; ++i) {
      proto::RegionMemory region{nullptr, nullptr, layout.slots_begin(), layout.total_bytes()};
      region.region = memory.emplace_back(apart ? region.slots_begin : region.bytes, kPoison).data();
      if (apart) region.slots = memory.emplace_back(region.bytes - region.slots_begin, kPoison).data();
      std::fill_n(region.region, layout.flag_bytes(), std::byte{0});
      regions.push_back(region.region);
      slot_bases.push_back(region.slot_base());
      // With words that only kernels read; those of the region stay zero then, for which nobody waits.
      std::uint64_t begin = layout.kernel_words_begin(), bytes = layout.flag_bytes() - begin;
      if (apart) region.kernel_words = memory.emplace_back(bytes, std::byte{0}).data() - begin;
      kernel_words.push_back(region.kernel_word_base());
    }
    view = {{nodes * 2, 2, node * 2}, layout, regions.data(), apart ? slot_bases.data() : nullptr, kernel_words.data()};
    topk = random_routing(tokens, config.top_k, 6 * nodes, routing, seed);
    for (std::size_t i = 0; i < topk.size(); ++i) weights.push_back(static_cast<float>(i % 7) / 8 + 0.1f);
    plan = kernels::cpu::build_send_plan({topk.data(), weights.data(), tokens, 1, 1}, view);
  }

  // Nobody needs what is in the slots of chunks below `seq` any more.
  void free_slots(proto::Phase phase, std::uint32_t node, std::uint64_t seq) {
    *view.own_word(view.layout.send_free(phase, node)) = seq;
    for (std::uint32_t reader = 0; reader < config.node_size; ++reader) {
      *view.own_word(view.layout.released(phase, node, reader)) = seq;
    }
  }

  proto::LayoutConfig config;
  std::vector<AlignedBytes> memory;
  std::vector<std::byte*> regions, slot_bases, kernel_words;
  proto::NodeView view;
  std::vector<std::int64_t> topk;
  std::vector<float> weights;
  std::shared_ptr<kernels::Plan> plan;
};

// What all six ranks sent to OneRank's node, packed into the rings there by the CPU kernel; and the sizes that follow.
struct Incoming {
  Incoming(OneRank& at, proto::DType x_dtype, proto::DType wire_dtype, const std::string& routing, bool replay,
           std::uint64_t seed, bool finite = false)
      : own(&at), wire_dtype(wire_dtype), replay(replay) {
    OneRank& one = at;
    const proto::LayoutConfig& config = one.config;
    std::uint32_t own_local = one.view.topology.local_rank(), node = one.view.topology.node();
    std::uint32_t per_rank = config.experts_per_rank, ranks = 2 * config.num_nodes;
    counts.assign(ranks * per_rank, 0);
    base.assign(ranks * per_rank, 0);
    plan.plan_id = 3;
    plan.rings.resize(ranks);
    plan.pulls.resize(ranks);
    plan.masks.resize(config.num_nodes);
    plan.mask_bytes = 1;
    num_pulls.assign(ranks, 0);
    for (std::uint32_t rank = 0; rank < ranks; ++rank) {
      std::uint32_t from_node = rank / 2, local = rank % 2, ring = local * config.num_nodes + from_node;
      proto::NodeView view{{ranks, 2, rank},
                           proto::RegionLayout(config, from_node),
                           one.regions.data(),
                           one.view.slot_bases,
                           one.view.kernel_word_bases};
      std::uint32_t tokens = routing == "random" ? 11 * rank : 30;  // rank 0 has none, but of two
      if (ranks == 2) tokens += 15;
      std::vector<std::int64_t> topk = random_routing(tokens, config.top_k, 3 * ranks, routing, seed + rank);
      std::vector<float> weights(topk.size());
      for (std::size_t i = 0; i < topk.size(); ++i) weights[i] = static_cast<float>(i % 11) / 16 - 0.25f;
      auto send = kernels::cpu::build_send_plan({topk.data(), weights.data(), tokens, 1, 1}, view);
      send->plan_id = plan.plan_id;
      send->complete = replay;
      if (rank == one.view.topology.rank) {
        plan.send = send->send;
        plan.num_tokens = tokens;
      }
      const kernels::SendPlan& to_us = send->send[node];
      node_counts.push_back(to_us.expert_counts);
      plan.rings[ring] = to_us.facts;
      plan.pulls[ring].resize(to_us.facts.num_chunks);
      if (local == own_local) plan.masks[from_node].assign(to_us.facts.rows, 0);
      for (std::uint32_t expert = 0; expert < per_rank; ++expert) {
        counts[rank * per_rank + expert] = to_us.expert_counts[own_local * per_rank + expert];
        num_pulls[ring] += counts[rank * per_rank + expert];
      }
      std::vector<std::byte> x = random_rows(tokens, config.hidden_size, x_dtype, seed + rank, finite);
      kernels::DispatchArgs dispatch;
      dispatch.x = x.data();
      dispatch.x_dtype = x_dtype;
      dispatch.wire_dtype = wire_dtype;
      dispatch.plan = send;
      for (std::uint32_t chunk = 0; chunk < to_us.facts.num_chunks; ++chunk) {
        std::uint64_t seq = first_seq(ring) + chunk;
        std::byte* slot = one.view.slots(local) + one.view.layout.ring_slot(proto::Phase::kDispatch, from_node, seq);
        kernels::cpu::pack_chunk({&dispatch, node, chunk, seq, 5, slot}, view);
        arrive(local, from_node, seq);
      }
    }
    plan.tokens_per_expert.assign(per_rank, 0);
    plan.offsets.assign(per_rank + 1, 0);
    for (std::uint32_t expert = 0; expert < per_rank; ++expert) {
      std::int64_t row = plan.offsets[expert];
      for (std::uint32_t rank = 0; rank < ranks; ++rank) {
        base[rank * per_rank + expert] = row;
        row += counts[rank * per_rank + expert];
      }
      plan.tokens_per_expert[expert] = row - plan.offsets[expert];
      plan.offsets[expert + 1] =
          plan.offsets[expert] + common::round_up<std::int64_t>(plan.tokens_per_expert[expert], 8);
    }
  }

  // Static mode: this rank and its mate have so many percent of the rows that they need.
  void limit(std::int64_t own_percent, std::int64_t mate_percent) {
    const proto::LayoutConfig& config = own->config;
    std::uint32_t per_rank = config.experts_per_rank, nodes = config.num_nodes;
    std::int64_t needed[2] = {0, 0};
    for (std::uint32_t expert = 0; expert < 2 * per_rank; ++expert) {
      std::int64_t rows = 0;
      for (const auto& of_source : node_counts) rows += of_source[expert];
      needed[expert / per_rank] += common::round_up<std::int64_t>(rows, 8);
    }
    sizes.emplace(own->view);
    plan.capacity = needed[0] * own_percent / 100;
    plan.expert_alignment = 8;
    sizes->set_output(0, static_cast<std::uint32_t>(plan.capacity), 8);
    sizes->set_output(1, static_cast<std::uint32_t>(needed[1] * mate_percent / 100), 8);
    for (std::uint32_t rank = 0; rank < node_counts.size(); ++rank) sizes->set_counts(rank, node_counts[rank].data());
    sizes->finish();

    std::int64_t usable = plan.usable_rows();
    plan.overflow = std::make_shared<std::int64_t>(needed[0] > usable ? needed[0] : 0);
    num_pulls.assign(num_pulls.size(), 0);
    for (std::uint32_t rank = 0; rank < node_counts.size(); ++rank) {
      for (std::uint32_t i = rank * per_rank; i < (rank + 1) * per_rank; ++i) {
        std::int64_t end = std::min(base[i] + counts[i], usable);
        num_pulls[rank % 2 * nodes + rank / 2] += static_cast<std::uint32_t>(std::max<std::int64_t>(0, end - base[i]));
      }
    }
    for (std::uint32_t expert = 0; expert < per_rank; ++expert) {
      std::int64_t end = std::min(plan.offsets[expert] + plan.tokens_per_expert[expert], usable);
      plan.offsets[expert] = std::min(plan.offsets[expert], usable);
      plan.tokens_per_expert[expert] = end - plan.offsets[expert];
    }
    plan.offsets.back() = std::min(plan.offsets.back(), usable);
    if (!sizes->any_lost()) return;
    for (std::uint32_t node = 0; node < nodes; ++node) {
      plan.chunk_overflow.emplace_back(plan.rings[node].num_chunks, 0);
      for (std::uint32_t expert = 0; expert < 2 * per_rank; ++expert) room.push_back(sizes->room(node, expert));
    }
    required = {sizes->required(0), sizes->required(1)};
  }
  const kernels::cpu::StaticSizes* static_sizes() const { return sizes ? &*sizes : nullptr; }

  static std::uint64_t first_seq(std::uint32_t ring) { return 2 + ring * 3; }
  void arrive(std::uint32_t local, std::uint32_t node, std::uint64_t seq, bool there = true) {
    *own->view.word(local, own->view.layout.arrived(proto::Phase::kDispatch, node, seq)) = there ? seq + 1 : 0;
  }

  OneRank* own;
  proto::DType wire_dtype;
  bool replay;
  kernels::Plan plan;  // sizes only: a pull fills in the rest
  std::vector<std::uint32_t> counts, num_pulls;
  std::vector<std::int64_t> base;
  std::vector<std::vector<std::uint32_t>> node_counts;  // [rank][expert of the node]
  // Of limit(); room and required where anything is lost.
  std::optional<kernels::cpu::StaticSizes> sizes;
  std::vector<std::uint32_t> room;
  std::vector<std::uint64_t> required;
};

}  // namespace moe_efa::testing
