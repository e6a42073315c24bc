#include "simulator/srd_rail.h"

namespace moe_efa::simulator {

transport::PostResult SrdRail::post_write(const transport::WriteRequest& request) {
  return network_.post(rank_, nic_, request);
}

std::size_t SrdRail::poll(std::span<transport::RailEvent> events) { return network_.poll(rank_, nic_, events); }

std::string SrdRail::describe() const { return "simulated SRD, NIC " + std::to_string(nic_); }

}  // namespace moe_efa::simulator
