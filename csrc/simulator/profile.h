// Profile: how nasty the simulated network is, every knob a number. It knows nothing of the protocol.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace moe_efa::simulator {

struct Profile {
  std::string name;
  std::uint32_t mtu_bytes = 8192;  // a write is cut into pieces of this size, each with its own delay
  bool in_order = false;           // no jitter, everything first in, first out
  double latency_ns = 8000;        // least delay of a piece
  double jitter_ns = 0;            // mean of an exponential, per piece
  double tail_probability = 0;     // of a delay longer by an exponential of mean tail_ns
  double tail_ns = 0;
  double tail_links = 1;                // share of directed pairs of ranks that have this tail
  double imm_delay_ns = 200;            // from the last piece to the immediate, mean
  double ack_delay_ns = 8000;           // from the last placement to the local completion, mean
  double duplicate_probability = 0;     // of a piece
  bool late_duplicates = false;         // also after the immediate, never after the local completion
  double again_probability = 0;         // that a post starts a burst of EAGAIN
  std::uint32_t again_burst = 0;        // longest burst
  std::uint32_t send_queue_depth = 64;  // posted and not yet polled; more is EAGAIN until polled
  std::uint32_t events_per_poll = 4;    // most events one poll returns
  bool manual_progress = false;         // a piece lands only when its target polls
  bool lose_peer = false;               // one rank dies at a random moment
  bool forge_epoch = false;             // one chunk lands with a stale or future epoch in its header
};

// Throws StatusError(kInvalid) for an unknown name. Some knobs are drawn from the seed.
Profile make_profile(const std::string& name, std::uint64_t seed);

const std::vector<std::string>& profile_names();

}  // namespace moe_efa::simulator
