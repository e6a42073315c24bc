// The stand-in for GDRCopy's library (gdrcopy_stand_in.cc), which lies beside the program.
#pragma once

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>

namespace moe_efa::testing {

struct GdrcopyStandIn {
  GdrcopyStandIn() {
    path = std::filesystem::read_symlink("/proc/self/exe").parent_path() / "gdrcopy_stand_in.so";
    void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw std::runtime_error(::dlerror());
    stores = reinterpret_cast<long (*)()>(::dlsym(library, "gdr_stand_in_stores"));
    live = reinterpret_cast<long (*)()>(::dlsym(library, "gdr_stand_in_live"));
  }

  std::string path;
  long (*stores)();
  long (*live)();
};

inline const GdrcopyStandIn& stand_in() {
  static const GdrcopyStandIn found;
  return found;
}

// What does not work meanwhile.
struct Failing {
  explicit Failing(const char* what) { ::setenv("GDR_STAND_IN_FAILS", what, 1); }
  ~Failing() { ::unsetenv("GDR_STAND_IN_FAILS"); }
};

}  // namespace moe_efa::testing
