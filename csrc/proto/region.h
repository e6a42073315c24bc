// The layout of a rank's region, which its node mates map and its rail peers write: words and counts first, then slots.
// Both lie in one block, or the slots in memory of their own (a GPU's), at the same offsets; words that only kernels
// read then have a second place there, behind the slots.
// Every size and offset is computed here and nowhere else; all ranks compute the same ones (I15), once (I9).
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/math.h"
#include "proto/chunk.h"
#include "proto/imm.h"

namespace moe_efa::proto {

inline constexpr std::uint64_t kLineBytes = 64;
inline constexpr std::uint64_t kDevicePageBytes = 64 << 10;  // in which memory of a GPU is mapped for others

struct LayoutConfig {
  std::uint32_t num_nodes = 1;
  std::uint32_t node_size = 1;
  std::uint32_t experts_per_rank = 1;
  std::uint32_t top_k = 1;
  std::uint32_t hidden_size = 1;
  DTypeSet dispatch_dtypes = DType::kFp32;  // that may cross in this phase
  DTypeSet combine_dtypes = DType::kFp32;
  Fp8Scale fp8_scale = Fp8Scale::kFp32;  // of FP8 rows; decides no size
  std::uint32_t chunk_rows = 64;
  std::uint32_t slots = 2;          // S: slots of a ring whose writer is on another node
  std::uint32_t own_slots = 2;      // slots of the ring that a rank writes for its own node
  std::uint32_t publish_slots = 2;  // slots of a (publisher, forwarder, source node) ring
};

class RegionLayout {
 public:
  RegionLayout() : RegionLayout(LayoutConfig{}, 0) {}

  constexpr RegionLayout(const LayoutConfig& config, std::uint32_t own_node) : config_(config), own_node_(own_node) {
    std::uint32_t remote_nodes = config.num_nodes - 1;
    dispatch_slot_bytes_ = common::round_up<std::uint64_t>(
        dispatch_chunk_bytes(false, config.chunk_rows, config.chunk_rows * config.top_k,
                             config.dispatch_dtypes.longest_row_bytes(config.hidden_size)),
        kAlign);
    combine_slot_bytes_ = common::round_up<std::uint64_t>(
        combine_chunk_bytes(true, config.chunk_rows, config.top_k,
                            config.combine_dtypes.longest_row_bytes(config.hidden_size)),
        kAlign);
    DTypeSet publish_dtypes;
    for (std::uint32_t i = 0; i < kNumDTypes; ++i) {
      auto dtype = static_cast<DType>(i);
      if (config.combine_dtypes.has(dtype)) publish_dtypes = publish_dtypes | publish_dtype(dtype);
    }
    publish_slot_bytes_ =
        common::round_up<std::uint64_t>(publish_chunk_bytes(true, config.chunk_rows, config.top_k,
                                                            publish_dtypes.longest_row_bytes(config.hidden_size)),
                                        kAlign);
    counts_bytes_ = common::round_up<std::uint64_t>(
        sizeof(CountsRecord) + std::uint64_t{config.experts_per_rank} * config.node_size * 4, kAlign);
    std::uint64_t end = 0;
    auto take = [&end](std::uint64_t bytes) {
      std::uint64_t start = end;
      end = common::round_up<std::uint64_t>(end + bytes, kAlign);
      return start;
    };
    std::uint64_t nodes = config.num_nodes, mates = config.node_size;
    std::uint64_t ring_slots = std::uint64_t{remote_nodes} * config.slots + config.own_slots;
    begun_ = take(kNumPhases * kLineBytes);
    doorbell_ = take(kLineBytes);
    retired_ = take(kNumPhases * kLineBytes);
    released_ = take(kNumPhases * nodes * mates * kLineBytes);
    counts_ready_ = take(kNumPhases * nodes * 2 * kLineBytes);
    kernel_words_begin_ = end;
    send_free_ = take(kNumPhases * nodes * kLineBytes);
    published_ = take(mates * nodes * kLineBytes);
    consumed_ = take(nodes * kLineBytes);
    arrived_ = take(kNumPhases * ring_slots * kFlagBytes);
    flag_bytes_ = end;
    counts_ = take(kNumPhases * 2 * nodes * counts_bytes_);
    counts_send_ = take(kNumPhases * 2 * nodes * counts_bytes_);
    ring_[0] = take(ring_slots * dispatch_slot_bytes_);
    ring_[1] = take(remote_nodes == 0 ? 0 : ring_slots * combine_slot_bytes_);  // the only node has its sums at once
    send_[0] = take(std::uint64_t{remote_nodes} * config.slots * dispatch_slot_bytes_);
    send_[1] = take(std::uint64_t{remote_nodes} * config.slots * combine_slot_bytes_);
    publish_ = take(mates * nodes * config.publish_slots * publish_slot_bytes_);
    total_bytes_ = end;
  }

  constexpr const LayoutConfig& config() const { return config_; }
  constexpr std::uint32_t own_node() const { return own_node_; }
  constexpr std::uint64_t total_bytes() const { return total_bytes_; }
  constexpr std::uint64_t flag_bytes() const { return flag_bytes_; }  // words at the start, zero at birth
  // Where words and counts, which CPUs read and write, end and the slots begin.
  constexpr std::uint64_t slots_begin() const { return ring_[0]; }
  // Words up to flag_bytes() that only kernels read, whoever writes them: send_free, published, consumed, arrived.
  constexpr std::uint64_t kernel_words_begin() const { return kernel_words_begin_; }
  constexpr bool only_kernels_read(std::uint64_t offset) const {
    return offset >= kernel_words_begin_ && offset < flag_bytes_;
  }
  // Their place behind slots in a GPU's memory, from the first slot on: pages of their own, so that whoever maps them,
  // or registers the slots, reaches nothing else.
  constexpr std::uint64_t kernel_words_at() const {
    return common::round_up<std::uint64_t>(total_bytes_ - slots_begin(), kDevicePageBytes);
  }
  constexpr std::uint64_t kernel_words_bytes() const {
    return common::round_up<std::uint64_t>(flag_bytes_ - kernel_words_begin_, kDevicePageBytes);
  }
  constexpr std::uint64_t slot_bytes(Phase phase) const {
    return phase == Phase::kDispatch ? dispatch_slot_bytes_ : combine_slot_bytes_;
  }
  // The parts of the region, which add up to total_bytes().
  constexpr std::uint64_t counts_part_bytes() const { return ring_[0] - flag_bytes_; }
  constexpr std::uint64_t ring_part_bytes(Phase phase) const {
    return phase == Phase::kDispatch ? ring_[1] - ring_[0] : send_[0] - ring_[1];
  }
  constexpr std::uint64_t send_part_bytes(Phase phase) const {
    return phase == Phase::kDispatch ? send_[1] - send_[0] : publish_ - send_[1];
  }
  constexpr std::uint64_t publish_part_bytes() const { return total_bytes_ - publish_; }
  constexpr std::uint64_t publish_slot_bytes() const { return publish_slot_bytes_; }
  constexpr std::uint64_t counts_bytes() const { return counts_bytes_; }
  constexpr std::uint32_t ring_slots(std::uint32_t node) const {
    return node == own_node_ ? config_.own_slots : config_.slots;
  }

  // Words (std::uint64_t). All only grow; nothing is cleared.
  // begun: epochs this rank has begun.                            writer: caller      readers: driver, mates
  constexpr std::uint64_t begun(Phase p) const { return begun_ + index(p) * kLineBytes; }
  // doorbell: uint32 rings, uint32 sleepers.                      writers: mates, driver  reader: caller
  constexpr std::uint64_t doorbell() const { return doorbell_; }
  // send_free: chunks towards `node` whose slot may be refilled.  writer: driver      reader: pack, forward
  constexpr std::uint64_t send_free(Phase p, std::uint32_t node) const {
    return send_free_ + (index(p) * config_.num_nodes + node) * kLineBytes;
  }
  // retired: epochs whose writes are complete and credited.       writer: driver      reader: caller
  constexpr std::uint64_t retired(Phase p) const { return retired_ + index(p) * kLineBytes; }
  // released: chunks of ring `node` that mate `reader` is done with. writer: that mate  reader: driver, pack
  constexpr std::uint64_t released(Phase p, std::uint32_t node, std::uint32_t reader) const {
    return released_ + ((index(p) * config_.num_nodes + node) * config_.node_size + reader) * kLineBytes;
  }
  // published: chunks this rank has published for (forwarder, source node). writer: this rank  reader: forwarder
  constexpr std::uint64_t published(std::uint32_t forwarder, std::uint32_t source_node) const {
    return published_ + (forwarder * std::uint64_t{config_.num_nodes} + source_node) * kLineBytes;
  }
  // consumed: chunks this rank has forwarded for a source node.   writer: this rank   readers: mates (publish)
  constexpr std::uint64_t consumed(std::uint32_t source_node) const { return consumed_ + source_node * kLineBytes; }
  // counts_ready: epoch + 1 when the CountsRecord of that parity is valid. writer: driver (or caller)  readers: mates
  constexpr std::uint64_t counts_ready(Phase p, std::uint32_t node, std::uint64_t epoch) const {
    return counts_ready_ + ((index(p) * config_.num_nodes + node) * 2 + epoch % 2) * kLineBytes;
  }
  // arrived: sequence number + 1 of the chunk in the slot.        writer: driver (own ring: caller)  readers: mates
  constexpr std::uint64_t arrived(Phase p, std::uint32_t node, std::uint64_t seq) const {
    return arrived_ + (index(p) * all_ring_slots() + slot_ordinal(node, seq)) * kFlagBytes;
  }

  // Bytes that rail peers write.
  constexpr std::uint64_t counts(Phase p, std::uint32_t node, std::uint64_t epoch) const {
    return counts_ + ((index(p) * 2 + epoch % 2) * config_.num_nodes + node) * counts_bytes_;
  }
  constexpr std::uint64_t ring_slot(Phase p, std::uint32_t node, std::uint64_t seq) const {
    return ring_[index(p)] + slot_ordinal(node, seq) * slot_bytes(p);
  }
  // Bytes that this rank sends.
  constexpr std::uint64_t counts_send(Phase p, std::uint32_t node, std::uint64_t epoch) const {
    return counts_send_ + ((index(p) * 2 + epoch % 2) * config_.num_nodes + node) * counts_bytes_;
  }
  constexpr std::uint64_t send_slot(Phase p, std::uint32_t node, std::uint64_t seq) const {  // node != own node
    return send_[index(p)] + (remote_index(node) * config_.slots + seq % config_.slots) * slot_bytes(p);
  }
  // Bytes that this rank publishes and a mate forwards.
  constexpr std::uint64_t publish_slot(std::uint32_t forwarder, std::uint32_t source_node, std::uint64_t seq) const {
    return publish_ + ((forwarder * std::uint64_t{config_.num_nodes} + source_node) * config_.publish_slots +
                       seq % config_.publish_slots) *
                          publish_slot_bytes_;
  }

 private:
  static constexpr std::uint64_t kAlign = 128;
  static constexpr std::uint64_t kFlagBytes = 64;

  static constexpr std::uint64_t index(Phase p) { return static_cast<std::uint64_t>(p); }
  constexpr std::uint64_t remote_index(std::uint32_t node) const { return node < own_node_ ? node : node - 1; }
  constexpr std::uint64_t all_ring_slots() const {
    return std::uint64_t{config_.num_nodes - 1} * config_.slots + config_.own_slots;
  }
  constexpr std::uint64_t slot_ordinal(std::uint32_t node, std::uint64_t seq) const {
    if (node == own_node_) return std::uint64_t{config_.num_nodes - 1} * config_.slots + seq % config_.own_slots;
    return remote_index(node) * config_.slots + seq % config_.slots;
  }

  LayoutConfig config_;
  std::uint32_t own_node_;
  std::uint64_t dispatch_slot_bytes_ = 0, combine_slot_bytes_ = 0, publish_slot_bytes_ = 0, counts_bytes_ = 0;
  std::uint64_t begun_ = 0, doorbell_ = 0, send_free_ = 0, retired_ = 0, released_ = 0, published_ = 0, consumed_ = 0;
  std::uint64_t counts_ready_ = 0, arrived_ = 0, kernel_words_begin_ = 0, flag_bytes_ = 0;
  std::uint64_t counts_ = 0, counts_send_ = 0;
  std::uint64_t ring_[2] = {0, 0}, send_[2] = {0, 0}, publish_ = 0, total_bytes_ = 0;
};

// What a rank sees: its own region and those of its mates, all mapped.
struct NodeView {
  Topology topology;
  RegionLayout layout;
  std::byte* const* regions = nullptr;     // [node_size], indexed by local rank: words and counts
  std::byte* const* slot_bases = nullptr;  // RegionMemory::slot_base() of each; null: the slots lie in the regions
  std::byte* const* kernel_word_bases = nullptr;  // RegionMemory::kernel_word_base() of each; null: in the regions

  constexpr std::byte* region(std::uint32_t local) const { return regions[local]; }
  constexpr std::byte* own() const { return regions[topology.local_rank()]; }
  // Where the offsets of ring, send and publish slots count from.
  constexpr std::byte* slots(std::uint32_t local) const {
    return slot_bases != nullptr ? slot_bases[local] : regions[local];
  }
  constexpr std::byte* own_slots() const { return slots(topology.local_rank()); }
  // Where the offsets of words count from that only kernels read.
  constexpr std::byte* kernel_words(std::uint32_t local) const {
    return kernel_word_bases != nullptr ? kernel_word_bases[local] : regions[local];
  }
  constexpr std::byte* own_kernel_words() const { return kernel_words(topology.local_rank()); }
  // Any word.
  std::uint64_t* word(std::uint32_t local, std::uint64_t offset) const {
    std::byte* base = layout.only_kernels_read(offset) ? kernel_words(local) : regions[local];
    return reinterpret_cast<std::uint64_t*>(base + offset);
  }
  std::uint64_t* own_word(std::uint64_t offset) const { return word(topology.local_rank(), offset); }
};

}  // namespace moe_efa::proto
