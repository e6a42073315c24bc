#include "runtime/device_library.h"

#include <dlfcn.h>

#include "common/status.h"

namespace moe_efa::runtime {

namespace {

[[noreturn]] void refuse(const std::string& path, const std::string& reason) {
  throw common::StatusError(
      {common::StatusCode::kConfig, -1, -1, -1, -1, "cannot open a device of " + path + ": " + reason});
}

}  // namespace

std::shared_ptr<kernels::Device> open_device(const std::string& path, int index) {
  // Without a slash the loader would search the system for it, and an empty path would be this program.
  if (path.find('/') == std::string::npos) refuse("'" + path + "'", "the path of a library is needed");
  void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = ::dlerror();
    refuse(path, reason != nullptr ? reason : "unknown reason");
  }
  auto open = reinterpret_cast<kernels::OpenDevice>(::dlsym(library, kernels::kOpenDeviceSymbol));
  if (open == nullptr) refuse(path, std::string("it has no ") + kernels::kOpenDeviceSymbol);
  char error[1024] = "";
  kernels::Device* device = open(kernels::kDeviceAbi, index, error, sizeof(error));
  if (device == nullptr) refuse(path, error[0] != '\0' ? error : "it gives no reason");
  return std::shared_ptr<kernels::Device>(device);
}

}  // namespace moe_efa::runtime
