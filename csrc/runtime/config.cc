#include "runtime/config.h"

#include <algorithm>
#include <sstream>

#include "common/status.h"
#include "kernels/plan.h"

namespace moe_efa::runtime {

namespace {

using proto::DType;

[[noreturn]] void config_error(const std::string& text) {
  throw common::StatusError({common::StatusCode::kConfig, -1, -1, -1, -1, text});
}

proto::DTypeSet dtypes_of(const std::string& name, const char* field) {
  if (name == "auto") return proto::DTypeSet(DType::kBf16) | DType::kFp32;  // whatever the tensors are
  for (DType dtype : {DType::kBf16, DType::kFp32, DType::kFp8}) {
    if (name == proto::dtype_name(dtype)) return dtype;
  }
  config_error(std::string(field) + " '" + name + "' is not one of auto, bf16, fp32, fp8");
}

proto::Fp8Scale scale_of(const std::string& name) {
  if (name == "fp32") return proto::Fp8Scale::kFp32;
  if (name == "ue8m0") return proto::Fp8Scale::kUe8m0;
  config_error("fp8_scale '" + name + "' is not one of fp32, ue8m0");
}

constexpr std::uint32_t kChunkRows = 64;
constexpr std::uint32_t kPublishSlots = 8;

}  // namespace

Sizing choose_layout(const GroupConfig& config) {
  const proto::Topology& topology = config.topology;
  if (topology.num_ranks == 0 || topology.node_size == 0 || topology.num_ranks % topology.node_size != 0) {
    config_error("num_ranks " + std::to_string(topology.num_ranks) + " is not a multiple of node_size " +
                 std::to_string(topology.node_size));
  }
  if (topology.node_size > kernels::kMaxNodeSize || topology.num_nodes() > proto::kMaxNodes) {
    config_error("at most " + std::to_string(kernels::kMaxNodeSize) + " ranks per node and " +
                 std::to_string(proto::kMaxNodes) + " nodes");
  }
  if (config.num_experts == 0 || config.num_experts % topology.num_ranks != 0) {
    config_error("num_experts " + std::to_string(config.num_experts) + " is not a multiple of num_ranks " +
                 std::to_string(topology.num_ranks));
  }
  if (config.top_k == 0 || config.top_k > proto::kMaxTopK || config.hidden_size == 0 ||
      config.max_tokens_per_rank == 0 || config.max_tokens_per_rank > 1u << 26) {
    config_error("top_k must lie in [1, 64], hidden_size and max_tokens_per_rank must be positive");
  }
  if (config.num_nics == 0 || config.num_nics > kMaxNics || config.nic_names.size() > kMaxNics) {
    config_error("a rank has between 1 and " + std::to_string(kMaxNics) + " NICs, not " +
                 std::to_string(config.nic_names.empty() ? config.num_nics : config.nic_names.size()));
  }
  std::uint32_t experts_per_node = config.num_experts / topology.num_nodes();
  if (experts_per_node > 65535) config_error("at most 65535 experts per node");

  Sizing sizing;
  proto::LayoutConfig& layout = sizing.layout;
  layout.num_nodes = topology.num_nodes();
  layout.node_size = topology.node_size;
  layout.experts_per_rank = config.num_experts / topology.num_ranks;
  layout.top_k = config.top_k;
  layout.hidden_size = config.hidden_size;
  layout.dispatch_dtypes =
      dtypes_of(config.wire_dtype, "wire_dtype") | dtypes_of(config.grad_wire_dtype, "grad_wire_dtype");
  layout.combine_dtypes =
      dtypes_of(config.combine_dtype, "combine_dtype") | dtypes_of(config.grad_combine_dtype, "grad_combine_dtype");
  layout.fp8_scale = scale_of(config.fp8_scale);

  if (config.slots > proto::kMaxSlots || config.chunk_rows > 1u << 16) {
    config_error("slots " + std::to_string(config.slots) + " or chunk_rows " + std::to_string(config.chunk_rows) +
                 " exceed " + std::to_string(proto::kMaxSlots) + " and 65536");
  }
  std::uint64_t least = 0;
  // The largest chunk, then the longest ring, that fit the budget; a ring never holds more than a whole round.
  for (std::uint32_t rows = config.chunk_rows != 0 ? config.chunk_rows : kChunkRows; rows >= 1; rows /= 2) {
    layout.chunk_rows = rows;
    std::uint32_t round = std::min(proto::kMaxSlots, std::max(2u, common::ceil_div(config.max_tokens_per_rank, rows)));
    auto bytes_with = [&](std::uint32_t slots) {
      layout.slots = layout.own_slots = slots;
      layout.publish_slots = std::min(slots, kPublishSlots);
      return proto::RegionLayout(layout, 0).total_bytes();
    };
    std::uint32_t low = config.slots != 0 ? config.slots : 2, high = config.slots != 0 ? config.slots : round;
    least = bytes_with(low);
    if (least <= config.memory_budget_bytes) {
      while (low < high) {  // the greatest that fits
        std::uint32_t middle = low + (high - low + 1) / 2;
        if (bytes_with(middle) <= config.memory_budget_bytes) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      sizing.region_bytes = bytes_with(low);
      proto::RegionLayout chosen(layout, 0);
      // Chunk sizes travel as 32-bit numbers.
      for (proto::Phase phase : {proto::Phase::kDispatch, proto::Phase::kCombine}) {
        if (chosen.slot_bytes(phase) > UINT32_MAX) config_error("a chunk of so many rows exceeds 4 GiB");
      }
      return sizing;
    }
    if (config.chunk_rows != 0) break;
  }
  std::ostringstream text;
  text << "memory_budget_bytes=" << config.memory_budget_bytes << " is too small: hidden_size " << config.hidden_size
       << ", top_k " << config.top_k << " and " << topology.num_ranks << " ranks in nodes of " << topology.node_size
       << " need at least " << least << " bytes per rank";
  config_error(text.str());
}

std::uint64_t layout_hash(const proto::LayoutConfig& layout, const std::string& buffers) {
  // FNV-1a over the numbers that decide where a peer writes, and how its rows are to be read.
  std::uint64_t hash = 0xcbf29ce484222325ull;
  for (std::uint64_t value :
       {std::uint64_t{proto::kProtocolVersion}, std::uint64_t{layout.num_nodes}, std::uint64_t{layout.node_size},
        std::uint64_t{layout.experts_per_rank}, std::uint64_t{layout.top_k}, std::uint64_t{layout.hidden_size},
        std::uint64_t{layout.dispatch_dtypes.bits()}, std::uint64_t{layout.combine_dtypes.bits()},
        static_cast<std::uint64_t>(layout.fp8_scale), std::uint64_t{layout.chunk_rows}, std::uint64_t{layout.slots},
        std::uint64_t{layout.own_slots}, std::uint64_t{layout.publish_slots},
        proto::RegionLayout(layout, 0).total_bytes(), std::uint64_t{buffers == "device"}}) {
    for (int i = 0; i < 8; ++i) {
      hash = (hash ^ (value >> (8 * i) & 0xff)) * 0x100000001b3ull;
    }
  }
  return hash;
}

}  // namespace moe_efa::runtime
