// check: one simulated run, from a profile's name and a seed to a verdict. The same three numbers give the same run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace moe_efa::simulator {

struct CheckOptions {
  std::uint32_t num_ranks = 0;  // 0: from the seed
  std::size_t trace_lines = 40;
};

struct CheckResult {
  bool ok = false;
  std::string message;  // of a failure: what broke, where, and the last events before it
  std::string profile;
  std::uint64_t seed = 0;
  std::uint32_t num_ranks = 0, node_size = 0;
  bool reads_slots = true;  // Workload::reads_slots
  std::uint64_t events = 0, virtual_us = 0, epochs = 0;
  std::uint64_t both_phases = 0;  // turns of a rank in which it had a dispatch and a combine to step
  // Immediates under way to one rank, and delivered but not polled there: most seen, and what I12 allows.
  std::uint64_t inflight_high_water = 0, inbound_high_water = 0, inbound_limit = 0;
};

// Throws StatusError(kInvalid) for an unknown profile; everything else is in the result.
CheckResult run_check(const std::string& profile, std::uint64_t seed, const CheckOptions& options = {});

}  // namespace moe_efa::simulator
