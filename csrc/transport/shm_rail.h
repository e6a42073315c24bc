// Rail between nodes that are on one host: a write is a copy into the peer's mapped region and an entry in the peer's
// inbox, which has one single-producer single-consumer ring per node. Knows no protocol. Keeps I1's order (bytes before
// their arrival event) and I12 (a full inbox is kAgain, never an overrun).
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "proto/region_memory.h"
#include "transport/rail.h"
#include "transport/segment.h"

namespace moe_efa::transport {

struct ShmRailConfig {
  proto::RegionMemory memory;  // the own region: the segment `region_name`, mapped here, holds it or all but the slots
  std::string region_name;
  // Where slots lie apart: what peers need to reach them, and how the peers' are reached (null where that fails). They
  // must be memory that the CPU can copy to, and stay reachable until the rail is destroyed.
  std::string exported_slots;
  std::function<std::byte*(const std::string& exported)> import_slots;
  std::string inbox_name;  // segment_name(job_key, rank, "inbox")
  std::uint32_t own_node = 0;
  std::uint32_t num_nodes = 1;
  std::uint32_t inbox_entries = 1024;  // per ring; rounded up to a power of two
  int rail_index = 0, num_rails = 1;   // of this rank, for messages
};

class ShmRail final : public Rail {
 public:
  explicit ShmRail(const ShmRailConfig& config);  // creates the inbox segment

  std::vector<std::byte> local_address() const override;
  void add_peer(std::uint32_t node, std::span<const std::byte> address) override;
  PostResult post_write(const WriteRequest& request) override;
  std::size_t poll(std::span<RailEvent> events) override;
  std::string describe() const override;

  // Removes the inbox's name; call it when every peer has added this rank.
  void unlink() { inbox_.unlink(); }

 private:
  struct Entry;
  struct Ring;
  struct Peer {
    Segment region, inbox;
    proto::RegionMemory memory;
    Ring* ring = nullptr;    // ours, in the peer's inbox
    std::uint64_t tail = 0;  // next entry to write
    std::uint64_t head = 0;  // the peer's cursor as last seen
  };

  Ring* ring_of(const Segment& inbox, std::uint32_t writer_node) const;
  void poll_ring(std::uint32_t node, std::span<RailEvent> events, std::size_t& filled);

  const ShmRailConfig config_;
  const std::uint64_t entries_;
  const std::uint64_t inbox_bytes_;
  Segment inbox_;
  std::vector<Peer> peers_;           // by node
  std::vector<std::uint64_t> heads_;  // by writer: next entry to read
  std::vector<bool> corrupt_;         // by writer: reported once, not read again
  std::vector<std::uint64_t> done_;   // ids of writes to report, a ring of kMaxDone
  std::uint64_t done_head_ = 0, done_tail_ = 0;
  std::uint32_t next_ring_ = 0;  // where the next poll starts, so that no writer starves another
};

}  // namespace moe_efa::transport
