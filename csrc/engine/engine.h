// The wire protocol of one rank, sans I/O: events in, writes and actions out. No thread, socket, clock or kernel.
// It validates every landing before anyone may use a byte of it (I1, I4), grants and spends credits (I2, I11),
// bounds what is in flight (I12), and turns the first error into a sticky failure (I6).
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

#include "common/status.h"
#include "engine/descriptor_ring.h"
#include "proto/chunk.h"
#include "proto/imm.h"
#include "proto/region.h"
#include "proto/topology.h"

namespace moe_efa::engine {

struct EngineConfig {
  proto::Topology topology;
  proto::LayoutConfig layout;
  std::uint32_t num_nics = 1;
  std::uint32_t max_writes_per_nic = 64;  // outstanding, towards all peers
  const std::byte* region = nullptr;      // own region, read only: what has landed
  const std::byte* slots = nullptr;       // NodeView::own_slots(); null: the same
};

// One RDMA write with immediate, from the own region into that of a rail peer.
struct Write {
  std::uint32_t nic = 0;
  std::uint32_t peer_node = 0;
  std::uint32_t bytes = 0;
  std::uint64_t local_offset = 0;
  std::uint64_t remote_offset = 0;
  std::uint32_t imm = 0;
  std::uint64_t id = 0;
};

// What the engine wants done to the flags of the region.
struct Action {
  enum class Kind {
    kChunkArrived,   // value = ring sequence number
    kCountsArrived,  // value = epoch
    kSendFree,       // value = chunks towards node whose slots are free again
    kRetired,        // value = epochs of this phase that are wholly written, completed and credited
  };
  Kind kind;
  proto::Phase phase;
  std::uint32_t node = 0;
  std::uint64_t value = 0;
};

struct NicStats {
  std::uint64_t writes = 0, bytes = 0;  // posted
};

struct MissingHello {
  std::uint32_t node = 0, nic = 0;
};

struct EngineStats {
  std::uint64_t writes = 0, bytes = 0;
  std::vector<NicStats> nics;
  std::uint64_t wire_bytes[proto::kNumPhases] = {0, 0};  // posted, headers and metadata included
};

// Credits of one ring that may be under way at a time: as many as the batches of S / 4 that make up a whole ring.
inline constexpr std::uint32_t kMaxCreditsInFlight = 4;

// Immediates that can be on their way to one NIC of a rank at most, and so the least size of its completion queue
// (I12). Writes may all take one NIC, so it does not depend on how many there are.
std::uint64_t max_inbound_events(const proto::LayoutConfig& layout);

// Descriptors that can wait for the driver at most: the send slots, and the counts of two live epochs.
std::size_t max_descriptors(const proto::LayoutConfig& layout);

class Engine {
 public:
  explicit Engine(const EngineConfig& config);

  // --- events
  void on_hello_wanted();                                       // say hello to every rail peer, on every NIC
  void on_begun(proto::Phase phase, std::uint64_t num_epochs);  // this rank has begun that many epochs
  void on_descriptor(const Descriptor& descriptor);
  void on_write_done(std::uint64_t id);
  void on_remote_imm(std::uint32_t imm, std::uint32_t bytes);  // bytes 0: the transport does not tell
  void on_released(proto::Phase phase, std::uint32_t node, std::uint64_t num_chunks);
  void on_failure(const common::Status& status);

  // --- writes: look at the next one, then say whether it was posted
  std::optional<Write> next_write();  // empty: nothing to post, or no NIC has room
  void on_posted(const Write& write);
  void on_again(std::uint32_t nic);  // the NIC is skipped until resume_nics()
  void resume_nics();

  // --- actions, in order; the caller empties the list
  std::vector<Action>& actions() { return actions_; }

  bool failed() const { return !failure_.ok(); }
  const common::Status& failure() const { return failure_; }
  bool all_hellos() const { return hellos_ == (topology_.num_nodes() - 1) * nics_.size(); }
  std::optional<MissingHello> missing_hello() const;  // the first of those that have not come
  bool has_pending_writes() const {
    return hellos_due_ > 0 || !urgent_.empty() || !bulk_.empty() || !credits_due_.empty();
  }
  bool idle() const { return !has_pending_writes() && outstanding_total_ == 0; }
  int waiting_peer() const;  // rank whose write is at the head of the queue, or -1
  const EngineStats& stats() const { return stats_; }

 private:
  enum class WriteKind : std::uint64_t { kChunk = 0, kCounts = 1, kCredit = 2, kHello = 3 };

  struct Pending {
    WriteKind kind;
    proto::Phase phase;
    std::uint32_t node;
    std::uint32_t bytes;
    std::uint64_t seq;  // chunk: ring sequence number; counts: epoch
    std::uint64_t epoch;
    bool last;
  };
  struct SentEpoch {
    std::uint64_t epoch;
    std::uint64_t end_seq;  // ring position after its last chunk
    bool counts_done;
  };
  struct SendRing {
    std::uint64_t packed = 0, credited = 0, completed = 0, free = 0;
    std::vector<std::uint64_t> done;  // per slot: sequence number + 1 of the last completed write
    std::deque<SentEpoch> epochs;
  };
  struct ReceiveRing {
    std::uint64_t released = 0, credited = 0, arrived = 0;
    std::vector<std::uint64_t> landed;   // per slot: sequence number + 1 of the last arrival
    std::uint32_t credits_inflight = 0;  // posted, not completed
    bool credit_due = false;
  };
  struct Nic {
    std::uint32_t outstanding = 0;
    std::uint64_t queued_bytes = 0;
    std::uint64_t share = 0;           // bytes so far; one that fell far behind is forgiven the rest
    std::deque<std::uint32_t> hellos;  // nodes to greet on this NIC: each has connections of its own
    bool stalled = false;
  };

  SendRing& send_ring(proto::Phase phase, std::uint32_t node);
  ReceiveRing& receive_ring(proto::Phase phase, std::uint32_t node);
  void on_hello(const proto::Imm& imm);
  void on_chunk(proto::Phase phase, const proto::Imm& imm, std::uint32_t bytes);
  void on_counts(proto::Phase phase, const proto::Imm& imm, std::uint32_t bytes);
  void on_credit(proto::Phase phase, const proto::Imm& imm);
  void consider_credit(proto::Phase phase, std::uint32_t node);
  void update_send_ring(proto::Phase phase, std::uint32_t node);
  void update_retired(proto::Phase phase);
  bool epoch_is_live(proto::Phase phase, std::uint64_t epoch) const;
  Write make_write(const Pending& pending, std::uint32_t nic);
  bool has_room(const Nic& nic) const { return !nic.stalled && nic.outstanding < max_writes_per_nic_; }
  int pick_nic() const;
  void count_share(Nic& nic, std::uint64_t bytes);
  void protocol_error(std::uint32_t node, proto::Phase phase, std::int64_t epoch, std::int64_t chunk,
                      const std::string& text);
  std::uint64_t make_id(WriteKind kind, proto::Phase phase, std::uint32_t node, std::uint32_t nic,
                        std::uint64_t seq) const;

  proto::Topology topology_;
  proto::RegionLayout layout_;
  const std::byte* region_;
  const std::byte* slots_;
  std::uint32_t max_writes_per_nic_;
  std::uint32_t credit_batch_;
  std::uint64_t largest_chunk_bytes_;
  std::vector<proto::RegionLayout> peer_layouts_;  // by node: the same sizes seen from there
  std::vector<SendRing> send_[proto::kNumPhases];
  std::vector<ReceiveRing> receive_[proto::kNumPhases];
  std::vector<std::uint64_t> counts_seen_[proto::kNumPhases];  // by node * 2 + parity: epoch + 1
  std::vector<bool> hello_seen_;                               // by node * NICs + NIC
  std::size_t hellos_ = 0, hellos_due_ = 0;
  std::uint64_t begun_[proto::kNumPhases] = {0, 0};
  std::uint64_t retired_[proto::kNumPhases] = {0, 0};
  std::vector<Nic> nics_;
  std::deque<Pending> urgent_;  // counts
  std::deque<std::pair<proto::Phase, std::uint32_t>> credits_due_;
  std::deque<Pending> bulk_;                                      // chunks, in the order in which they were packed
  std::vector<std::uint32_t> inflight_bytes_[proto::kNumPhases];  // by node * slots + slot
  std::uint64_t outstanding_total_ = 0;
  std::vector<Action> actions_;
  common::Status failure_;
  EngineStats stats_;
};

}  // namespace moe_efa::engine
