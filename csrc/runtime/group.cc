// How a Group comes to be, from its memory to the first contact with its peers, and what it tells of itself.
#include "runtime/group.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <string>
#include <thread>

#include "common/check.h"
#include "runtime/backoff.h"
#include "runtime/group_waits.h"
#include "runtime/rails.h"

namespace moe_efa::runtime {

using common::Status;
using common::StatusCode;
using common::StatusError;
using proto::Phase;

namespace {

// The longest sleep of the background, where it is not kMatesPauseUs:
constexpr long kBackgroundPauseUs = 200;  // rails or a device, and no core to spare
constexpr long kDevicePauseUs = 10;       // a device, whose kernels do not ring, and cores to spare

// Two busy threads a rank: the caller and the driver.
bool is_crowded(const GroupConfig& config) {
  std::uint32_t ranks = std::max(config.ranks_on_host, config.topology.node_size);
  return std::thread::hardware_concurrency() < 2 * ranks * std::max(1u, config.num_threads);
}

// What a rank may hope to find in the last-level cache, half of it its own data's.
std::uint64_t cache_share(const GroupConfig& config) {
  constexpr long kUnknown = 8 << 20;
  long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  std::uint32_t ranks = std::max(config.ranks_on_host, config.topology.node_size);
  return static_cast<std::uint64_t>(bytes > 0 ? bytes : kUnknown) / (2 * std::max(1u, ranks));
}

GroupConfig with_buffers(GroupConfig config, const kernels::Device* device) {
  config.buffers = choose_buffers(config, device);
  return config;
}

}  // namespace

Group::Group(const GroupConfig& config, std::shared_ptr<kernels::Device> device)
    : config_(with_buffers(config, device.get())),
      sizing_(choose_layout(config)),
      layout_(sizing_.layout, config.topology.node()),
      slots_(config_, layout_, device),
      state_(config.topology),
      pool_(std::max(1u, config.num_threads)),
      crowded_(is_crowded(config)),
      cache_share_bytes_(cache_share(config)),
      device_(std::move(device)) {
  const proto::Topology& topology = config_.topology;
  int rank = static_cast<int>(topology.rank);
  segment_ = transport::Segment::create(transport::segment_name(config_.job_key, rank), slots_.segment_bytes());
  regions_.assign(topology.node_size, nullptr);
  regions_[topology.local_rank()] = segment_.data();
  slot_bases_.assign(topology.node_size, nullptr);
  slot_bases_[topology.local_rank()] = slots_.memory(segment_.data()).slot_base();
  kernel_word_bases_.assign(topology.node_size, nullptr);
  view_ = {topology, layout_, regions_.data(), slot_bases_.data(), kernel_word_bases_.data()};
  liveness_ = std::make_unique<transport::Liveness>(
      transport::LivenessConfig{rank, config_.listen_host, config_.job_key, config_.heartbeat_timeout_s});
  if (topology.num_nodes() > 1) make_rails();
  long pause_us = driver_ && crowded_ ? kBackgroundPauseUs : kMatesPauseUs;
  if (device_) pause_us = crowded_ ? kBackgroundPauseUs : kDevicePauseUs;
  background_ = std::make_unique<Background>(doorbell_, pause_us, [this] { return step_background(); });
}

void Group::make_rails() {
  RailLimits limits;
  limits.max_inbound_events = static_cast<std::uint32_t>(engine::max_inbound_events(sizing_.layout));
  limits.max_writes = kWritesPerNic;
  limits.max_write_bytes =
      std::max({layout_.slot_bytes(Phase::kDispatch), layout_.slot_bytes(Phase::kCombine), layout_.counts_bytes()});
  Rails rails = open_rails(config_, segment_, slots_, limits);
  rails_ = std::move(rails.rails);
  unlink_rails_ = std::move(rails.unlink);
  descriptors_ = std::make_unique<engine::DescriptorRing>(engine::max_descriptors(sizing_.layout));
  engine_ = std::make_unique<engine::Engine>(
      engine::EngineConfig{config_.topology, sizing_.layout, static_cast<std::uint32_t>(rails_.size()), kWritesPerNic,
                           view_.own(), view_.own_slots(), !slots_.apart()});
  std::vector<transport::Rail*> raw;
  for (const auto& rail : rails_) raw.push_back(rail.get());
  transport::PumpConfig pump_config;
  pump_config.post_timeout_s = config_.timeout_s;
  pump_config.doorbell = &doorbell_;
  if (slots_.wants_flush()) pump_config.flush = [this] { slots_.flush(); };
  pump_config.through_window = slots_.kernel_words_window() != nullptr;
  pump_config.peer_left = [this](std::uint32_t rank, bool wait) { return peer_left(rank, wait); };
  pump_ = std::make_unique<transport::Pump>(*engine_, view_, raw, *descriptors_, pump_config);
  driver_ = std::make_unique<Driver>(*engine_, *pump_, !crowded_, [this](const Status& status) {
    if (status.code == StatusCode::kTransport) {
      // A connection that breaks is mostly the first sign of a death, for which the failure detector has better words.
      double begin = monotonic_s();
      while (!liveness_->failed() && monotonic_s() - begin < kVerdictS) sleep_us(1000);
      if (liveness_->failed()) return;
    }
    record(status);
  });
}

Group::~Group() {
  background_->stop();
  if (driver_) driver_->stop();
  dispatch_.reset();
  drop_started();
  close_device();
  driver_.reset();
  rails_.clear();  // before the region that they registered
  liveness_.reset();
}

std::string Group::address() const {
  Address address;
  address.rank = config_.topology.rank;
  address.layout_hash = layout_hash(sizing_.layout, config_.buffers);
  address.host = config_.listen_host;
  address.port = liveness_->port();
  address.segment = segment_.name();
  address.segment_bytes = segment_.size();
  address.slots = slots_.exported();
  address.kernel_words = slots_.has_kernel_words();
  for (const auto& rail : rails_) address.rails.push_back(rail->local_address());
  return address.encode();
}

std::vector<std::uint32_t> Group::neighbours() const {
  std::vector<std::uint32_t> ranks;
  const proto::Topology& topology = config_.topology;
  for (std::uint32_t mate = 0; mate < topology.node_size; ++mate) {
    if (mate != topology.local_rank()) ranks.push_back(topology.rank_of(topology.node(), mate));
  }
  for (std::uint32_t node = 0; node < topology.num_nodes(); ++node) {
    if (node != topology.node()) ranks.push_back(topology.rail_peer(node));
  }
  return ranks;
}

void Group::connect(const std::vector<std::string>& encoded) {
  const proto::Topology& topology = config_.topology;
  MOE_EFA_CHECK(!connected_ && encoded.size() == topology.num_ranks, "connect() needs one address per rank, once");
  auto config_error = [](const std::string& text) { throw StatusError({StatusCode::kConfig, -1, -1, -1, -1, text}); };
  std::vector<Address> addresses;
  for (std::uint32_t rank = 0; rank < topology.num_ranks; ++rank) {
    addresses.push_back(Address::decode(encoded[rank]));
    if (addresses[rank].rank != rank)
      config_error("address of rank " + std::to_string(addresses[rank].rank) + " at " + std::to_string(rank));
    if (addresses[rank].layout_hash != layout_hash(sizing_.layout, config_.buffers)) {
      config_error("memory layout differs between rank " + std::to_string(topology.rank) + " and rank " +
                   std::to_string(rank) + ": same version and configuration everywhere?");
    }
    if (addresses[rank].rails.size() != rails_.size()) {
      config_error("rank " + std::to_string(topology.rank) + " has " + std::to_string(rails_.size()) + " NICs, rank " +
                   std::to_string(rank) + " has " + std::to_string(addresses[rank].rails.size()) +
                   ": all ranks need the same number");
    }
  }
  for (std::uint32_t mate = 0; mate < topology.node_size; ++mate) {
    if (mate == topology.local_rank()) continue;
    const Address& address = addresses[topology.rank_of(topology.node(), mate)];
    mate_segments_.push_back(transport::Segment::open(address.segment, address.segment_bytes));
    regions_[mate] = mate_segments_.back().data();
    slot_bases_[mate] = slots_.memory(regions_[mate], address.slots).slot_base();
  }
  place_kernel_words(addresses);
  for (std::uint32_t node = 0; node < topology.num_nodes(); ++node) {
    if (node == topology.node()) continue;
    for (std::size_t nic = 0; nic < rails_.size(); ++nic) {
      rails_[nic]->add_peer(node, addresses[topology.rail_peer(node)].rails[nic]);
    }
  }
  for (std::uint32_t rank : neighbours()) {
    peers_.push_back({static_cast<int>(rank), addresses[rank].host, static_cast<std::uint16_t>(addresses[rank].port)});
  }
  if (device_) open_device_state();
  connected_ = true;
}

void Group::meet(const std::function<void()>& poll) {
  MOE_EFA_CHECK(connected_ && !met_, "meet() follows connect(), once");
  liveness_->connect(peers_, config_.timeout_s, poll);
  met_ = true;
}

void Group::start() {
  MOE_EFA_CHECK(met_ && !started_, "start() follows meet(), once");
  segment_.unlink();  // everybody has mapped it: from here a crash leaves nothing behind
  if (unlink_rails_) unlink_rails_();
  started_ = true;
  if (!driver_) return;
  driver_->inspect([](engine::Engine& engine) { engine.on_hello_wanted(); });
  driver_->start();
  // First contact: also opens the provider's connections before the first call is timed.
  double begin = monotonic_s();
  for (bool met = false; !met;) {
    driver_->try_step();
    driver_->inspect([&](engine::Engine& engine) { met = engine.all_hellos() && engine.idle(); });
    if (liveness_->failed()) fail(liveness_->failure());
    if (failed_.load()) check_open();
    if (interrupt_check_) interrupt_check_();
    if (monotonic_s() - begin > config_.timeout_s) {
      engine::MissingHello missing;
      driver_->inspect(
          [&](engine::Engine& engine) { missing = engine.missing_hello().value_or(engine::MissingHello{}); });
      int peer =
          missing.node == config_.topology.node() ? -1 : static_cast<int>(config_.topology.rail_peer(missing.node));
      std::string text = rails_[missing.nic]->describe() + (peer < 0 ? "" : " with rank " + std::to_string(peer));
      fail({StatusCode::kPeerTimeout, peer, -1, -1, -1,
            "no first contact over " + text + " within " + std::to_string(config_.timeout_s) + " s"});
    }
    if (!met) sched_yield();
  }
}

GroupStats Group::stats() {
  GroupStats stats;
  {
    std::lock_guard lock(calls_mutex_);
    for (std::uint32_t p = 0; p < proto::kNumPhases; ++p) stats.phases[p] = phase_stats_[p];
  }
  if (!driver_) return stats;
  // The driver may still be posting the last call's chunks.
  bool settled = false;
  for (double begin = monotonic_s(); !settled && !failed_.load() && !closed_ && monotonic_s() - begin < 1;) {
    if (!driver_->try_step()) sched_yield();
    // Asked first: what is fed later would be neither here nor there.
    bool fed = !device_state_ || (device_state_->all_fed(Phase::kDispatch) && device_state_->all_fed(Phase::kCombine));
    driver_->inspect(
        [&](engine::Engine& engine) { settled = fed && !engine.has_pending_writes() && descriptors_->empty(); });
  }
  driver_->inspect([&](engine::Engine& engine) {
    for (std::uint32_t p = 0; p < proto::kNumPhases; ++p) stats.phases[p].wire_bytes = engine.stats().wire_bytes[p];
    stats.writes = engine.stats().writes;
    stats.nics = engine.stats().nics;
  });
  return stats;
}

GroupInfo Group::info() const {
  GroupInfo info;
  info.transport = rails_.empty() ? "shared memory" : rails_[0]->describe();
  info.layout = sizing_.layout;
  for (const auto& rail : rails_) info.nics.push_back(rail->describe());
  info.registered_bytes = sizing_.region_bytes;
  info.num_threads = static_cast<std::uint32_t>(pool_.width());
  if (device_) info.device = device_->facts().name;
  info.buffers = config_.buffers;
  info.flags = kernel_words_apart_ ? "device" : "host";
  return info;
}

}  // namespace moe_efa::runtime
