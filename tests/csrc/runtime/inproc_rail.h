// InprocRail: rails between ranks that are threads of one process, so that a thread sanitizer sees both ends of every
// byte. A write is copied when its *target* polls; until the source polls the completion, the target may still read it.
#pragma once

#include <atomic>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

#include "common/check.h"
#include "proto/region_memory.h"
#include "transport/rail.h"

namespace moe_efa::testing {

class InprocFabric {
 public:
  InprocFabric(std::vector<proto::RegionMemory> regions, std::uint32_t node_size, std::uint32_t num_nics)
      : regions_(std::move(regions)), node_size_(node_size), num_nics_(num_nics), ends_(regions_.size() * num_nics) {}

 private:
  friend class InprocRail;
  struct Pending {
    transport::WriteRequest request;
    std::uint32_t source = 0;  // rank
  };
  // What others put here for one rail.
  struct End {
    std::mutex mutex;
    std::deque<Pending> inbound;
    std::deque<std::uint64_t> done;
  };
  End& end(std::uint32_t rank, std::uint32_t nic) { return ends_[std::size_t{rank} * num_nics_ + nic]; }

  std::vector<proto::RegionMemory> regions_;
  std::uint32_t node_size_, num_nics_;
  std::vector<End> ends_;
};

class InprocRail final : public transport::Rail {
 public:
  InprocRail(InprocFabric& fabric, std::uint32_t rank, std::uint32_t nic, std::uint32_t max_outstanding)
      : fabric_(fabric), rank_(rank), nic_(nic), max_outstanding_(max_outstanding) {}

  std::vector<std::byte> local_address() const override { return {}; }
  void add_peer(std::uint32_t, std::span<const std::byte>) override {}

  transport::PostResult post_write(const transport::WriteRequest& request) override {
    if (outstanding_ == max_outstanding_) return transport::PostResult::kAgain;
    std::uint64_t end = fabric_.regions_[rank_].bytes;
    MOE_EFA_CHECK(request.local_offset + request.bytes <= end && request.remote_offset + request.bytes <= end,
                  "a write outside of a region");
    ++outstanding_;
    InprocFabric::End& to = fabric_.end(request.peer_node * fabric_.node_size_ + rank_ % fabric_.node_size_, nic_);
    std::lock_guard lock(to.mutex);
    to.inbound.push_back({request, rank_});
    return transport::PostResult::kPosted;
  }

  std::size_t poll(std::span<transport::RailEvent> events) override {
    InprocFabric::End& own = fabric_.end(rank_, nic_);
    std::size_t count = 0;
    while (count < events.size()) {
      transport::RailEvent& event = events[count];
      event = {};
      InprocFabric::Pending write;
      {
        std::lock_guard lock(own.mutex);
        if (!own.done.empty()) {
          event.id = own.done.front();
          own.done.pop_front();
          --outstanding_;
          ++count;
          continue;
        }
        if (own.inbound.empty()) break;
        write = own.inbound.front();
        own.inbound.pop_front();
      }
      const transport::WriteRequest& request = write.request;
      if (request.bytes > 0) {
        std::memcpy(fabric_.regions_[rank_].at(request.remote_offset),
                    fabric_.regions_[write.source].at(request.local_offset), request.bytes);
      }
      if (request.with_imm) {
        event.kind = transport::RailEvent::Kind::kRemoteImm;
        event.imm = request.imm;
        event.bytes = request.bytes;
        ++count;
      }
      InprocFabric::End& source = fabric_.end(write.source, nic_);
      std::lock_guard lock(source.mutex);
      source.done.push_back(request.id);
    }
    return count;
  }

  std::string describe() const override { return "in process"; }

 private:
  InprocFabric& fabric_;
  std::uint32_t rank_, nic_, max_outstanding_, outstanding_ = 0;
};

}  // namespace moe_efa::testing
