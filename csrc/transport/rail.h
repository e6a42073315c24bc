// Rail: one NIC endpoint of one rank. Writes go to the rail peers' regions; nothing here knows the protocol.
// Driven by one thread at a time. Implementations: libfabric_rail, shm_rail, the simulator's rail;
// reorder_rail around any of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "common/status.h"

namespace moe_efa::transport {

// One RDMA write with a 32-bit immediate. bytes may be 0 (immediate only; the offsets stay valid). The protocol never
// writes without an immediate; a rail that cuts writes in pieces does.
struct WriteRequest {
  std::uint32_t peer_node = 0;
  std::uint32_t bytes = 0;
  std::uint64_t local_offset = 0;   // in the own region
  std::uint64_t remote_offset = 0;  // in the peer's region
  std::uint32_t imm = 0;
  std::uint64_t id = 0;  // comes back in the completion
  bool with_imm = true;  // else nothing is reported at the peer
};

enum class PostResult { kPosted, kAgain };  // kAgain: nothing was sent, poll and try again

struct RailEvent {
  enum class Kind { kWriteDone, kRemoteImm, kError };
  Kind kind = Kind::kWriteDone;
  std::uint64_t id = 0;     // kWriteDone; kError of an own write
  std::uint32_t imm = 0;    // kRemoteImm
  std::uint32_t bytes = 0;  // kRemoteImm; 0 where the provider does not tell
  bool own_write = false;   // kError: the write `id`, posted here, has failed and is over
  int peer_node = -1;       // kError: the peer, when known
  std::string error;        // kError: failing call and the library's text
};

// What tells a rank's NICs apart in messages: " (NIC 2 of 4)"; empty for the only one.
inline std::string nic_suffix(int index, int count) {
  return count > 1 ? " (NIC " + std::to_string(index + 1) + " of " + std::to_string(count) + ")" : "";
}

class Rail {
 public:
  virtual ~Rail() = default;
  // What a peer needs to reach this endpoint (address, key, base), opaque.
  virtual std::vector<std::byte> local_address() const = 0;
  virtual void add_peer(std::uint32_t node, std::span<const std::byte> address) = 0;
  // Throws StatusError on a hard error.
  virtual PostResult post_write(const WriteRequest& request) = 0;
  // At most events.size(); returns how many. Never blocks.
  virtual std::size_t poll(std::span<RailEvent> events) = 0;
  virtual std::string describe() const = 0;  // "libfabric tcp 2.5", for messages
};

}  // namespace moe_efa::transport
