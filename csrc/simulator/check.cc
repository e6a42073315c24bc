#include "simulator/check.h"

#include <exception>
#include <sstream>

#include "simulator/world.h"

namespace moe_efa::simulator {

CheckResult run_check(const std::string& profile, std::uint64_t seed, const CheckOptions& options) {
  CheckResult result;
  result.profile = profile;
  result.seed = seed;
  World world(make_profile(profile, seed), seed, options.num_ranks, options.trace_lines);
  const Workload& work = world.workload();
  result.num_ranks = work.num_ranks;
  result.node_size = work.node_size;
  result.reads_slots = work.reads_slots;
  try {
    world.run();
    result.ok = true;
  } catch (const std::exception& error) {
    std::ostringstream text;
    text << error.what() << "\n  profile " << profile << ", seed " << seed << ", event " << world.events() << ", "
         << work.num_ranks << " ranks in nodes of " << work.node_size << ", S " << work.layout.slots << ", chunk rows "
         << work.layout.chunk_rows << "; the last events:\n"
         << world.trace().text();
    result.message = text.str();
  }
  result.events = world.events();
  result.virtual_us = world.virtual_ns() / 1000;
  result.epochs = world.epochs();
  result.both_phases = world.both_phases();
  result.inflight_high_water = world.network().inflight_high_water();
  result.inbound_high_water = world.network().inbound_high_water();
  result.inbound_limit = engine::max_inbound_events(work.layout);
  return result;
}

}  // namespace moe_efa::simulator
