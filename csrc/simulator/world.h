// World: R real engines, pumps and CPU calls in one thread, over a simulated network. A seeded scheduler picks who
// moves next: a rank's caller, a rank's pump, or the network. Nothing waits, nothing reads a clock. A caller may start
// calls ahead of those that are not done; as in runtime::Group the first of each phase moves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "kernels/cpu/combine_call.h"
#include "kernels/cpu/dispatch_call.h"
#include "proto/region_memory.h"
#include "simulator/network.h"
#include "simulator/oracle.h"
#include "simulator/reference.h"
#include "simulator/srd_rail.h"
#include "simulator/trace.h"
#include "simulator/workload.h"
#include "transport/pump.h"

namespace moe_efa::simulator {

class World {
 public:
  World(const Profile& profile, std::uint64_t seed, std::uint32_t num_ranks, std::size_t trace_lines);
  ~World();

  // Runs the script to its end on every rank, then lets everything come to rest. Throws Violation or StatusError.
  void run();

  const Workload& workload() const { return work_; }
  const Trace& trace() const { return trace_; }
  const Network& network() const { return *network_; }
  std::uint64_t turns() const { return turns_; }
  std::uint64_t events() const { return turns_ + network_->events(); }
  std::uint64_t virtual_ns() const { return network_->now_ns(); }
  std::uint64_t epochs() const;  // of both phases, on the rank that came furthest
  std::uint64_t both_phases() const { return both_phases_; }

 private:
  struct Running;
  struct RankWorld;

  std::byte* allocate(std::uint64_t bytes);
  bool turn();  // true when anything moved
  bool pump_step(std::uint32_t rank);
  bool caller_step(std::uint32_t rank);
  bool step_calls(RankWorld& rank);
  bool may_start(const RankWorld& rank) const;
  void start_call(RankWorld& rank);
  bool step_call(RankWorld& rank, proto::Phase phase);
  void finish_call(RankWorld& rank, const Running& call);
  void check_dispatch(const RankWorld& rank, const Running& running) const;
  void check_combine(const RankWorld& rank, const Running& running) const;
  bool finished() const;
  bool settle();  // everybody moves until nothing does; true when anything had moved
  void come_to_rest();
  void after_loss();
  void after_forgery();
  [[noreturn]] void deadlock() const;

  Workload work_;
  Profile profile_;
  Trace trace_;
  Reference reference_;
  std::vector<std::vector<std::byte>> memory_;
  std::vector<proto::RegionMemory> regions_;
  std::vector<std::byte*> region_pointers_, slot_bases_, kernel_word_bases_;
  std::unique_ptr<Oracle> oracle_;
  std::unique_ptr<Network> network_;
  std::vector<std::unique_ptr<RankWorld>> ranks_;
  kernels::SerialExecutor executor_;
  Rng schedule_;
  std::uint64_t turns_ = 0, idle_turns_ = 0, both_phases_ = 0;
  std::vector<double> pace_sums_;
  std::uint64_t death_turn_ = ~0ull;
  std::uint32_t victim_ = 0;
  common::Status refused_;  // what a call said of a forged chunk
};

}  // namespace moe_efa::simulator
