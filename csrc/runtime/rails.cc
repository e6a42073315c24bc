#include "runtime/rails.h"

#include "common/status.h"
#include "transport/libfabric_rail.h"
#include "transport/reorder_rail.h"
#include "transport/shm_rail.h"

namespace moe_efa::runtime {

namespace {

Rails open_plain_rails(const GroupConfig& config, const transport::Segment& region, const RailLimits& limits) {
  const proto::Topology& topology = config.topology;
  Rails rails;
  if (config.transport == "libfabric") {
    transport::LibfabricRailConfig rail;
    rail.search = {config.libfabric, config.libfabric_hints};
    rail.provider = config.provider;
    rail.region = region.data();
    rail.region_bytes = region.size();
    rail.num_peers = topology.num_nodes() - 1;
    rail.max_write_bytes = limits.max_write_bytes;
    rail.max_outstanding = limits.max_writes;
    rail.max_remote_events = limits.max_inbound_events;
    rail.source_address = config.listen_host;
    rails.rails.push_back(transport::make_libfabric_rail(rail));
    return rails;
  }
  if (config.transport == "shm") {
    transport::ShmRailConfig rail;
    rail.region = region.data();
    rail.region_bytes = region.size();
    rail.region_name = region.name();
    rail.inbox_name = transport::segment_name(config.job_key, static_cast<int>(topology.rank), "inbox");
    rail.own_node = topology.node();
    rail.num_nodes = topology.num_nodes();
    rail.inbox_entries = limits.max_inbound_events / (topology.num_nodes() - 1) + 1;
    auto shm = std::make_unique<transport::ShmRail>(rail);
    rails.unlink = [raw = shm.get()] { raw->unlink(); };
    rails.rails.push_back(std::move(shm));
    return rails;
  }
  throw common::StatusError({common::StatusCode::kConfig, -1, -1, -1, -1,
                             "transport '" + config.transport + "' cannot join nodes: use libfabric or shm"});
}

}  // namespace

Rails open_rails(const GroupConfig& config, const transport::Segment& region, const RailLimits& limits) {
  Rails rails = open_plain_rails(config, region, limits);
  if (!config.reorder) return rails;
  for (std::size_t nic = 0; nic < rails.rails.size(); ++nic) {
    transport::ReorderConfig faults;
    faults.seed = config.reorder_seed;
    faults.rank = config.topology.rank;
    faults.nic = static_cast<std::uint32_t>(nic);
    faults.max_outstanding = limits.max_writes;
    faults.drop_node = config.reorder_drop_node;
    faults.drop_after = config.reorder_drop_after;
    rails.rails[nic] = std::make_unique<transport::ReorderRail>(std::move(rails.rails[nic]), faults);
  }
  return rails;
}

}  // namespace moe_efa::runtime
