#include "kernels/cuda/plan_view.h"

#include <algorithm>
#include <cstring>

namespace moe_efa::kernels::cuda {

std::size_t FlatPlan::take(std::size_t bytes) {
  std::size_t at = bytes_.size();
  bytes_.resize(common::round_up<std::size_t>(at + bytes, 16));
  return at;
}

template <typename T>
std::size_t FlatPlan::take(const std::vector<T>& values) {
  std::size_t at = take(values.size() * sizeof(T));
  if (!values.empty()) std::memcpy(bytes_.data() + at, values.data(), values.size() * sizeof(T));
  return at;
}

FlatPlan::FlatPlan(const Plan& plan, const std::vector<std::uint32_t>& num_pulls) {
  view_.num_tokens = plan.num_tokens;
  view_.num_nodes = static_cast<std::uint32_t>(std::max(plan.send.size(), plan.masks.size()));
  view_.num_rings = static_cast<std::uint32_t>(plan.rings.size());
  view_.mask_bytes = plan.mask_bytes;
  for (const SendPlan& send : plan.send) {
    view_.send_chunks = std::max(view_.send_chunks, send.facts.num_chunks);
    view_.send_chunk_rows = std::max(view_.send_chunk_rows, std::min(send.facts.rows, send.facts.rows_per_chunk));
    send_.push_back({send.facts, nullptr, nullptr, nullptr});
    send_offsets_.push_back(take(send.row_token));
    send_offsets_.push_back(take(send.entry_begin));
    send_offsets_.push_back(take(send.entries));
  }
  std::vector<std::uint32_t> pull_begin, pull_count, first_mask;
  std::vector<PullEntry> pulls;
  for (std::size_t i = 0; i < plan.rings.size(); ++i) {
    RingView ring{plan.rings[i], view_.num_chunks, static_cast<std::uint32_t>(pulls.size()), 0};
    view_.num_chunks += ring.facts.num_chunks;
    view_.ring_chunks = std::max(view_.ring_chunks, ring.facts.num_chunks);
    for (std::uint32_t chunk = 0; chunk < ring.facts.num_chunks; ++chunk) {
      static const std::vector<PullEntry> kNone;
      const std::vector<PullEntry>& of_chunk = i < plan.pulls.size() ? plan.pulls[i][chunk] : kNone;
      pull_begin.push_back(static_cast<std::uint32_t>(pulls.size()));
      pull_count.push_back(static_cast<std::uint32_t>(of_chunk.size()));
      pulls.insert(pulls.end(), of_chunk.begin(), of_chunk.end());
    }
    ring.num_pulls = static_cast<std::uint32_t>(pulls.size()) - ring.first_pull;
    if (i < num_pulls.size()) {
      ring.num_pulls = num_pulls[i];
      pulls.resize(ring.first_pull + ring.num_pulls);
    }
    rings_.push_back(ring);
  }
  std::size_t mask_bytes = 0;
  for (const std::vector<std::uint8_t>& mask : plan.masks) {
    first_mask.push_back(static_cast<std::uint32_t>(mask_bytes));
    mask_bytes += mask.size();
  }
  send_at_ = take(send_);
  rings_at_ = take(rings_);
  pull_begin_at_ = take(pull_begin);
  pull_count_at_ = take(pull_count);
  pulls_at_ = take(pulls);
  first_mask_at_ = take(first_mask);
  masks_at_ = take(mask_bytes);
  for (std::size_t node = 0; node < plan.masks.size(); ++node) {
    std::copy(plan.masks[node].begin(), plan.masks[node].end(),
              reinterpret_cast<std::uint8_t*>(bytes_.data() + masks_at_ + first_mask[node]));
  }
  if (!plan.is_static()) return;
  std::vector<std::uint64_t> chunk_overflow(std::size_t{view_.num_nodes} * view_.ring_chunks);
  for (std::size_t node = 0; node < plan.chunk_overflow.size(); ++node) {
    std::copy(plan.chunk_overflow[node].begin(), plan.chunk_overflow[node].end(),
              chunk_overflow.begin() + static_cast<std::ptrdiff_t>(node * view_.ring_chunks));
  }
  overflow_at_ = take(std::vector<std::int64_t>{*plan.overflow});
  chunk_overflow_at_ = take(chunk_overflow);
}

PlanView FlatPlan::place(std::byte* base) {
  for (std::size_t node = 0; node < send_.size(); ++node) {
    const std::size_t* offsets = &send_offsets_[3 * node];
    send_[node].row_token = reinterpret_cast<const std::uint32_t*>(base + offsets[0]);
    send_[node].entry_begin = reinterpret_cast<const std::uint32_t*>(base + offsets[1]);
    send_[node].entries = reinterpret_cast<const proto::RowEntry*>(base + offsets[2]);
  }
  if (!send_.empty()) std::memcpy(bytes_.data() + send_at_, send_.data(), send_.size() * sizeof(SendView));
  PlanView view = view_;
  view.send = reinterpret_cast<const SendView*>(base + send_at_);
  view.rings = reinterpret_cast<const RingView*>(base + rings_at_);
  view.pull_begin = reinterpret_cast<std::uint32_t*>(base + pull_begin_at_);
  view.pull_count = reinterpret_cast<std::uint32_t*>(base + pull_count_at_);
  view.pulls = reinterpret_cast<PullEntry*>(base + pulls_at_);
  view.first_mask = reinterpret_cast<const std::uint32_t*>(base + first_mask_at_);
  view.masks = reinterpret_cast<std::uint8_t*>(base + masks_at_);
  if (overflow_at_ > 0) {
    view.overflow = reinterpret_cast<std::uint64_t*>(base + overflow_at_);
    view.chunk_overflow = reinterpret_cast<std::uint64_t*>(base + chunk_overflow_at_);
  }
  return view;
}

void read_back(const PlanView& view, Plan* plan) {
  plan->pulls.resize(view.num_rings);
  for (std::uint32_t i = 0; i < view.num_rings; ++i) {
    const RingView& ring = view.rings[i];
    plan->pulls[i].resize(ring.facts.num_chunks);
    for (std::uint32_t chunk = 0; chunk < ring.facts.num_chunks; ++chunk) {
      const PullEntry* begin = view.pulls + view.pull_begin[ring.first_chunk + chunk];
      plan->pulls[i][chunk].assign(begin, begin + view.pull_count[ring.first_chunk + chunk]);
    }
  }
  for (std::uint32_t node = 0; node < view.num_nodes; ++node) {
    std::vector<std::uint8_t>& mask = plan->masks[node];
    std::copy_n(view.masks + view.first_mask[node], mask.size(), mask.begin());
    if (plan->chunk_overflow.empty()) continue;
    std::vector<std::uint64_t>& overflow = plan->chunk_overflow[node];
    std::copy_n(view.chunk_overflow + std::size_t{node} * view.ring_chunks, overflow.size(), overflow.begin());
  }
}

}  // namespace moe_efa::kernels::cuda
