// ExportedMemory: device memory as one process tells another of it. Plain bytes; knows no CUDA.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>

#include "common/status.h"

namespace moe_efa::kernels::cuda {

struct ExportedMemory {
  std::uint64_t magic = kMagic;
  std::uint64_t process = 0;  // this_process() of the exporter
  std::uint64_t address = 0;  // there
  std::uint64_t offset = 0;   // of the memory in what the handle opens
  std::uint8_t handle[64] = {};

  static constexpr std::uint64_t kMagic = 0x31'6d'65'6d'61'66'65'6d;  // "mefamem1"

  std::string encode() const { return {reinterpret_cast<const char*>(this), sizeof(*this)}; }

  // Throws StatusError(kInvalid) for what encode() did not make.
  static ExportedMemory decode(const std::string& exported) {
    ExportedMemory memory;
    if (exported.size() == sizeof(memory)) std::memcpy(&memory, exported.data(), sizeof(memory));
    if (exported.size() != sizeof(memory) || memory.magic != kMagic) {
      throw common::StatusError(
          {common::StatusCode::kInvalid, -1, -1, -1, -1, "import_memory: not made by export_memory of this version"});
    }
    return memory;
  }

  // Which process of this host: containers may give one process id twice, and a fork inherits a random number.
  static std::uint64_t this_process() {
    static const std::uint64_t random = (std::uint64_t{std::random_device{}()} << 32) | std::random_device{}();
    return random ^ (static_cast<std::uint64_t>(::getpid()) * 0x9e3779b97f4a7c15);
  }
};
static_assert(sizeof(ExportedMemory) == 96 && std::is_trivially_copyable_v<ExportedMemory>);

}  // namespace moe_efa::kernels::cuda
