#include "kernels/cpu/announced_rings.h"

#include <algorithm>
#include <cstring>
#include <sstream>

#include "common/status.h"

namespace moe_efa::kernels::cpu {

namespace {

constexpr auto kPhase = proto::Phase::kDispatch;

[[noreturn]] void reject(const Announcement& own, std::uint32_t rank, const char* what) {
  std::ostringstream text;
  text << "counts of rank " << rank << " in dispatch, epoch " << own.epoch << ": " << what;
  throw common::StatusError({common::StatusCode::kProtocol, static_cast<int>(rank), static_cast<int>(kPhase),
                             static_cast<std::int64_t>(own.epoch), -1, text.str()});
}

std::size_t ring_index(const proto::NodeView& view, std::uint32_t local, std::uint32_t node) {
  return std::size_t{local} * view.topology.num_nodes() + node;
}

}  // namespace

AnnouncedRings::AnnouncedRings(const CallContext& context, const Announcement& own, const Plan& plan) {
  const proto::LayoutConfig& config = context.view.layout.config();
  std::size_t num_rings = std::size_t{config.node_size} * config.num_nodes;
  rings_.resize(num_rings);
  if (plan.complete) return;
  expert_counts_.assign(num_rings * config.experts_per_rank, 0);
  expert_base_.assign(num_rings * config.experts_per_rank, 0);
  if ((own.flags & proto::kFlagStatic) != 0) static_sizes_.emplace(context.view);
}

bool AnnouncedRings::step(const CallContext& context, const Announcement& own, const Plan& plan) {
  if (complete_) return false;
  const proto::NodeView& view = context.view;
  const proto::LayoutConfig& config = view.layout.config();
  bool moved = false, all = true;
  for (std::uint32_t local = 0; local < config.node_size; ++local) {
    for (std::uint32_t node = 0; node < config.num_nodes; ++node) {
      AnnouncedRing& ring = rings_[ring_index(view, local, node)];
      if (ring.announced) continue;
      proto::CountsRecord record;
      if (!read_announcement(context, own, local, node, &record)) {
        all = false;
        continue;
      }
      moved = ring.announced = true;
      std::uint32_t source = view.topology.rank_of(node, local);
      ring.first_seq = record.first_seq;
      ring.facts = {record.rows, record.rows_per_chunk, record.num_chunks};
      ring.wire_dtype = static_cast<proto::DType>(record.dtype);
      std::uint64_t& seen = context.state.dispatch_seen[ring_index(view, local, node)];
      if (record.first_seq != seen) reject(own, source, "its ring position differs from what was received");
      seen += record.num_chunks;
      if (!plan.complete) {
        read_counts(context, own, local, node, record);
      } else if (ring.facts != plan.rings[ring_index(view, local, node)]) {
        reject(own, source, "rows differ from the plan's");
      }
    }
  }
  if (!all && !moved) check_other_phase(context, own);
  complete_ = all;
  return moved || all;
}

void AnnouncedRings::read_counts(const CallContext& context, const Announcement& own, std::uint32_t local,
                                 std::uint32_t node, const proto::CountsRecord& record) {
  const proto::NodeView& view = context.view;
  const proto::LayoutConfig& config = view.layout.config();
  std::uint32_t source = view.topology.rank_of(node, local);
  std::vector<std::uint32_t> counts(config.experts_per_rank * config.node_size);
  std::memcpy(counts.data(), view.region(local) + view.layout.counts(kPhase, node, own.epoch) + sizeof(record),
              counts.size() * 4);
  std::uint64_t total = 0;
  for (std::uint32_t count : counts) total += count;
  if (total < record.rows || total > std::uint64_t{record.rows} * config.top_k) {
    reject(own, source, "per-expert counts do not add up");
  }
  std::copy_n(counts.begin() + view.topology.local_rank() * config.experts_per_rank, config.experts_per_rank,
              expert_counts_.begin() + std::size_t{source} * config.experts_per_rank);
  if (!static_sizes_) return;
  if (record.capacity > INT32_MAX || record.expert_alignment == 0) reject(own, source, "an impossible output");
  static_sizes_->set_counts(source, counts.data());
  if (node == view.topology.node()) static_sizes_->set_output(local, record.capacity, record.expert_alignment);
}

void AnnouncedRings::size_plan(const CallContext& context, const Announcement& own, Plan& plan) {
  const proto::NodeView& view = context.view;
  const proto::LayoutConfig& config = view.layout.config();
  plan.tokens_per_expert.assign(config.experts_per_rank, 0);
  plan.offsets.assign(config.experts_per_rank + 1, 0);
  for (std::uint32_t expert = 0; expert < config.experts_per_rank; ++expert) {
    // Expert, then source rank, then source token: nothing here depends on arrival (I3).
    std::int64_t row = plan.offsets[expert];
    for (std::uint32_t source = 0; source < view.topology.num_ranks; ++source) {
      expert_base_[std::size_t{source} * config.experts_per_rank + expert] = row;
      row += expert_counts_[std::size_t{source} * config.experts_per_rank + expert];
    }
    plan.tokens_per_expert[expert] = row - plan.offsets[expert];
    plan.offsets[expert + 1] =
        plan.offsets[expert] + common::round_up<std::int64_t>(plan.tokens_per_expert[expert], plan.expert_alignment);
  }
  if (static_sizes_) fit_capacity(plan);
  if (plan.offsets.back() > INT32_MAX) {
    throw common::StatusError({common::StatusCode::kInternal, -1, static_cast<int>(kPhase),
                               static_cast<std::int64_t>(own.epoch), -1, "more than 2^31 rows for one rank"});
  }
  plan.rings.clear();
  for (const AnnouncedRing& ring : rings_) plan.rings.push_back(ring.facts);
  plan.mask_bytes = common::ceil_div(config.node_size, 8u);
}

// Places stay what they are; those that the output does not have are cut off, whosever they are.
void AnnouncedRings::fit_capacity(Plan& plan) {
  static_sizes_->finish();
  std::int64_t usable = plan.usable_rows();
  if (plan.offsets.back() > usable) plan.raise_overflow(static_cast<std::uint64_t>(plan.offsets.back()));
  for (std::size_t expert = 0; expert < plan.tokens_per_expert.size(); ++expert) {
    std::int64_t end = std::min(plan.offsets[expert] + plan.tokens_per_expert[expert], usable);
    plan.offsets[expert] = std::min(plan.offsets[expert], usable);
    plan.tokens_per_expert[expert] = end - plan.offsets[expert];
  }
  plan.offsets.back() = std::min(plan.offsets.back(), usable);
}

}  // namespace moe_efa::kernels::cpu
