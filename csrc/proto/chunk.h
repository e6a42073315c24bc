// A chunk: what one RDMA write carries, and what a local reader finds in a ring slot.
//   dispatch: ChunkHeader | RowMeta[rows] | RowEntry[num_entries] | pad to 64 | hidden[rows]
//             (a replay of a plan has neither RowMeta nor RowEntry)
//   combine : ChunkHeader | hidden[rows] | float weight_grad[rows][top_k] when kFlagWeightGrads is set
// A hidden row is hidden_size elements, padded to 16 bytes; an FP8 row's scales follow it, padded alike. Layout only:
// no reader or writer here.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "proto/topology.h"

namespace moe_efa::proto {

inline constexpr std::uint32_t kProtocolVersion = 3;
inline constexpr std::uint32_t kChunkMagic = 0x4d6f4543;   // "MoEC"
inline constexpr std::uint32_t kCountsMagic = 0x4d6f4e54;  // "MoNT"

enum class DType : std::uint8_t { kBf16 = 0, kFp32 = 1, kFp8 = 2 };
inline constexpr std::uint32_t kNumDTypes = 3;

constexpr std::uint32_t dtype_bytes(DType dtype) {  // of an element
  return dtype == DType::kFp8 ? 1 : dtype == DType::kBf16 ? 2 : 4;
}
constexpr const char* dtype_name(DType dtype) {
  return dtype == DType::kFp8 ? "fp8" : dtype == DType::kBf16 ? "bf16" : "fp32";
}
// What ranks of a node publish for each other when `combine_dtype` goes home: FP8 blocks are made once, of the sum.
constexpr DType publish_dtype(DType combine_dtype) {
  return combine_dtype == DType::kFp8 ? DType::kBf16 : combine_dtype;
}

// FP8 rows: e4m3 in blocks of 128 along hidden, the last of which may be short, and one fp32 scale for each.
inline constexpr std::uint32_t kFp8BlockSize = 128;
enum class Fp8Scale : std::uint8_t { kFp32 = 0, kUe8m0 = 1 };  // what a scale may be: any number, or a power of two
constexpr std::uint32_t fp8_blocks(std::uint32_t hidden_size) { return common::ceil_div(hidden_size, kFp8BlockSize); }

inline constexpr std::uint8_t kFlagReplay = 1;       // no metadata: the receiver has the plan
inline constexpr std::uint8_t kFlagWeightGrads = 2;  // combine rows carry top_k fp32 gradients of the weights
inline constexpr std::uint8_t kFlagLast = 4;         // last chunk of its epoch and ring
inline constexpr std::uint8_t kFlagStatic = 8;       // a fresh dispatch into outputs of fixed capacity

struct ChunkHeader {
  std::uint32_t magic;
  std::uint16_t version;
  std::uint8_t phase;
  std::uint8_t flags;
  std::uint32_t source_rank;  // the writer: token owner (dispatch) or forwarder (combine)
  std::uint32_t dtype;
  std::uint64_t epoch;
  std::uint64_t seq;      // ring sequence number, never reset
  std::uint64_t plan_id;  // epoch of the dispatch that made the plan
  std::uint32_t rows;
  std::uint32_t first_row;  // ordinal of the first row among all rows of this (source, node)
  std::uint32_t num_entries;
  std::uint32_t total_bytes;        // of the whole chunk, header included
  std::uint64_t required_capacity;  // combine, static mode: 0, or what the rank that lost rows of this chunk needed
};
static_assert(sizeof(ChunkHeader) == 64);

struct RowMeta {
  std::uint32_t token_idx;    // in the source's batch
  std::uint32_t num_entries;  // experts of this row on the destination node
};
static_assert(sizeof(RowMeta) == 8);

// Entries of a row are sorted by (expert, top-k position).
struct RowEntry {
  std::uint32_t index;   // of this row within (source, expert), counted in token order
  std::uint16_t expert;  // within the destination node
  std::uint16_t topk_pos;
  float weight;
};
static_assert(sizeof(RowEntry) == 12);

inline constexpr std::uint32_t kMaxTopK = 64;

// Where the scales of an FP8 row begin.
constexpr std::uint64_t fp8_scales_offset(std::uint32_t hidden_size) {
  return common::round_up<std::uint64_t>(hidden_size, 16);
}

constexpr std::uint64_t hidden_row_bytes(std::uint32_t hidden_size, DType dtype) {
  if (dtype == DType::kFp8) {
    return fp8_scales_offset(hidden_size) +
           common::round_up<std::uint64_t>(std::uint64_t{fp8_blocks(hidden_size)} * sizeof(float), 16);
  }
  return common::round_up<std::uint64_t>(std::uint64_t{hidden_size} * dtype_bytes(dtype), 16);
}

// Without padding: the least that a row costs on the wire.
constexpr std::uint64_t dense_row_bytes(std::uint32_t hidden_size, DType dtype) {
  return std::uint64_t{hidden_size} * dtype_bytes(dtype) +
         (dtype == DType::kFp8 ? std::uint64_t{fp8_blocks(hidden_size)} * sizeof(float) : 0);
}

// The dtypes that may cross in a phase, one bit each. A slot holds the longest row among them: which that is depends on
// hidden_size, since an FP8 row of few elements is longer than a bf16 row.
class DTypeSet {
 public:
  constexpr DTypeSet() = default;
  constexpr DTypeSet(DType dtype) : bits_(static_cast<std::uint8_t>(1u << static_cast<unsigned>(dtype))) {}
  constexpr DTypeSet operator|(DTypeSet other) const {
    DTypeSet both;
    both.bits_ = static_cast<std::uint8_t>(bits_ | other.bits_);
    return both;
  }
  constexpr bool has(DType dtype) const { return (bits_ >> static_cast<unsigned>(dtype) & 1) != 0; }
  constexpr std::uint8_t bits() const { return bits_; }

  constexpr std::uint64_t longest_row_bytes(std::uint32_t hidden_size) const {
    std::uint64_t longest = 0;
    for (std::uint32_t i = 0; i < kNumDTypes; ++i) {
      auto dtype = static_cast<DType>(i);
      std::uint64_t bytes = has(dtype) ? hidden_row_bytes(hidden_size, dtype) : 0;
      longest = bytes > longest ? bytes : longest;
    }
    return longest;
  }

 private:
  std::uint8_t bits_ = 0;
};

constexpr std::uint64_t chunk_hidden_offset(bool replay, std::uint32_t rows, std::uint32_t num_entries) {
  std::uint64_t metadata = replay ? 0 : rows * sizeof(RowMeta) + std::uint64_t{num_entries} * sizeof(RowEntry);
  return common::round_up<std::uint64_t>(sizeof(ChunkHeader) + metadata, 64);
}

constexpr std::uint64_t dispatch_chunk_bytes(bool replay, std::uint32_t rows, std::uint32_t num_entries,
                                             std::uint64_t row_bytes) {
  return chunk_hidden_offset(replay, rows, num_entries) + rows * row_bytes;
}

constexpr std::uint64_t combine_chunk_bytes(bool weight_grads, std::uint32_t rows, std::uint32_t top_k,
                                            std::uint64_t row_bytes) {
  return sizeof(ChunkHeader) + rows * row_bytes + (weight_grads ? std::uint64_t{rows} * top_k * sizeof(float) : 0);
}

// What a rank publishes of such a chunk: hidden[rows] in publish_dtype, float weight_grad[rows][top_k]; no header.
constexpr std::uint64_t publish_chunk_bytes(bool weight_grads, std::uint32_t rows, std::uint32_t top_k,
                                            std::uint64_t row_bytes) {
  return rows * row_bytes + (weight_grads ? std::uint64_t{rows} * top_k * sizeof(float) : 0);
}

// Rows of one (source, destination node) are cut into equal chunks; chunk_rows is the most a slot holds.
constexpr std::uint32_t rows_per_chunk(std::uint32_t rows, std::uint32_t num_nics, std::uint32_t chunk_rows) {
  std::uint32_t least = chunk_rows < 8 ? chunk_rows : 8;
  return common::clamp(common::ceil_div(rows, 2 * num_nics), least, chunk_rows);
}

// What a rank announces to every rail peer (and to its own node) at the start of an epoch. In a fresh dispatch
// uint32 counts[experts per node] follow: rows of this source for each expert of the destination node.
struct CountsRecord {
  std::uint32_t magic;
  std::uint16_t version;
  std::uint8_t phase;
  std::uint8_t flags;  // kFlagReplay, kFlagWeightGrads, kFlagStatic
  std::uint32_t source_rank;
  std::uint32_t dtype;  // on the wire
  std::uint64_t epoch;
  std::uint64_t call;       // number of the call in the group, both phases counted
  std::uint64_t plan_id;    // epoch of the dispatch that made the plan
  std::uint64_t first_seq;  // ring sequence number of the epoch's first chunk (dispatch)
  std::uint32_t rows;       // for the destination node (dispatch)
  std::uint32_t rows_per_chunk;
  std::uint32_t num_chunks;
  std::uint32_t capacity;          // static mode: rows of the output of the rank that announces
  std::uint32_t expert_alignment;  // static mode: of that output
  std::uint32_t reserved;
};
static_assert(sizeof(CountsRecord) == 72);

}  // namespace moe_efa::proto
