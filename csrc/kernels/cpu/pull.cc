#include "kernels/cpu/pull.h"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <vector>

#include "common/check.h"
#include "common/mutant.h"
#include "common/status.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/stream.h"
#include "kernels/header_check.h"

namespace moe_efa::kernels::cpu {

using common::Mutant;
using common::mutant;

namespace {

[[noreturn]] void reject(const PullArgs& args, const proto::NodeView& view, const char* what) {
  auto rank = static_cast<int>(view.topology.rank_of(args.source_node, args.source_local));
  std::ostringstream text;
  text << "chunk " << args.seq << " of rank " << rank << " in dispatch, epoch " << args.epoch << ": " << what;
  throw common::StatusError({common::StatusCode::kProtocol, rank, static_cast<int>(proto::Phase::kDispatch),
                             static_cast<std::int64_t>(args.epoch), static_cast<std::int64_t>(args.seq), text.str()});
}

// Reads the metadata of a fresh chunk into the plan: own rows, and for the own rail which mates take part in each row.
// A mate without room for any row of a token takes no part in it.
void read_metadata(const PullArgs& args, const proto::NodeView& view, const proto::ChunkHeader& header) {
  const proto::LayoutConfig& config = view.layout.config();
  Plan& plan = *args.plan;
  std::size_t ring = std::size_t{args.source_local} * config.num_nodes + args.source_node;
  std::vector<PullEntry>& pulls = plan.pulls[ring][args.chunk];
  bool own_rail = args.source_local == view.topology.local_rank();
  const std::byte* meta = args.slot + sizeof(proto::ChunkHeader);
  const std::byte* entries = meta + header.rows * sizeof(proto::RowMeta);
  std::uint32_t first_expert = view.topology.local_rank() * config.experts_per_rank;
  std::int64_t usable_rows = plan.usable_rows();
  std::uint64_t overflow = 0;
  std::uint32_t at = 0;
  for (std::uint32_t row = 0; row < header.rows; ++row) {
    proto::RowMeta row_meta;
    std::memcpy(&row_meta, meta + row * sizeof(row_meta), sizeof(row_meta));
    if (row_meta.num_entries == 0 || row_meta.num_entries > header.num_entries - at) {
      reject(args, view, "entries of a row out of range");
    }
    std::uint64_t mask = 0;
    for (std::uint32_t end = at + row_meta.num_entries; at < end; ++at) {
      proto::RowEntry entry;
      std::memcpy(&entry, entries + at * sizeof(entry), sizeof(entry));
      if (entry.expert >= config.experts_per_rank * config.node_size || entry.topk_pos >= config.top_k) {
        reject(args, view, "expert or top-k position out of range");
      }
      std::uint64_t lost = args.static_sizes != nullptr && own_rail
                               ? args.static_sizes->overflow(args.source_node, entry.expert, entry.index)
                               : 0;
      overflow = std::max(overflow, lost);
      if (lost == 0 || mutant(Mutant::kLostRowsSummed)) mask |= 1ull << entry.expert / config.experts_per_rank;
      std::uint32_t expert = entry.expert - first_expert;  // wraps for experts of lower mates
      if (expert >= config.experts_per_rank) continue;
      if (entry.index >= args.expert_counts[expert]) reject(args, view, "index beyond the announced count");
      std::int64_t place = args.expert_base[expert] + entry.index;
      if (place >= usable_rows) continue;
      auto out_row = static_cast<std::uint32_t>(place);
      pulls.push_back({row << PullEntry::kTopKBits | entry.topk_pos, out_row});
      args.output->weights[out_row] = entry.weight;
    }
    if (own_rail) plan.set_mask(args.source_node, header.first_row + row, mask);
  }
  if (at != header.num_entries) reject(args, view, "entries left over");
  if (overflow == 0) return;
  if (plan.chunk_overflow.empty()) reject(args, view, "index beyond the announced count of a mate");
  plan.chunk_overflow[args.source_node][args.chunk] = overflow;
}

}  // namespace

void pull_chunk(const PullArgs& args, const proto::NodeView& view) {
  const proto::LayoutConfig& config = view.layout.config();
  Plan& plan = *args.plan;
  std::size_t ring = std::size_t{args.source_local} * config.num_nodes + args.source_node;
  const RingFacts& facts = plan.rings[ring];
  proto::ChunkHeader header;
  std::memcpy(&header, args.slot, sizeof(header));
  // The engine has checked the header against itself and its immediate, if it can; this is about what was announced
  // too.
  ExpectedHeader expected{};
  expected.phase = proto::Phase::kDispatch;
  expected.flags = static_cast<std::uint8_t>((args.replay ? proto::kFlagReplay : 0) |
                                             (args.chunk + 1 == facts.num_chunks ? proto::kFlagLast : 0));
  expected.source_rank = view.topology.rank_of(args.source_node, args.source_local);
  expected.epoch = args.epoch;
  expected.seq = args.seq;
  expected.plan_id = plan.plan_id;
  expected.rows = facts.rows_in(args.chunk);
  expected.first_row = facts.first_row(args.chunk);
  expected.dtype = args.wire_dtype;
  HeaderMismatch wrong = check_header(header, expected, config);
  if (wrong.part != HeaderPart::kAll && !mutant(Mutant::kHeaderUnchecked)) reject(args, view, header_text(wrong.part));
  bool hand_through = args.out_dtype == proto::DType::kFp8;
  MOE_EFA_CHECK(!hand_through || args.wire_dtype == proto::DType::kFp8,
                "only an FP8 wire has FP8 rows to hand through");
  if (!args.replay) read_metadata(args, view, header);

  std::uint64_t row_bytes = proto::hidden_row_bytes(config.hidden_size, args.wire_dtype);
  std::uint64_t out_stride = std::uint64_t{config.hidden_size} * proto::dtype_bytes(args.out_dtype);
  const std::byte* hidden = args.slot + proto::chunk_hidden_offset(args.replay, header.rows, header.num_entries);
  auto* out = static_cast<std::byte*>(args.output->x);
  std::uint32_t blocks = proto::fp8_blocks(config.hidden_size);
  bool converts = !hand_through && args.out_dtype != args.wire_dtype;
  std::vector<std::byte> converted(converts ? out_stride : 0);
  std::uint32_t converted_row = ~0u;  // one token, several experts: converted once
  for (const PullEntry& pull : plan.pulls[ring][args.chunk]) {
    std::byte* to = out + pull.out_row * out_stride;
    const std::byte* row = hidden + pull.row() * row_bytes;
    if (hand_through) {
      std::memcpy(args.output->scales + std::size_t{pull.out_row} * blocks,
                  row + proto::fp8_scales_offset(config.hidden_size), blocks * sizeof(float));
    }
    if (converts) {
      if (converted_row != pull.row()) {
        convert_row(converted.data(), args.out_dtype, row, args.wire_dtype, config.hidden_size, config.fp8_scale);
      }
      converted_row = pull.row();
      row = converted.data();
    }
    if (args.output->stream) {
      stream_copy(to, row, out_stride);
    } else {
      std::memcpy(to, row, out_stride);
    }
  }
  stream_fence();
}

}  // namespace moe_efa::kernels::cpu
