// Oracle: an omniscient ledger beside the protocol. It sees every write, landing and flag of every rank and throws a
// Violation the moment an invariant breaks (I1, I2, I4, I11; I12 is the network's). It never helps the protocol; it
// fills what has been given back with 0xEE, so that a late reader cannot be lucky.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "proto/imm.h"
#include "proto/region.h"
#include "proto/region_memory.h"
#include "simulator/network.h"
#include "simulator/trace.h"
#include "simulator/workload.h"

namespace moe_efa::simulator {

class Oracle final : public NetworkObserver {
 public:
  Oracle(const Workload& world, const Profile& profile, std::vector<proto::RegionMemory> regions, Trace& trace);

  // --- what the network does
  void posted(const SimWrite& write) override;
  void piece_placed(const SimWrite& write, std::uint64_t offset) override;
  void all_placed(const SimWrite& write) override;
  void imm_polled(const SimWrite& write) override;
  void completion_polled(const SimWrite& write) override;
  void woken(std::uint32_t rank) override { asleep_[rank] = false; }

  // --- after a turn of a rank
  void after_pump(std::uint32_t rank);
  void after_caller(std::uint32_t rank);
  // Every announcement of the epoch is flagged as arrived on all boards of the rank's node.
  void check_counts_ready(std::uint32_t rank, proto::Phase phase, std::uint64_t epoch) const;
  // At the end: every credit is home, every write complete, every epoch retired (I13).
  void check_drained(const std::vector<std::uint64_t> epochs[proto::kNumPhases]) const;

  bool asleep(std::uint32_t rank) const { return asleep_[rank]; }
  void set_asleep(std::uint32_t rank) { asleep_[rank] = true; }
  // The chunk whose header was forged; -1 while none was.
  std::int64_t forged_target() const { return forged_target_; }
  std::int64_t forged_source() const { return forged_source_; }

 private:
  // What is known of one write: a chunk of a ring, or the counts of an epoch.
  struct Record {
    std::uint64_t number = 0, epoch = 0, checksum = 0;
    std::uint32_t bytes = 0;
    bool all_placed = false, imm_polled = false, completed = false, released = false;
  };
  using Records = std::vector<Record>;

  [[noreturn]] void fail(const std::string& text) const { throw Violation(text); }
  std::uint64_t word(std::uint32_t rank, std::uint64_t offset) const;
  std::uint32_t node(std::uint32_t rank) const { return rank / world_.node_size; }
  std::uint32_t local(std::uint32_t rank) const { return rank % world_.node_size; }
  Records& chunks(std::uint32_t source, proto::Phase phase, std::uint32_t target_node);
  Records& counts(std::uint32_t source, proto::Phase phase, std::uint32_t target_node);
  // Chunks of the ring in `target`'s region that all its readers have given back.
  std::uint64_t released(std::uint32_t target, proto::Phase phase, std::uint32_t source_node) const;
  Record* record_of(const SimWrite& write);
  void chunk_posted(const SimWrite& write, proto::Phase phase, const proto::Imm& imm);
  void counts_posted(const SimWrite& write, proto::Phase phase);
  void check_arrived(std::uint32_t rank, proto::Phase phase, std::uint32_t source_node);
  void check_send_free(std::uint32_t rank, proto::Phase phase, std::uint32_t target_node);
  void check_released(std::uint32_t rank, std::uint32_t owner, proto::Phase phase, std::uint32_t source_node);
  void check_publish(std::uint32_t rank);
  void poison(std::uint32_t rank, std::uint64_t offset, std::uint64_t bytes);
  // Advances the shadow of a word that may only grow; returns its former value.
  std::uint64_t grown(std::uint32_t rank, std::uint64_t offset, std::uint64_t value, const char* name);

  const Workload& world_;
  std::vector<proto::RegionMemory> regions_;
  Trace& trace_;
  std::vector<proto::RegionLayout> layouts_;                                    // by node
  std::vector<Records> chunks_[proto::kNumPhases], counts_[proto::kNumPhases];  // [source * nodes + target node]
  std::vector<std::pair<Records*, std::uint64_t>> writes_;  // by write number: where its record is; null: imm only
  std::vector<std::vector<std::uint64_t>> shadow_;          // [rank][word]: flags as last seen
  std::vector<bool> asleep_;
  bool forge_ = false;
  std::uint64_t forge_at_ = 0, chunks_posted_ = 0;
  std::int64_t forged_write_ = -1, forged_target_ = -1, forged_source_ = -1;
};

}  // namespace moe_efa::simulator
