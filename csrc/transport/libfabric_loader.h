// Finds and opens libfabric at run time, so that one binary serves every libfabric from 1.17 to 2.x and needs none
// to load. Knows nothing of rails. Without the libfabric headers at build time (MOE_EFA_HAVE_LIBFABRIC 0) every
// function still links and says what to install.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#if !defined(MOE_EFA_HAVE_LIBFABRIC)
#define MOE_EFA_HAVE_LIBFABRIC 0
#endif

#if MOE_EFA_HAVE_LIBFABRIC
#include <rdma/fabric.h>
#include <signal.h>

#include <cstddef>
#include <sstream>
#endif

namespace moe_efa::transport {

// Where to look, in this order: `library` alone when it is not empty (the value of MOE_EFA_LIBFABRIC), the EFA
// installer's folders, `hints`, the loader's path. An entry is a file or a folder that holds libfabric.so.1.
//
// Environment of the process: libfabric itself reads FI_*. FI_PROVIDER_PATH is set for the moment of loading if it is
// unset and the library has a folder of provider plug-ins beside it (a Python wheel's library was built for a path
// that does not exist here). IPATH_NO_BACKTRACE is set to 1 if unset.
struct LibfabricSearch {
  std::string library;
  std::vector<std::string> hints;
};

struct LibfabricInfo {
  bool built = false;  // headers were there when this extension was built
  bool found = false;
  std::string path;     // of the library, as the loader resolved it
  std::string version;  // "2.5"
  std::string error;    // why not found
};

// Opens the library (once per process) and tells what it is. Does not throw.
LibfabricInfo libfabric_info(const LibfabricSearch& search);

#if MOE_EFA_HAVE_LIBFABRIC

// Puts the process's signal handlers back. Providers and their support libraries install their own while they load
// (PSM) or open (shm), over SIGINT too, which would take KeyboardInterrupt away from Python.
class SignalGuard {
 public:
  SignalGuard();
  ~SignalGuard();
  SignalGuard(const SignalGuard&) = delete;
  SignalGuard& operator=(const SignalGuard&) = delete;

 private:
  static constexpr int kSignals[] = {SIGHUP, SIGINT,  SIGQUIT, SIGILL,  SIGTRAP, SIGABRT, SIGBUS,
                                     SIGFPE, SIGSEGV, SIGPIPE, SIGTERM, SIGUSR1, SIGUSR2, SIGCHLD};
  static constexpr std::size_t kCount = sizeof(kSignals) / sizeof(kSignals[0]);
  struct sigaction actions_[kCount];
  bool saved_[kCount];
};

// The symbols that libfabric exports; everything else in its headers is an inline call through an object.
struct LibfabricApi {
  decltype(&::fi_freeinfo) freeinfo = nullptr;
  decltype(&::fi_dupinfo) dupinfo = nullptr;
  decltype(&::fi_fabric) fabric = nullptr;
  decltype(&::fi_strerror) strerror = nullptr;
  std::uint32_t version = 0;  // FI_VERSION(major, minor) of the library
  std::string path;

  // fi_getinfo under a SignalGuard, with FI_PROVIDER_PATH set if need be. `api_version` decides a provider's rules.
  int getinfo(std::uint32_t api_version, const char* node, std::uint64_t flags, const fi_info* hints,
              fi_info** out) const;
  std::string version_text() const;

  decltype(&::fi_getinfo) getinfo_symbol = nullptr;
  std::string provider_path;  // FI_PROVIDER_PATH while calling fi_getinfo; empty: leave it alone
};

// The first success holds for the life of the process: a library that has spawned threads is never unloaded.
// Throws StatusError(kConfig) listing what was tried.
const LibfabricApi& load_libfabric(const LibfabricSearch& search);

// "Connection refused (111)"; any sign. Usable once a library was loaded.
std::string libfabric_error_text(std::int64_t error);

[[noreturn]] void throw_libfabric_error(const char* call, std::int64_t error, const std::string& where);

// Runs a libfabric call; a negative result becomes StatusError(kTransport) with the call's name, its text and the
// streamed rest, which says where ("rail 1").
#define FI_CHECK(call, ...)                                                                       \
  do {                                                                                            \
    const std::int64_t fi_check_result = (call);                                                  \
    if (fi_check_result < 0) [[unlikely]] {                                                       \
      std::ostringstream fi_check_stream;                                                         \
      fi_check_stream << __VA_ARGS__;                                                             \
      ::moe_efa::transport::throw_libfabric_error(#call, fi_check_result, fi_check_stream.str()); \
    }                                                                                             \
  } while (0)

#endif  // MOE_EFA_HAVE_LIBFABRIC

}  // namespace moe_efa::transport
