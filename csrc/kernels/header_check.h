// The header of a landed chunk against all that its reader knows from the call, the plan and the counts (I1). CPU and
// GPU kernels share it: where slots lie in a GPU's memory, nobody else looks at a header.
#pragma once

#include <cstdint>

#include "proto/chunk.h"
#include "proto/region.h"

namespace moe_efa::kernels {

enum class HeaderPart : std::uint32_t { kAll, kIdentity, kPlan, kRows, kDType, kEntries, kSize };

struct ExpectedHeader {
  proto::Phase phase;
  std::uint8_t flags;  // exactly these
  std::uint32_t source_rank;
  std::uint64_t epoch, seq, plan_id;
  std::uint32_t rows, first_row;
  proto::DType dtype;
  bool may_overflow;  // a combine of a static plan
};

// What is wrong; kAll where nothing is.
struct HeaderMismatch {
  HeaderPart part = HeaderPart::kAll;
  std::uint64_t expected = 0, got = 0;
};

constexpr HeaderMismatch check_header(const proto::ChunkHeader& header, const ExpectedHeader& is,
                                      const proto::LayoutConfig& config) {
  if (header.seq != is.seq) return {HeaderPart::kIdentity, is.seq, header.seq};
  if (header.epoch != is.epoch) return {HeaderPart::kIdentity, is.epoch, header.epoch};
  if (header.magic != proto::kChunkMagic) return {HeaderPart::kIdentity, proto::kChunkMagic, header.magic};
  if (header.version != proto::kProtocolVersion) {
    return {HeaderPart::kIdentity, proto::kProtocolVersion, header.version};
  }
  auto phase = static_cast<std::uint8_t>(is.phase);
  if (header.phase != phase) return {HeaderPart::kIdentity, phase, header.phase};
  if (header.source_rank != is.source_rank) return {HeaderPart::kIdentity, is.source_rank, header.source_rank};
  if (header.plan_id != is.plan_id) return {HeaderPart::kPlan, is.plan_id, header.plan_id};
  if (header.required_capacity != 0 && !is.may_overflow) return {HeaderPart::kPlan, 0, header.required_capacity};
  if (header.first_row != is.first_row) return {HeaderPart::kRows, is.first_row, header.first_row};
  if (header.rows != is.rows) return {HeaderPart::kRows, is.rows, header.rows};
  auto dtype = static_cast<std::uint32_t>(is.dtype);
  if (header.dtype != dtype) return {HeaderPart::kDType, dtype, header.dtype};
  if (header.flags != is.flags) return {HeaderPart::kDType, is.flags, header.flags};
  bool dispatch = is.phase == proto::Phase::kDispatch, replay = (is.flags & proto::kFlagReplay) != 0;
  std::uint64_t most = dispatch && !replay ? std::uint64_t{is.rows} * config.top_k : 0;
  if (header.num_entries > most) return {HeaderPart::kEntries, most, header.num_entries};
  std::uint64_t row_bytes = proto::hidden_row_bytes(config.hidden_size, is.dtype);
  std::uint64_t bytes = dispatch ? proto::dispatch_chunk_bytes(replay, is.rows, header.num_entries, row_bytes)
                                 : proto::combine_chunk_bytes((is.flags & proto::kFlagWeightGrads) != 0, is.rows,
                                                              config.top_k, row_bytes);
  if (header.total_bytes != bytes) return {HeaderPart::kSize, bytes, header.total_bytes};
  return {};
}

inline const char* header_text(HeaderPart part) {
  switch (part) {
    case HeaderPart::kAll:
      break;
    case HeaderPart::kIdentity:
      return "header of another chunk or epoch";
    case HeaderPart::kPlan:
      return "another plan";
    case HeaderPart::kRows:
      return "rows differ from the announced cut";
    case HeaderPart::kDType:
      return "flags or dtype differ from the announced ones";
    case HeaderPart::kEntries:
      return "entries of a row out of range";
    case HeaderPart::kSize:
      return "another size than follows from its header";
  }
  return "nothing";
}

}  // namespace moe_efa::kernels
