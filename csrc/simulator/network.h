// Network: a discrete-event model of SRD under a virtual clock. Pieces of a write land in any order, by memcpy from the
// source as it is at that moment; an immediate vouches for its own write only; completions come when they like.
// It knows ranks, NICs and bytes, nothing of the protocol; an observer sees every step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <queue>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "proto/region_memory.h"
#include "proto/topology.h"
#include "simulator/profile.h"
#include "simulator/rng.h"
#include "transport/rail.h"

namespace moe_efa::simulator {

// An invariant is broken: what, with all that is known about it. Never caught by code under test.
struct Violation : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct SimWrite {
  std::uint64_t number = 0;
  std::uint32_t source_rank = 0, target_rank = 0, nic = 0;
  transport::WriteRequest request;
  std::uint32_t before_imm = 0;   // placements that the immediate waits for
  std::uint32_t before_done = 0;  // placements that the completion waits for; 0: no byte of it can land any more
  bool lost = false;
};

class NetworkObserver {
 public:
  virtual ~NetworkObserver() = default;
  virtual void posted(const SimWrite& write) = 0;
  virtual void piece_placed(const SimWrite& write, std::uint64_t offset) = 0;
  virtual void all_placed(const SimWrite& write) = 0;
  virtual void imm_polled(const SimWrite& write) = 0;
  virtual void completion_polled(const SimWrite& write) = 0;
  virtual void woken(std::uint32_t rank) = 0;
};

struct NetworkConfig {
  std::uint32_t num_ranks = 1, node_size = 1, num_nics = 1;
  std::uint64_t seed = 0;
  std::size_t max_inbound = 0;       // immediates that may be unpolled at a rank: its posted receives (I12)
  std::size_t completion_queue = 0;  // entries per NIC: the same and the own writes
};

class Network {
 public:
  Network(const Profile& profile, const NetworkConfig& config, NetworkObserver& observer);

  void attach(std::uint32_t rank, const proto::RegionMemory& region) { regions_[rank] = region; }
  transport::PostResult post(std::uint32_t rank, std::uint32_t nic, const transport::WriteRequest& request);
  std::size_t poll(std::uint32_t rank, std::uint32_t nic, std::span<transport::RailEvent> events);

  void wake_later(std::uint32_t rank, double delay_ns);
  void kill(std::uint32_t rank) { dead_[rank] = true; }
  bool dead(std::uint32_t rank) const { return dead_[rank]; }

  // Lets the next event happen. True when some rank can see a difference.
  bool step();
  bool empty() const { return heap_.empty(); }
  // Nothing queued for anybody, nothing under way.
  bool quiet() const;
  std::uint64_t now_ns() const { return now_ns_; }
  std::uint64_t events() const { return events_; }
  std::uint64_t refusals() const { return refusals_; }  // posts answered with EAGAIN: time passing, in its way
  std::size_t inbound_high_water() const { return inbound_high_water_; }
  std::size_t inflight_high_water() const { return inflight_high_water_; }

 private:
  enum class Kind : std::uint8_t { kPlace, kImm, kDone, kError, kWake };
  struct Event {
    std::uint64_t time_ns, tie, number;
    Kind kind;
    std::uint64_t write;  // or the rank to wake
    std::uint32_t offset, bytes;
    bool late;  // a duplicate for which the immediate does not wait
    bool operator>(const Event& other) const {
      return time_ns != other.time_ns ? time_ns > other.time_ns
                                      : (tie != other.tie ? tie > other.tie : number > other.number);
    }
  };
  struct QueueEntry {
    transport::RailEvent event;
    std::uint64_t write;
  };
  struct Endpoint {
    std::deque<QueueEntry> completions;
    std::deque<Event> deferred;  // landings that wait for this NIC to be polled
    std::uint32_t outstanding = 0, again_left = 0, inbound = 0;
  };

  void schedule(Kind kind, double delay_ns, std::uint64_t write, std::uint32_t offset = 0, std::uint32_t bytes = 0,
                bool late = false);
  double piece_delay(const SimWrite& write);
  void place(const Event& event);
  void placements_done(SimWrite& write);
  void enqueue(Endpoint& endpoint, const QueueEntry& entry, const SimWrite& write);
  Endpoint& endpoint(std::uint32_t rank, std::uint32_t nic) { return endpoints_[rank * config_.num_nics + nic]; }

  Profile profile_;
  NetworkConfig config_;
  NetworkObserver& observer_;
  Rng delay_, duplicate_, again_, poll_, fault_, tie_;
  std::vector<proto::RegionMemory> regions_;
  std::vector<Endpoint> endpoints_;
  std::vector<bool> dead_;
  std::vector<bool> slow_links_;  // [source * ranks + target]
  std::deque<SimWrite> writes_;
  std::priority_queue<Event, std::vector<Event>, std::greater<>> heap_;
  std::vector<std::size_t> inflight_;  // by target: immediates posted and not yet polled
  std::uint64_t now_ns_ = 0, event_number_ = 0, events_ = 0, refusals_ = 0;
  std::size_t inbound_high_water_ = 0, inflight_high_water_ = 0;
};

}  // namespace moe_efa::simulator
