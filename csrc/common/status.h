// The one error type that crosses layers: what failed, which rank is to blame, in which phase, epoch and chunk.
// Fields that are unknown are -1. The Python exceptions of moe_efa.errors are made from it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace moe_efa::common {

enum class StatusCode : int {
  kOk = 0,
  kInvalid = 1,      // a caller's argument; nothing was sent (I17)
  kConfig = 2,       // a configuration that cannot work, found at construction
  kProtocol = 3,     // a peer broke the wire contract, or ranks issued different calls (I14)
  kTransport = 4,    // the network library reported an error
  kPeerLost = 5,     // a peer died or fell silent
  kPeerTimeout = 6,  // a live peer did not enter or finish the call in time
  kClosed = 7,       // the object was closed here
  kInternal = 8,     // a broken invariant of this process
};

struct Status {
  StatusCode code = StatusCode::kOk;
  int rank = -1;   // rank in the group that is to blame
  int phase = -1;  // proto::Phase
  std::int64_t epoch = -1;
  std::int64_t chunk = -1;  // ring sequence number
  std::string message;

  bool ok() const { return code == StatusCode::kOk; }
};

class StatusError : public std::runtime_error {
 public:
  explicit StatusError(Status status) : std::runtime_error(status.message), status_(std::move(status)) {}
  const Status& status() const { return status_; }

 private:
  Status status_;
};

}  // namespace moe_efa::common
