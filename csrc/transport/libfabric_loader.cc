// Opens libfabric at run time: see the header. Keeps the process's signal handlers and environment as they were.
#include "transport/libfabric_loader.h"

#include "common/status.h"

#if MOE_EFA_HAVE_LIBFABRIC
#include <dlfcn.h>
#include <rdma/fi_errno.h>
#include <sys/stat.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <utility>
#endif

namespace moe_efa::transport {

#if !MOE_EFA_HAVE_LIBFABRIC

LibfabricInfo libfabric_info(const LibfabricSearch&) {
  LibfabricInfo info;
  info.error = "built without libfabric headers: install libfabric-dev (or the EFA installer) and build again";
  return info;
}

#else

namespace {

using common::Status;
using common::StatusCode;
using common::StatusError;

// An environment variable for the duration of one call, unless the value is empty or the user has set it.
class VariableGuard {
 public:
  VariableGuard(const char* name, const std::string& value) : name_(name), set_(!value.empty() && !std::getenv(name)) {
    if (set_) ::setenv(name_, value.c_str(), 1);
  }
  ~VariableGuard() {
    if (set_) ::unsetenv(name_);
  }
  VariableGuard(const VariableGuard&) = delete;
  VariableGuard& operator=(const VariableGuard&) = delete;

 private:
  const char* name_;
  bool set_;
};

bool is_folder(const std::string& path) {
  struct stat status;
  return ::stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

bool exists(const std::string& path) {
  struct stat status;
  return ::stat(path.c_str(), &status) == 0;
}

std::string library_file(const std::string& entry) { return is_folder(entry) ? entry + "/libfabric.so.1" : entry; }

// A program linked against headers of API <= 1.17 binds these versions: they hold that era's struct layouts.
// Later headers append fields only, and their versions are the library's defaults.
void* symbol(void* library, const char* name, const char* version) {
  void* found =
      FI_VERSION(FI_MAJOR_VERSION, FI_MINOR_VERSION) <= FI_VERSION(1, 17) ? ::dlvsym(library, name, version) : nullptr;
  return found != nullptr ? found : ::dlsym(library, name);
}

template <typename Function>
bool resolve(void* library, const char* name, const char* version, Function* out) {
  *out = reinterpret_cast<Function>(symbol(library, name, version));
  return *out != nullptr;
}

// Returns an empty string on success, else why this candidate does not do.
std::string open_candidate(const std::string& file, LibfabricApi* api) {
  void* library = ::dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return ::dlerror();
  decltype(&::fi_version) version = nullptr;
  if (!resolve(library, "fi_getinfo", "FABRIC_1.3", &api->getinfo_symbol) ||
      !resolve(library, "fi_freeinfo", "FABRIC_1.3", &api->freeinfo) ||
      !resolve(library, "fi_dupinfo", "FABRIC_1.3", &api->dupinfo) ||
      !resolve(library, "fi_fabric", "FABRIC_1.1", &api->fabric) ||
      !resolve(library, "fi_strerror", "FABRIC_1.0", &api->strerror) ||
      !resolve(library, "fi_version", "FABRIC_1.0", &version)) {
    return file + ": does not export libfabric's symbols";
  }
  api->version = version();
  if (api->version < FI_VERSION(1, 17)) return file + ": version " + api->version_text() + " is older than 1.17";
  Dl_info where;
  api->path =
      ::dladdr(reinterpret_cast<void*>(version), &where) != 0 && where.dli_fname != nullptr ? where.dli_fname : file;
  const std::size_t slash = api->path.rfind('/');
  const std::string plugins = slash == std::string::npos ? "" : api->path.substr(0, slash) + "/libfabric";
  if (!plugins.empty() && is_folder(plugins)) api->provider_path = plugins;
  return "";
}

std::mutex g_mutex;
const LibfabricApi* g_api = nullptr;  // never freed: providers' threads may outlive static destruction

}  // namespace

SignalGuard::SignalGuard() {
  for (std::size_t i = 0; i < kCount; ++i) saved_[i] = ::sigaction(kSignals[i], nullptr, &actions_[i]) == 0;
}

SignalGuard::~SignalGuard() {
  for (std::size_t i = 0; i < kCount; ++i) {
    if (saved_[i]) ::sigaction(kSignals[i], &actions_[i], nullptr);
  }
}

int LibfabricApi::getinfo(std::uint32_t api_version, const char* node, std::uint64_t flags, const fi_info* hints,
                          fi_info** out) const {
  std::lock_guard<std::mutex> lock(g_mutex);  // the guards below change process-wide state
  SignalGuard signals;
  VariableGuard plugins("FI_PROVIDER_PATH", provider_path);
  // The efa provider would open the shm provider beside it, for peers on this host: rails have none, and what it makes
  // in /dev/shm outlives a killed process. It reads this once, when it is loaded.
  VariableGuard no_shm("FI_EFA_ENABLE_SHM_TRANSFER", "0");
  return getinfo_symbol(api_version, node, nullptr, flags, hints, out);
}

std::string LibfabricApi::version_text() const {
  return std::to_string(FI_MAJOR(version)) + "." + std::to_string(FI_MINOR(version));
}

const LibfabricApi& load_libfabric(const LibfabricSearch& search) {
  std::lock_guard<std::mutex> lock(g_mutex);
  if (g_api != nullptr) return *g_api;

  std::vector<std::string> candidates;
  if (!search.library.empty()) {
    candidates.push_back(library_file(search.library));
  } else {
    for (const char* folder : {"/opt/amazon/efa/lib64", "/opt/amazon/efa/lib"}) {
      if (is_folder(folder)) candidates.push_back(library_file(folder));
    }
    for (const std::string& hint : search.hints) {
      const std::string file = library_file(hint);
      if (exists(file)) candidates.push_back(file);
    }
    candidates.push_back("libfabric.so.1");
  }

  ::setenv("IPATH_NO_BACKTRACE", "1", 0);
  std::string reasons;
  for (const std::string& file : candidates) {
    SignalGuard signals;
    auto api = std::make_unique<LibfabricApi>();
    std::string reason = open_candidate(file, api.get());
    if (reason.empty()) {
      g_api = api.release();
      return *g_api;
    }
    reasons += "\n  " + reason;
  }
  Status status;
  status.code = StatusCode::kConfig;
  status.message =
      "no usable libfabric (>= 1.17) found; install the EFA installer's, the distribution's libfabric1, or"
      " name one with MOE_EFA_LIBFABRIC. Tried:" +
      reasons;
  throw StatusError(std::move(status));
}

LibfabricInfo libfabric_info(const LibfabricSearch& search) {
  LibfabricInfo info;
  info.built = true;
  try {
    const LibfabricApi& api = load_libfabric(search);
    info.found = true;
    info.path = api.path;
    info.version = api.version_text();
  } catch (const std::exception& error) {
    info.error = error.what();
  }
  return info;
}

std::string libfabric_error_text(std::int64_t error) {
  const int number = static_cast<int>(error < 0 ? -error : error);
  const LibfabricApi* api = g_api;  // set before any call that could fail
  return std::string(api != nullptr ? api->strerror(number) : "libfabric error") + " (" + std::to_string(number) + ")";
}

void throw_libfabric_error(const char* call, std::int64_t error, const std::string& where) {
  const std::string text(call);
  std::string name = text.substr(0, text.find('('));
  if (const std::size_t arrow = name.find_last_of(".>"); arrow != std::string::npos) name = name.substr(arrow + 1);
  if (name.rfind("fi_", 0) != 0) name = "fi_" + name;
  Status status;
  status.code = StatusCode::kTransport;
  status.message = where + ": " + name + " failed: " + libfabric_error_text(error);
  throw StatusError(std::move(status));
}

#endif  // MOE_EFA_HAVE_LIBFABRIC

}  // namespace moe_efa::transport
