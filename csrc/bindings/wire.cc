// The constants of the wire as data, so that a test can hold the wire document against them.
#include <cstddef>

#include "bindings/bindings.h"
#include "proto/chunk.h"
#include "proto/imm.h"
#include "proto/region.h"

namespace moe_efa::bindings {

namespace py = pybind11;

namespace {

#define MOE_EFA_FIELD(type, field) \
  fields[#field] = py::make_tuple(offsetof(proto::type, field), sizeof(proto::type::field))

py::dict structs() {
  py::dict out;
  {
    py::dict fields;
    MOE_EFA_FIELD(ChunkHeader, magic);
    MOE_EFA_FIELD(ChunkHeader, version);
    MOE_EFA_FIELD(ChunkHeader, phase);
    MOE_EFA_FIELD(ChunkHeader, flags);
    MOE_EFA_FIELD(ChunkHeader, source_rank);
    MOE_EFA_FIELD(ChunkHeader, dtype);
    MOE_EFA_FIELD(ChunkHeader, epoch);
    MOE_EFA_FIELD(ChunkHeader, seq);
    MOE_EFA_FIELD(ChunkHeader, plan_id);
    MOE_EFA_FIELD(ChunkHeader, rows);
    MOE_EFA_FIELD(ChunkHeader, first_row);
    MOE_EFA_FIELD(ChunkHeader, num_entries);
    MOE_EFA_FIELD(ChunkHeader, total_bytes);
    MOE_EFA_FIELD(ChunkHeader, required_capacity);
    out["ChunkHeader"] = fields;
  }
  {
    py::dict fields;
    MOE_EFA_FIELD(CountsRecord, magic);
    MOE_EFA_FIELD(CountsRecord, version);
    MOE_EFA_FIELD(CountsRecord, phase);
    MOE_EFA_FIELD(CountsRecord, flags);
    MOE_EFA_FIELD(CountsRecord, source_rank);
    MOE_EFA_FIELD(CountsRecord, dtype);
    MOE_EFA_FIELD(CountsRecord, epoch);
    MOE_EFA_FIELD(CountsRecord, call);
    MOE_EFA_FIELD(CountsRecord, plan_id);
    MOE_EFA_FIELD(CountsRecord, first_seq);
    MOE_EFA_FIELD(CountsRecord, rows);
    MOE_EFA_FIELD(CountsRecord, rows_per_chunk);
    MOE_EFA_FIELD(CountsRecord, num_chunks);
    MOE_EFA_FIELD(CountsRecord, capacity);
    MOE_EFA_FIELD(CountsRecord, expert_alignment);
    MOE_EFA_FIELD(CountsRecord, reserved);
    out["CountsRecord"] = fields;
  }
  {
    py::dict fields;
    MOE_EFA_FIELD(RowMeta, token_idx);
    MOE_EFA_FIELD(RowMeta, num_entries);
    out["RowMeta"] = fields;
  }
  {
    py::dict fields;
    MOE_EFA_FIELD(RowEntry, index);
    MOE_EFA_FIELD(RowEntry, expert);
    MOE_EFA_FIELD(RowEntry, topk_pos);
    MOE_EFA_FIELD(RowEntry, weight);
    out["RowEntry"] = fields;
  }
  return out;
}

#undef MOE_EFA_FIELD

// On which side of RegionLayout::slots_begin() the parts of a region lie, or may lie.
py::dict parts() {
  proto::LayoutConfig config;
  config.num_nodes = config.node_size = 2;
  const proto::RegionLayout layout(config, 0);
  constexpr auto kPhase = proto::Phase::kDispatch;
  py::dict out;
  auto put = [&](const char* name, std::uint64_t offset) {
    out[name] = layout.only_kernels_read(offset) ? "before, or behind"
                : offset < layout.slots_begin()  ? "before"
                                                 : "slots";
  };
  put("flags", layout.kernel_words_begin() - 1);
  put("kernel_words", layout.kernel_words_begin());
  put("counts", layout.counts(kPhase, 1, 1));
  put("counts_send", layout.counts_send(proto::Phase::kCombine, 1, 1) + layout.counts_bytes() - 1);
  put("ring", layout.ring_slot(kPhase, 1, 0));
  put("send", layout.send_slot(kPhase, 1, 0));
  put("publish", layout.publish_slot(0, 0, 0));
  return out;
}

py::dict wire_layout() {
  using proto::ImmKind;
  py::dict imm, kinds, flags, dtypes, out;
  imm["kind"] = py::make_tuple(proto::kImmKindShift, proto::kImmKindBits);
  imm["last"] = py::make_tuple(proto::kImmLastShift, proto::kImmLastBits);
  imm["epoch"] = py::make_tuple(proto::kImmEpochShift, proto::kImmEpochBits);
  imm["source_node"] = py::make_tuple(proto::kImmNodeShift, proto::kImmNodeBits);
  imm["value"] = py::make_tuple(0, proto::kImmValueBits);
  kinds["dispatch chunk"] = static_cast<int>(ImmKind::kDispatchChunk);
  kinds["combine chunk"] = static_cast<int>(ImmKind::kCombineChunk);
  kinds["dispatch counts"] = static_cast<int>(ImmKind::kDispatchCounts);
  kinds["combine counts"] = static_cast<int>(ImmKind::kCombineCounts);
  kinds["dispatch credit"] = static_cast<int>(ImmKind::kDispatchCredit);
  kinds["combine credit"] = static_cast<int>(ImmKind::kCombineCredit);
  kinds["hello"] = static_cast<int>(ImmKind::kHello);
  flags["replay"] = proto::kFlagReplay;
  flags["weight gradients"] = proto::kFlagWeightGrads;
  flags["last"] = proto::kFlagLast;
  flags["static"] = proto::kFlagStatic;
  for (std::uint32_t i = 0; i < proto::kNumDTypes; ++i) dtypes[proto::dtype_name(static_cast<proto::DType>(i))] = i;
  out["protocol_version"] = proto::kProtocolVersion;
  out["imm"] = imm;
  out["kinds"] = kinds;
  out["flags"] = flags;
  out["dtypes"] = dtypes;
  out["structs"] = structs();
  out["parts"] = parts();
  return out;
}

}  // namespace

void bind_wire(py::module_& module) {
  module.def("wire_layout", &wire_layout, "Bit positions, kinds, flags and struct fields of the wire.");
}

}  // namespace moe_efa::bindings
