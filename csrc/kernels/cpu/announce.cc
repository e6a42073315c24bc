#include "kernels/cpu/announce.h"

#include <cstring>
#include <sstream>

#include "common/atomic.h"
#include "common/mutant.h"
#include "common/status.h"

namespace moe_efa::kernels::cpu {

using common::load_acquire;
using common::Mutant;
using common::mutant;
using common::store_release;
using proto::CountsRecord;
using proto::Phase;

namespace {

[[noreturn]] void mismatch(const CallContext& context, const Announcement& own, int rank, const CountsRecord& record) {
  auto describe = [](std::ostringstream& text, Phase phase, std::uint64_t epoch, std::uint64_t plan, std::uint8_t flags,
                     std::uint32_t dtype, std::uint64_t call) {
    bool replay = (flags & proto::kFlagReplay) != 0;
    bool grads = (flags & proto::kFlagWeightGrads) != 0;
    bool fixed = (flags & proto::kFlagStatic) != 0;
    text << proto::phase_name(phase) << " epoch " << epoch << (replay ? ", replaying" : ", of") << " plan " << plan
         << (grads ? " with weight gradients" : "") << (fixed ? " with a capacity" : "") << " in "
         << proto::dtype_name(static_cast<proto::DType>(dtype)) << " as call " << call;
  };
  std::ostringstream text;
  text << "ranks issued different calls: rank " << context.view.topology.rank << " is in ";
  describe(text, own.phase, own.epoch, own.plan_id, own.flags, static_cast<std::uint32_t>(own.dtype), own.call);
  text << ", rank " << rank << " is in ";
  describe(text, static_cast<Phase>(record.phase), record.epoch, record.plan_id, record.flags, record.dtype,
           record.call);
  if (((own.flags | record.flags) & (proto::kFlagReplay | proto::kFlagWeightGrads)) != 0) {
    text << " (backward replays plans and carries weight gradients: did one rank skip backward(), or has an input "
            "requires_grad on some ranks only?)";
  }
  throw common::StatusError({common::StatusCode::kProtocol, rank, static_cast<int>(own.phase),
                             static_cast<std::int64_t>(own.epoch), -1, text.str()});
}

bool read_record(const CallContext& context, Phase phase, std::uint64_t epoch, std::uint32_t board, std::uint32_t node,
                 CountsRecord* record) {
  const proto::NodeView& view = context.view;
  const std::byte* bytes = view.region(board) + view.layout.counts(phase, node, epoch);
  if (mutant(Mutant::kCountsTrustedEarly)) {
    std::memcpy(record, bytes, sizeof(*record));
    return record->magic == proto::kCountsMagic && record->epoch == epoch;
  }
  // Pairs with the release of whoever validated the record.
  if (load_acquire(view.word(board, view.layout.counts_ready(phase, node, epoch))) != epoch + 1) return false;
  std::memcpy(record, bytes, sizeof(*record));
  return true;
}

}  // namespace

Announcement next_dispatch(RankState& state, const DispatchArgs& args) {
  Plan& plan = *args.plan;
  Announcement own;
  own.phase = Phase::kDispatch;
  own.epoch = state.epoch[0]++;
  own.call = state.call++;
  if (!plan.complete) plan.plan_id = own.epoch;
  own.plan_id = plan.plan_id;
  own.dtype = args.wire_dtype;
  if (plan.complete) {
    own.flags = proto::kFlagReplay;
  } else if (plan.is_static()) {
    own.flags = proto::kFlagStatic;
    own.capacity = static_cast<std::uint32_t>(plan.capacity);
    own.expert_alignment = plan.expert_alignment;
  }
  return own;
}

Announcement next_combine(RankState& state, const CombineArgs& args) {
  Announcement own;
  own.phase = Phase::kCombine;
  own.epoch = state.epoch[1]++;
  own.call = state.call++;
  own.plan_id = args.plan->plan_id;
  own.flags = args.weight_grads != nullptr ? proto::kFlagWeightGrads : 0;
  own.dtype = args.wire_dtype;
  return own;
}

bool may_begin(const CallContext& context, const Announcement& own) {
  const proto::NodeView& view = context.view;
  return view.topology.num_nodes() == 1 || load_acquire(view.own_word(view.layout.retired(own.phase))) + 1 >= own.epoch;
}

void announce(const CallContext& context, const Announcement& own, const RingFacts* const* facts,
              const std::uint64_t* first_seq, const std::vector<std::uint32_t>* const* expert_counts) {
  const proto::NodeView& view = context.view;
  store_release(view.own_word(view.layout.begun(own.phase)), own.epoch + 1);
  std::uint32_t own_node = view.topology.node();
  for (std::uint32_t node = 0; node < view.topology.num_nodes(); ++node) {
    CountsRecord record{};
    record.magic = proto::kCountsMagic;
    record.version = proto::kProtocolVersion;
    record.phase = static_cast<std::uint8_t>(own.phase);
    record.flags = own.flags;
    record.source_rank = view.topology.rank;
    record.dtype = static_cast<std::uint32_t>(own.dtype);
    record.epoch = own.epoch;
    record.call = own.call;
    record.plan_id = own.plan_id;
    record.first_seq = first_seq[node];
    record.rows = facts[node]->rows;
    record.rows_per_chunk = facts[node]->rows_per_chunk;
    record.num_chunks = facts[node]->num_chunks;
    record.capacity = own.capacity;
    record.expert_alignment = own.expert_alignment;
    std::uint64_t offset = node == own_node ? view.layout.counts(own.phase, node, own.epoch)
                                            : view.layout.counts_send(own.phase, node, own.epoch);
    std::byte* to = view.own() + offset;
    std::memcpy(to, &record, sizeof(record));
    std::size_t bytes = sizeof(record);
    if (expert_counts != nullptr) {
      std::memcpy(to + bytes, expert_counts[node]->data(), expert_counts[node]->size() * 4);
      bytes += expert_counts[node]->size() * 4;
    }
    if (node == own_node) {
      // Publishes the record to the mates.
      store_release(view.own_word(view.layout.counts_ready(own.phase, node, own.epoch)), own.epoch + 1);
    } else {
      context.descriptors->push({static_cast<std::uint16_t>(node), static_cast<std::uint8_t>(own.phase),
                                 engine::Descriptor::kCounts, record.num_chunks, static_cast<std::uint32_t>(bytes),
                                 static_cast<std::uint32_t>(own.epoch)});
    }
  }
  context.ring_all();
}

bool read_announcement(const CallContext& context, const Announcement& own, std::uint32_t board, std::uint32_t node,
                       CountsRecord* record) {
  if (!read_record(context, own.phase, own.epoch, board, node, record)) return false;
  auto rank = static_cast<int>(context.view.topology.rank_of(node, board));
  if (record->call != own.call || record->plan_id != own.plan_id || record->flags != own.flags ||
      record->dtype != static_cast<std::uint32_t>(own.dtype) || record->epoch != own.epoch ||
      record->source_rank != static_cast<std::uint32_t>(rank)) {
    mismatch(context, own, rank, *record);
  }
  return true;
}

void check_other_phase(const CallContext& context, const Announcement& own) {
  Phase other = own.phase == Phase::kDispatch ? Phase::kCombine : Phase::kDispatch;
  std::uint64_t next = context.state.epoch[static_cast<std::uint32_t>(other)];
  const proto::Topology& topology = context.view.topology;
  for (std::uint32_t board = 0; board < topology.node_size; ++board) {
    for (std::uint32_t node = 0; node < topology.num_nodes(); ++node) {
      CountsRecord record;
      if (read_record(context, other, next, board, node, &record) && record.call == own.call) {
        mismatch(context, own, static_cast<int>(topology.rank_of(node, board)), record);
      }
    }
  }
}

int absent_rank(const CallContext& context, const Announcement& own) {
  const proto::Topology& topology = context.view.topology;
  for (std::uint32_t rank = 0; rank < topology.num_ranks; ++rank) {
    std::uint32_t board = rank % topology.node_size, node = rank / topology.node_size;
    CountsRecord record;
    // A rank that has gone on to the next epoch was here too.
    if (!read_record(context, own.phase, own.epoch, board, node, &record) &&
        !read_record(context, own.phase, own.epoch + 1, board, node, &record)) {
      return static_cast<int>(rank);
    }
  }
  return -1;
}

}  // namespace moe_efa::kernels::cpu
