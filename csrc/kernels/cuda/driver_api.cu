#include "kernels/cuda/driver_api.h"

#include "kernels/cuda/cuda_launch.h"

namespace moe_efa::kernels::cuda {

namespace {

using common::StatusCode;
using common::StatusError;

// `version` fixes the signature: the one that the driver's headers had then. Null where this driver has none.
template <class Function>
void find(const char* name, unsigned version, Function* out) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &result);
  // A version after the driver's is an invalid value.
  if (error != cudaErrorInvalidValue) check_cuda(error, "cudaGetDriverEntryPointByVersion");
  *out = result == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(found) : nullptr;
}

template <class Function>
void require(const char* name, unsigned version, Function* out) {
  find(name, version, out);
  if (*out != nullptr) return;
  throw StatusError(
      {StatusCode::kConfig, -1, -1, -1, -1, std::string("the NVIDIA driver has no ") + name + ": update it"});
}

DriverApi find_all() {
  DriverApi api{};
  require("cuGetErrorName", 6000, &api.get_error_name);
  require("cuGetErrorString", 6000, &api.get_error_string);
  require("cuDeviceGet", 2000, &api.device_get);
  require("cuDeviceGetAttribute", 2000, &api.device_get_attribute);
  require("cuDevicePrimaryCtxRetain", 7000, &api.primary_context_retain);
  require("cuDevicePrimaryCtxRelease", 11000, &api.primary_context_release);
  require("cuCtxGetCurrent", 4000, &api.context_get_current);
  require("cuCtxPushCurrent", 4000, &api.context_push);
  require("cuCtxPopCurrent", 4000, &api.context_pop);
  require("cuThreadExchangeStreamCaptureMode", 10010, &api.exchange_capture_mode);
  require("cuMemGetAddressRange", 3020, &api.memory_get_range);
  find("cuMemGetHandleForAddressRange", 11070, &api.memory_get_handle);
  find("cuFuncLoad", 12040, &api.function_load);
  return api;
}

}  // namespace

const DriverApi& driver_api() {
  static const DriverApi api = find_all();
  return api;
}

void check_driver(CUresult result, const char* call) {
  if (result == CUDA_SUCCESS) return;
  const char* name = nullptr;
  const char* text = nullptr;
  driver_api().get_error_name(result, &name);
  driver_api().get_error_string(result, &text);
  std::ostringstream message;
  message << call << ": " << (name != nullptr ? name : "unknown error") << " (" << result << "), "
          << (text != nullptr ? text : "no text");
  throw StatusError({StatusCode::kInternal, -1, -1, -1, -1, message.str()});
}

}  // namespace moe_efa::kernels::cuda
