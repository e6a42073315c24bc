// What a rank tells the others at rendezvous, as bytes: opaque to Python, checked on arrival (I15).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace moe_efa::runtime {

struct Address {
  std::uint32_t rank = 0;
  std::uint64_t layout_hash = 0;
  std::string host;  // of the control connection
  std::uint32_t port = 0;
  std::string segment;  // shared memory that holds the region
  std::uint64_t segment_bytes = 0;
  std::string slots;  // Device::export_memory() of slots that lie apart; empty: they do not, or nobody could reach them
  // May words that only kernels read lie behind those slots?
  bool kernel_words = false;
  std::vector<std::vector<std::byte>> rails;  // one opaque address per NIC

  std::string encode() const;
  // Throws StatusError(kConfig) on anything that encode() cannot have made.
  static Address decode(const std::string& bytes);
};

}  // namespace moe_efa::runtime
