// ReorderRail: a Rail around another one that makes it deliver as badly as SRD may, for tests over providers that never
// do. It holds writes back and lets them go in another order, cuts them in pieces with the immediate on the last,
// places pieces twice, delays and permutes events, and refuses posts for a while. It loses nothing, unless told to drop
// a peer.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "transport/rail.h"

namespace moe_efa::transport {

struct ReorderConfig {
  std::uint64_t seed = 0;
  std::uint32_t rank = 0, nic = 0;  // with the seed and the number of a write or event, they decide what happens to it
  std::uint32_t max_outstanding = 64;  // writes accepted and not yet reported
  std::int32_t drop_node = -1;         // a peer that is out of reach after drop_after writes towards it
  std::uint64_t drop_after = 0;
  // May a piece be placed again while the peer already reads it? The same bytes, yet a data race between threads.
  bool repeat_late = true;
};

// What happens to one write.
struct ReorderDecision {
  static constexpr std::uint32_t kMaxPieces = 4;

  std::uint32_t refusals = 0;  // kAgain so many times before it is accepted
  std::uint32_t num_pieces = 1;
  std::array<std::uint32_t, kMaxPieces + 1> bounds{};  // piece i is [bounds[i], bounds[i + 1]) of the write
  std::array<std::uint8_t, kMaxPieces> order{};        // pieces in the order of posting; the last has the immediate
  std::array<std::uint32_t, kMaxPieces> delays{};      // in polls, by place in `order`
  bool twice = false;                                  // the first piece is placed again before the last one is posted
  bool twice_late = false;  // a piece is placed again when the peer knows of the write already

  bool operator==(const ReorderDecision&) const = default;
};

// `number` counts the writes that this rail has accepted.
ReorderDecision decide(const ReorderConfig& config, std::uint64_t number, std::uint32_t bytes);

class ReorderRail final : public Rail {
 public:
  ReorderRail(std::unique_ptr<Rail> inner, const ReorderConfig& config);

  // Marked, so that a rank whose rail is not reordered is refused: it would take a last piece for the whole write.
  std::vector<std::byte> local_address() const override;
  void add_peer(std::uint32_t node, std::span<const std::byte> address) override;
  PostResult post_write(const WriteRequest& request) override;
  // Errors of the rail below arrive here as events, also those of writes that were held back.
  std::size_t poll(std::span<RailEvent> events) override;
  std::string describe() const override;

 private:
  // One accepted write. The steps 0 ... num_steps - 1 are writes of the rail below: pieces, and pieces again.
  struct Write {
    bool busy = false;
    bool dropped = false;
    std::uint64_t number = 0;
    WriteRequest request;
    ReorderDecision decision;
    std::uint32_t posted = 0;     // plain pieces, those again included, then the last, then the late one
    std::uint32_t completed = 0;  // of those
    std::uint64_t accepted_at = 0, ready_at = 0;  // polls; ready_at is the next step's
    std::string error;
  };
  struct HeldEvent {
    std::uint64_t due;   // poll
    std::uint64_t key;   // the order among those that are due
    std::int64_t place;  // in writes_, free once this is reported; -1 for news from peers
    RailEvent event;
  };

  static std::uint32_t num_plain(const Write& write);
  static std::uint32_t num_steps(const Write& write);
  bool may_post(const Write& write) const;
  WriteRequest step_request(const Write& write, std::uint32_t slot) const;
  void post_held();
  void step_done(std::uint32_t slot, const std::string& error);
  void hold(RailEvent event, std::int64_t place);
  void collect();
  std::uint64_t draw(std::uint64_t stream, std::uint64_t number) const;

  std::unique_ptr<Rail> inner_;
  const ReorderConfig config_;
  std::vector<Write> writes_;
  std::vector<std::uint32_t> free_;                            // places in writes_
  std::vector<std::pair<std::uint64_t, std::uint32_t>> turn_;  // scratch: key, place in writes_
  std::vector<HeldEvent> held_;
  std::vector<RailEvent> batch_;
  std::uint64_t accepted_ = 0, refused_ = 0, to_dropped_ = 0, events_ = 0, polls_ = 0;
};

}  // namespace moe_efa::transport
