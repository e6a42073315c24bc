#include "kernels/cpu/pack.h"

#include <cstring>

#include "kernels/cpu/rows.h"

namespace moe_efa::kernels::cpu {

std::uint32_t pack_chunk(const PackArgs& args, const proto::NodeView& view) {
  const DispatchArgs& dispatch = *args.dispatch;
  const Plan& plan = *dispatch.plan;
  const SendPlan& send = plan.send[args.node];
  std::uint32_t hidden_size = view.layout.config().hidden_size;
  bool replay = plan.complete;
  std::uint32_t first = send.facts.first_row(args.chunk), rows = send.facts.rows_in(args.chunk);
  std::uint32_t num_entries = replay ? 0 : send.entry_begin[first + rows] - send.entry_begin[first];
  std::uint64_t row_bytes = proto::hidden_row_bytes(hidden_size, dispatch.wire_dtype);

  proto::ChunkHeader header{};
  header.magic = proto::kChunkMagic;
  header.version = proto::kProtocolVersion;
  header.phase = static_cast<std::uint8_t>(proto::Phase::kDispatch);
  header.flags = static_cast<std::uint8_t>((replay ? proto::kFlagReplay : 0) |
                                           (args.chunk + 1 == send.facts.num_chunks ? proto::kFlagLast : 0));
  header.source_rank = view.topology.rank;
  header.dtype = static_cast<std::uint32_t>(dispatch.wire_dtype);
  header.epoch = args.epoch;
  header.seq = args.seq;
  header.plan_id = plan.plan_id;
  header.rows = rows;
  header.first_row = first;
  header.num_entries = num_entries;
  header.total_bytes = static_cast<std::uint32_t>(proto::dispatch_chunk_bytes(replay, rows, num_entries, row_bytes));
  std::memcpy(args.slot, &header, sizeof(header));

  if (!replay) {
    std::byte* meta = args.slot + sizeof(header);
    for (std::uint32_t i = 0; i < rows; ++i) {
      proto::RowMeta row{send.row_token[first + i], send.entry_begin[first + i + 1] - send.entry_begin[first + i]};
      std::memcpy(meta + i * sizeof(row), &row, sizeof(row));
    }
    std::memcpy(meta + rows * sizeof(proto::RowMeta), send.entries.data() + send.entry_begin[first],
                num_entries * sizeof(proto::RowEntry));
  }
  std::byte* hidden = args.slot + proto::chunk_hidden_offset(replay, rows, num_entries);
  const auto* x = static_cast<const std::byte*>(dispatch.x);
  std::uint64_t x_stride = std::uint64_t{hidden_size} * proto::dtype_bytes(dispatch.x_dtype);
  for (std::uint32_t i = 0; i < rows; ++i) {
    convert_row(hidden + i * row_bytes, dispatch.wire_dtype, x + send.row_token[first + i] * x_stride, dispatch.x_dtype,
                hidden_size, view.layout.config().fp8_scale);
  }
  return header.total_bytes;
}

}  // namespace moe_efa::kernels::cpu
