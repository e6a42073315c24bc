// The worked example of the wire document, byte for byte: what pack, announce and forward write, against its hex dumps.
#include <doctest/doctest.h>

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "kernels/cpu/announce.h"
#include "kernels/cpu/forward.h"
#include "kernels/cpu/pack.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/rows.h"
#include "kernels/row_math.h"

using namespace moe_efa;

namespace {

// Hex bytes of the fenced block that follows "<!-- dump: name -->" in the wire document.
std::string documented(const std::string& name) {
  auto path = std::filesystem::path(__FILE__).parent_path() / "../../../csrc/proto/README.md";
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  std::string all = text.str(), mark = "<!-- dump: " + name + " -->";
  std::size_t at = all.find(mark);
  REQUIRE(at != std::string::npos);
  std::size_t begin = all.find("```", at), line = all.find('\n', begin) + 1, end = all.find("```", line);
  std::string hex;
  std::istringstream lines(all.substr(line, end - line));
  for (std::string row; std::getline(lines, row);) {
    row = row.substr(0, row.find('#'));  // comments follow the bytes
    for (char c : row.substr(row.find(':') + 1)) {
      if (std::isxdigit(static_cast<unsigned char>(c))) hex += c;
    }
  }
  return hex;
}

std::string hex_of(const std::byte* bytes, std::size_t size) {
  std::string hex;
  char two[3];
  for (std::size_t i = 0; i < size; ++i) {
    std::snprintf(two, sizeof(two), "%02x", static_cast<unsigned>(bytes[i]));
    hex += two;
  }
  return hex;
}

// Rank 0 of 2 ranks on 2 nodes; hidden size 4, top-2 of 2 experts, bf16.
struct Example {
  proto::LayoutConfig config;
  proto::Topology topology{2, 1, 0};
  std::vector<std::byte> region;
  std::byte* regions[1];
  proto::NodeView view;
  kernels::RankState state{topology};
  engine::DescriptorRing descriptors{16};
  kernels::SerialExecutor executor;
  std::vector<std::int64_t> topk_idx{1, -1, 0, -1, 0, 1};
  std::vector<float> topk_weights{0.5f, 0, 1.0f, 0, 0.25f, 0.75f};
  std::vector<std::uint16_t> x;
  std::shared_ptr<kernels::Plan> plan;

  Example() {
    config.num_nodes = 2;
    config.top_k = 2;
    config.hidden_size = 4;
    proto::RegionLayout layout(config, 0);
    region.assign(layout.total_bytes(), std::byte{0});
    regions[0] = region.data();
    view = {topology, layout, regions};
    for (int i = 1; i <= 12; ++i) x.push_back(kernels::float_to_bf16(static_cast<float>(i)));
    plan = kernels::cpu::build_send_plan({topk_idx.data(), topk_weights.data(), 3, 1, 1}, view);
  }
};

}  // namespace

TEST_CASE("the counts record that rank 0 writes to rank 1") {
  Example e;
  kernels::CallContext context{e.view, e.state, &e.descriptors, e.executor};
  const kernels::RingFacts* facts[] = {&e.plan->send[0].facts, &e.plan->send[1].facts};
  const std::vector<std::uint32_t>* counts[] = {&e.plan->send[0].expert_counts, &e.plan->send[1].expert_counts};
  std::uint64_t first_seq[] = {0, 0};
  kernels::cpu::announce(context, {proto::Phase::kDispatch, 0, 0, 0, 0, proto::DType::kBf16}, facts, first_seq, counts);
  engine::Descriptor descriptor;
  REQUIRE(e.descriptors.pop(&descriptor));
  CHECK(descriptor.bytes == 76);
  CHECK(hex_of(e.region.data() + e.view.layout.counts_send(proto::Phase::kDispatch, 1, 0), 76) == documented("counts"));
  CHECK(proto::Imm::make(proto::ImmKind::kDispatchCounts, false, 0, 0, 0).encode() == 0x60000000u);
}

TEST_CASE("the dispatch chunk that rank 0 writes to rank 1") {
  Example e;
  kernels::DispatchArgs args{e.x.data(), proto::DType::kBf16, proto::DType::kBf16, proto::DType::kBf16, e.plan};
  std::vector<std::byte> slot(e.view.layout.slot_bytes(proto::Phase::kDispatch));
  std::uint32_t bytes = kernels::cpu::pack_chunk({&args, 1, 0, 0, 0, slot.data()}, e.view);
  CHECK(bytes == 160);
  CHECK(hex_of(slot.data(), bytes) == documented("dispatch chunk"));
  CHECK(proto::Imm::make(proto::ImmKind::kDispatchChunk, true, 0, 0, 0).encode() == 0x30000000u);
}

TEST_CASE("the fp8 row of token 0") {
  Example e;
  std::vector<std::byte> row(proto::hidden_row_bytes(4, proto::DType::kFp8));
  kernels::cpu::convert_row(row.data(), proto::DType::kFp8, e.x.data(), proto::DType::kBf16, 4, proto::Fp8Scale::kFp32);
  CHECK(hex_of(row.data(), row.size()) == documented("fp8 row"));
}

TEST_CASE("the combine chunk that rank 1 writes to rank 0") {
  Example e;  // seen from rank 1: its expert doubled the rows
  e.topology.rank = 1;
  e.view.topology = e.topology;
  e.view.layout = proto::RegionLayout(e.config, 1);
  auto plan = std::make_shared<kernels::Plan>();
  plan->rings = {{2, 2, 1}, {0, 0, 0}};
  plan->masks = {{1, 1}, {}};
  plan->pulls = {{{{0u << kernels::PullEntry::kTopKBits | 0, 0}, {1u << kernels::PullEntry::kTopKBits | 1, 1}}}, {}};
  std::vector<std::uint16_t> y;
  for (float value : {2, 4, 6, 8, 18, 20, 22, 24}) y.push_back(kernels::float_to_bf16(value));
  float weights[] = {0.5f, 0.75f};
  kernels::CombineArgs args;
  args.y = y.data();
  args.weights = weights;
  args.y_dtype = args.wire_dtype = proto::DType::kBf16;
  args.plan = plan;
  std::vector<std::byte> slot(e.view.layout.slot_bytes(proto::Phase::kCombine));
  std::uint32_t bytes = kernels::cpu::forward_chunk({&args, 0, 0, 0, 0, slot.data()}, e.view);
  CHECK(bytes == 96);
  CHECK(hex_of(slot.data(), bytes) == documented("combine chunk"));
  CHECK(proto::Imm::make(proto::ImmKind::kCombineChunk, true, 0, 1, 0).encode() == 0x50004000u);
}
