// SrdRail: one NIC of one simulated rank, a thin face of the shared Network.
#pragma once

#include <string>
#include <vector>

#include "simulator/network.h"
#include "transport/rail.h"

namespace moe_efa::simulator {

class SrdRail final : public transport::Rail {
 public:
  SrdRail(Network& network, std::uint32_t rank, std::uint32_t nic) : network_(network), rank_(rank), nic_(nic) {}

  std::vector<std::byte> local_address() const override { return {}; }
  void add_peer(std::uint32_t, std::span<const std::byte>) override {}  // the network knows everybody
  transport::PostResult post_write(const transport::WriteRequest& request) override;
  std::size_t poll(std::span<transport::RailEvent> events) override;
  std::string describe() const override;

 private:
  Network& network_;
  std::uint32_t rank_, nic_;
};

}  // namespace moe_efa::simulator
