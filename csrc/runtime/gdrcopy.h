// GdrWindow: memory of a GPU where the CPU may store into it, by GDRCopy, whose library is opened at run time and needs
// no header to build. Knows nothing of what lies there.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace moe_efa::runtime {

// In all of these `library` is the path of libgdrapi.so; empty: where installers put it.

class GdrWindow {
 public:
  // Throws StatusError(kConfig) with the reason: no library, no kernel module, or memory that cannot be pinned.
  GdrWindow(const std::string& library, std::byte* memory, std::size_t bytes);
  ~GdrWindow();  // before the memory is freed
  GdrWindow(const GdrWindow&) = delete;
  GdrWindow& operator=(const GdrWindow&) = delete;

  // `memory` as the CPU reaches it. Aligned words are stored whole; they leave the CPU, in any order, by
  // common::store_fence(). Loads cross the bus.
  std::byte* data() const;

 private:
  struct Mapping;
  std::unique_ptr<Mapping> mapping_;
};

struct GdrcopyInfo {
  bool usable = false;  // library and kernel module are there, which does not say that memory can be pinned
  std::string path, version;
  std::string error;
};

GdrcopyInfo gdrcopy_info(const std::string& library);

}  // namespace moe_efa::runtime
