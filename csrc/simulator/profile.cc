#include "simulator/profile.h"

#include "common/status.h"
#include "simulator/rng.h"

namespace moe_efa::simulator {

const std::vector<std::string>& profile_names() {
  static const std::vector<std::string> names = {"ordered",     "srd",       "srd_harsh",   "srd_paranoid",
                                                 "again_storm", "peer_loss", "forged_epoch"};
  return names;
}

Profile make_profile(const std::string& name, std::uint64_t seed) {
  Rng rng(seed, Stream::kProfile);
  Profile profile;
  profile.name = name;
  profile.manual_progress = rng.chance(0.5);
  profile.events_per_poll = rng.between(1, 4);
  if (name == "ordered") {
    profile.in_order = true;
    return profile;
  }
  // What every other profile shares: unordered pieces, immediates and completions.
  profile.mtu_bytes = 1024;
  profile.jitter_ns = 4000;
  profile.tail_probability = 0.01;
  profile.tail_ns = 100e3;
  profile.imm_delay_ns = rng.chance(0.5) ? 200 : 5000;
  profile.duplicate_probability = 0.02;
  if (name == "srd" || name == "forged_epoch") {
    profile.forge_epoch = name == "forged_epoch";
  } else if (name == "srd_harsh" || name == "srd_paranoid") {
    profile.mtu_bytes = rng.chance(0.7) ? 128 : 256;
    profile.jitter_ns = 30e3;
    bool slow_path = rng.chance(0.3);  // on some links, one way, every second piece takes a path that hardly moves
    profile.tail_probability = slow_path ? 0.5 : 0.1;
    profile.tail_ns = slow_path ? 2e7 : 1e6;
    profile.tail_links = slow_path ? 0.4 : 1;
    profile.imm_delay_ns = rng.chance(0.5) ? 1000 : 50e3;
    profile.ack_delay_ns = rng.chance(0.5) ? 8000 : 1e6;
    profile.duplicate_probability = 0.1;
    if (!slow_path) profile.send_queue_depth = rng.between(1, 8);
    profile.events_per_poll = rng.between(1, 2);
    if (name == "srd_paranoid") {
      profile.late_duplicates = true;
      profile.duplicate_probability = 0.3;
    }
  } else if (name == "again_storm") {
    profile.again_probability = 0.2;
    profile.again_burst = rng.chance(0.1) ? 300 : 20;
    profile.send_queue_depth = rng.between(1, 3);
    profile.events_per_poll = 1;
  } else if (name == "peer_loss") {
    profile.lose_peer = true;
  } else {
    std::string text = "unknown profile \"" + name + "\"; there are";
    for (const std::string& known : profile_names()) text += " " + known;
    throw common::StatusError({common::StatusCode::kInvalid, -1, -1, -1, -1, text});
  }
  return profile;
}

}  // namespace moe_efa::simulator
