#include "runtime/gdrcopy.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "common/math.h"
#include "common/status.h"
#include "proto/region.h"

namespace moe_efa::runtime {

namespace {

// The part of GDRCopy's interface (major version 2) that is used. Functions return an errno.
struct Handle {
  unsigned long number;
};

struct Library {
  std::string path;
  void (*get_version)(int* major, int* minor) = nullptr;
  void* (*open)() = nullptr;  // null: there is no kernel module
  int (*close)(void* driver) = nullptr;
  int (*pin_buffer)(void* driver, unsigned long address, std::size_t bytes, std::uint64_t token, std::uint32_t va_space,
                    Handle* handle) = nullptr;
  int (*unpin_buffer)(void* driver, Handle handle) = nullptr;
  int (*map)(void* driver, Handle handle, void** address, std::size_t bytes) = nullptr;
  int (*unmap)(void* driver, Handle handle, void* address, std::size_t bytes) = nullptr;
};

constexpr int kMajorVersion = 2;

[[noreturn]] void refuse(const std::string& text) {
  throw common::StatusError({common::StatusCode::kConfig, -1, -1, -1, -1, text});
}

template <typename Function>
void find(void* library, const std::string& path, const char* name, Function** function) {
  *function = reinterpret_cast<Function*>(::dlsym(library, name));
  if (*function == nullptr) refuse(path + " has no " + name);
}

// Never closed: GDRCopy's state is that of the process.
Library open_library(const std::string& given) {
  std::vector<std::string> paths = {given};
  // What the loader knows, then where the EFA guide has it installed.
  if (given.empty()) paths = {"libgdrapi.so.2", "/opt/gdrcopy/lib/libgdrapi.so.2"};
  void* opened = nullptr;
  std::string path, reason;
  for (std::size_t i = 0; opened == nullptr && i < paths.size(); ++i) {
    path = paths[i];
    opened = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (opened == nullptr && reason.empty()) reason = ::dlerror();
  }
  if (opened == nullptr) refuse("GDRCopy's library is not found: " + reason);
  Library library;
  library.path = path;
  find(opened, path, "gdr_runtime_get_version", &library.get_version);
  find(opened, path, "gdr_open", &library.open);
  find(opened, path, "gdr_close", &library.close);
  find(opened, path, "gdr_pin_buffer", &library.pin_buffer);
  find(opened, path, "gdr_unpin_buffer", &library.unpin_buffer);
  find(opened, path, "gdr_map", &library.map);
  find(opened, path, "gdr_unmap", &library.unmap);
  return library;
}

std::string version_of(const Library& library) {
  int major = 0, minor = 0;
  library.get_version(&major, &minor);
  std::string version = std::to_string(major) + "." + std::to_string(minor);
  if (major != kMajorVersion) refuse(library.path + " has version " + version + ", not 2.x");
  return version;
}

void* open_driver(const Library& library) {
  version_of(library);
  void* driver = library.open();
  if (driver == nullptr) {
    refuse("gdr_open of " + library.path + " failed: is the kernel module gdrdrv loaded, and /dev/gdrdrv open to us?");
  }
  return driver;
}

void check(int error, const char* call) {
  if (error != 0) refuse(std::string(call) + " failed: " + std::strerror(error));
}

}  // namespace

struct GdrWindow::Mapping {
  Mapping(const std::string& path, std::byte* memory, std::size_t size)
      : library(open_library(path)), driver(open_driver(library)) {
    // The kernel pins whole pages, and maps from the first one on.
    auto address = reinterpret_cast<std::uintptr_t>(memory), first = address / kPage * kPage;
    offset = address - first;
    bytes = offset + size;
    try {
      check(library.pin_buffer(driver, first, common::round_up<std::size_t>(bytes, kPage), 0, 0, &handle),
            "gdr_pin_buffer");
      pinned = true;
      check(library.map(driver, handle, &mapped, bytes), "gdr_map");
    } catch (...) {
      release();
      throw;
    }
  }

  void release() {
    if (mapped != nullptr) library.unmap(driver, handle, mapped, bytes);
    if (pinned) library.unpin_buffer(driver, handle);
    library.close(driver);
  }

  static constexpr std::size_t kPage = proto::kDevicePageBytes;

  Library library;
  void* driver;
  Handle handle{};
  bool pinned = false;
  void* mapped = nullptr;
  std::size_t offset = 0, bytes = 0;
};

GdrWindow::GdrWindow(const std::string& library, std::byte* memory, std::size_t bytes)
    : mapping_(std::make_unique<Mapping>(library, memory, bytes)) {}

GdrWindow::~GdrWindow() { mapping_->release(); }

std::byte* GdrWindow::data() const { return static_cast<std::byte*>(mapping_->mapped) + mapping_->offset; }

GdrcopyInfo gdrcopy_info(const std::string& path) {
  GdrcopyInfo info;
  try {
    Library library = open_library(path);
    info.path = library.path;
    info.version = version_of(library);
    library.close(open_driver(library));
    info.usable = true;
  } catch (const common::StatusError& error) {
    info.error = error.what();
  }
  return info;
}

}  // namespace moe_efa::runtime
