// What the engine costs per chunk: the state machine fed by hand on one core, no network, no rows, no threads. For
// every node in turn a rank sends one chunk and receives one; completions, releases and credits follow as in a round.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "bindings/bindings.h"
#include "engine/engine.h"

namespace moe_efa::bindings {

namespace py = pybind11;
using proto::Imm;
using proto::Phase;

namespace {

constexpr std::uint32_t kSlots = 32, kChunkRows = 64, kHidden = 8, kTopK = 8;
constexpr std::uint32_t kChunksPerEpoch = 64;  // towards each node
// What a kernel copies between two chunks (H = 7168, bf16), out of and into a ring of such chunks.
constexpr std::size_t kCopyBytes = std::size_t{kChunkRows} * 7168 * 2, kCopySlots = 16;
constexpr Phase kPhase = Phase::kDispatch;

class EngineLoop {
 public:
  explicit EngineLoop(std::uint32_t num_nodes)
      : layout_(config(num_nodes), 0),
        region_(layout_.total_bytes()),
        engine_({{num_nodes, 1, 0}, config(num_nodes), 1, 4 * kSlots, region_.data()}) {}

  // One chunk to and from every other node; returns the seconds in the engine.
  double step() {
    if (seq_ % kChunksPerEpoch == 0) begin_epoch();
    write_headers();
    auto begin = std::chrono::steady_clock::now();
    for (std::uint32_t node = 1; node < layout_.config().num_nodes; ++node) {
      std::uint8_t flags = is_last() ? engine::Descriptor::kLast : std::uint8_t{0};
      engine_.on_descriptor({static_cast<std::uint16_t>(node), 0, flags, kChunkRows, chunk_bytes(), 0});
      engine_.on_remote_imm(Imm::make(proto::chunk_kind(kPhase), is_last(), epoch_ - 1, node, seq_).encode(), 0);
      events_ += 2;
    }
    serve();
    for (std::uint32_t node = 1; node < layout_.config().num_nodes; ++node) {
      engine_.on_released(kPhase, node, seq_ + 1);
      // A peer credits in batches of a quarter of the ring, and what is left at the end.
      if (seq_ % (kSlots / 4) == 0 || is_last()) {
        engine_.on_remote_imm(Imm::make(proto::credit_kind(kPhase), false, 0, node, seq_ + 1).encode(), 0);
        ++events_;
      }
      ++events_;
    }
    serve();
    double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    ++seq_;
    MOE_EFA_CHECK(!engine_.failed(), "the engine refused: " << engine_.failure().message);
    return seconds;
  }

  std::uint64_t events() const { return events_; }

 private:
  static proto::LayoutConfig config(std::uint32_t num_nodes) {
    proto::LayoutConfig config;
    config.num_nodes = num_nodes;
    config.experts_per_rank = 1;
    config.top_k = kTopK;
    config.hidden_size = kHidden;
    config.chunk_rows = kChunkRows;
    config.slots = kSlots;
    return config;
  }

  bool is_last() const { return seq_ % kChunksPerEpoch == kChunksPerEpoch - 1; }

  std::uint32_t chunk_bytes() const {
    std::uint64_t row_bytes = proto::hidden_row_bytes(kHidden, proto::DType::kFp32);
    return static_cast<std::uint32_t>(proto::dispatch_chunk_bytes(false, kChunkRows, kChunkRows, row_bytes));
  }

  // Posts what may be posted and completes it at once; takes the actions.
  void serve() {
    while (auto write = engine_.next_write()) {
      engine_.on_posted(*write);
      engine_.on_write_done(write->id);
      events_ += 2;
    }
    events_ += engine_.actions().size();
    engine_.actions().clear();
  }

  // Counts towards and from every node: paid once per epoch and not timed here.
  void begin_epoch() {
    engine_.on_begun(kPhase, epoch_ + 1);
    for (std::uint32_t node = 1; node < layout_.config().num_nodes; ++node) {
      auto epoch = static_cast<std::uint32_t>(epoch_);
      engine_.on_descriptor(
          {static_cast<std::uint16_t>(node), 0, engine::Descriptor::kCounts, kChunksPerEpoch, 64, epoch});
    }
    serve();
    ++epoch_;
  }

  // What the network would have brought.
  void write_headers() {
    for (std::uint32_t node = 1; node < layout_.config().num_nodes; ++node) {
      proto::ChunkHeader header{};
      header.magic = proto::kChunkMagic;
      header.version = proto::kProtocolVersion;
      header.flags = is_last() ? proto::kFlagLast : std::uint8_t{0};
      header.source_rank = node;
      header.dtype = static_cast<std::uint32_t>(proto::DType::kFp32);
      header.epoch = epoch_ - 1;
      header.seq = seq_;
      header.rows = kChunkRows;
      header.num_entries = kChunkRows;
      header.total_bytes = chunk_bytes();
      std::memcpy(region_.data() + layout_.ring_slot(kPhase, node, seq_), &header, sizeof(header));
    }
  }

  proto::RegionLayout layout_;
  std::vector<std::byte> region_;
  engine::Engine engine_;
  std::uint64_t seq_ = 0, epoch_ = 0, events_ = 0;
};

py::dict engine_cost(std::uint64_t chunks, std::uint32_t num_nodes, bool copying) {
  if (chunks == 0 || num_nodes < 2 || num_nodes > proto::kMaxNodes) {
    throw py::value_error("engine_cost needs chunks and 2 to " + std::to_string(proto::kMaxNodes) + " nodes");
  }
  double seconds = 0;
  std::uint64_t steps = std::max<std::uint64_t>(1, chunks / (num_nodes - 1)), events = 0;
  {
    py::gil_scoped_release release;
    EngineLoop loop(num_nodes);
    std::vector<std::byte> from(copying ? kCopySlots * kCopyBytes : 0), into(from.size());
    for (std::uint64_t i = 0; i < kChunksPerEpoch; ++i) loop.step();
    std::uint64_t warmed = loop.events();
    for (std::uint64_t i = 0; i < steps; ++i) {
      for (std::uint64_t chunk = 0; copying && chunk < num_nodes - 1; ++chunk) {
        std::size_t offset = (i + chunk) % kCopySlots * kCopyBytes;
        std::memcpy(into.data() + offset, from.data() + offset, kCopyBytes);
      }
      seconds += loop.step();
    }
    events = loop.events() - warmed;
  }
  double per_chunk = 1.0 / static_cast<double>(steps * (num_nodes - 1));
  py::dict out;
  out["us_per_chunk"] = 1e6 * seconds * per_chunk;
  out["events_per_chunk"] = static_cast<double>(events) * per_chunk;
  return out;
}

}  // namespace

void bind_engine_cost(py::module_& module) {
  module.def("engine_cost", &engine_cost, "Microseconds that the engine takes per chunk sent and received.",
             py::arg("chunks"), py::kw_only(), py::arg("num_nodes") = 2, py::arg("copying") = false);
}

}  // namespace moe_efa::bindings
