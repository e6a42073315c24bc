#include "runtime/rails.h"

#include <algorithm>
#include <string>

#include "common/status.h"
#include "transport/libfabric_rail.h"
#include "transport/reorder_rail.h"
#include "transport/shm_rail.h"

namespace moe_efa::runtime {

namespace {

std::uint32_t num_nics(const GroupConfig& config) {
  std::size_t named = config.nic_names.size();
  return named > 0 ? static_cast<std::uint32_t>(named) : std::max(1u, config.num_nics);
}

Rails open_plain_rails(const GroupConfig& config, const transport::Segment& segment, SlotMemory& slots,
                       const RailLimits& limits) {
  const proto::Topology& topology = config.topology;
  Rails rails;
  if (config.transport == "libfabric") {
    transport::LibfabricRailConfig rail;
    rail.search = {config.libfabric, config.libfabric_hints};
    rail.provider = config.provider;
    rail.memory = slots.memory(segment.data());
    rail.slots = slots.descriptor();
    rail.num_peers = topology.num_nodes() - 1;
    rail.max_write_bytes = limits.max_write_bytes;
    rail.max_outstanding = limits.max_writes;
    rail.max_remote_events = limits.max_inbound_events;
    rail.source_address = config.listen_host;
    rail.num_rails = static_cast<int>(num_nics(config));
    for (int nic = 0; nic < rail.num_rails; ++nic) {
      rail.rail_index = nic;
      if (!config.nic_names.empty()) rail.nic_name = config.nic_names[static_cast<std::size_t>(nic)];
      rails.rails.push_back(transport::make_libfabric_rail(rail));
    }
    return rails;
  }
  if (config.transport == "shm") {
    transport::ShmRailConfig rail;
    rail.memory = slots.memory(segment.data());
    rail.region_name = segment.name();
    rail.exported_slots = slots.exported();
    rail.import_slots = [&slots](const std::string& exported) { return slots.import(exported); };
    rail.own_node = topology.node();
    rail.num_nodes = topology.num_nodes();
    rail.inbox_entries = limits.max_inbound_events / (topology.num_nodes() - 1) + 1;
    rail.num_rails = static_cast<int>(num_nics(config));
    std::vector<transport::ShmRail*> raw;
    for (rail.rail_index = 0; rail.rail_index < rail.num_rails; ++rail.rail_index) {
      rail.inbox_name = transport::segment_name(config.job_key, static_cast<int>(topology.rank),
                                                "inbox" + std::to_string(rail.rail_index));
      auto shm = std::make_unique<transport::ShmRail>(rail);
      raw.push_back(shm.get());
      rails.rails.push_back(std::move(shm));
    }
    rails.unlink = [raw] {
      for (transport::ShmRail* shm : raw) shm->unlink();
    };
    return rails;
  }
  throw common::StatusError({common::StatusCode::kConfig, -1, -1, -1, -1,
                             "transport '" + config.transport + "' cannot join nodes: use libfabric or shm"});
}

}  // namespace

Rails open_rails(const GroupConfig& config, const transport::Segment& segment, SlotMemory& slots,
                 const RailLimits& limits) {
  Rails rails = open_plain_rails(config, segment, slots, limits);
  if (!config.reorder) return rails;
  for (std::size_t nic = 0; nic < rails.rails.size(); ++nic) {
    transport::ReorderConfig faults;
    faults.seed = config.reorder_seed;
    faults.rank = config.topology.rank;
    faults.nic = static_cast<std::uint32_t>(nic);
    faults.max_outstanding = limits.max_writes;
    bool drops = config.reorder_drop_nic < 0 || config.reorder_drop_nic == static_cast<std::int32_t>(nic);
    faults.drop_node = drops ? config.reorder_drop_node : -1;
    faults.drop_after = config.reorder_drop_after;
    rails.rails[nic] = std::make_unique<transport::ReorderRail>(std::move(rails.rails[nic]), faults);
  }
  return rails;
}

}  // namespace moe_efa::runtime
