// The calls of the CUDA driver that the runtime API has no like of. They are found through the runtime API, which opens
// the driver itself, so that libcuda is not linked.
#pragma once

#include <cudaTypedefs.h>

namespace moe_efa::kernels::cuda {

struct DriverApi {
  PFN_cuGetErrorName_v6000 get_error_name;
  PFN_cuGetErrorString_v6000 get_error_string;
  PFN_cuDeviceGet_v2000 device_get;
  PFN_cuDeviceGetAttribute_v2000 device_get_attribute;
  PFN_cuDevicePrimaryCtxRetain_v7000 primary_context_retain;
  PFN_cuDevicePrimaryCtxRelease_v11000 primary_context_release;
  PFN_cuCtxGetCurrent_v4000 context_get_current;
  PFN_cuCtxPushCurrent_v4000 context_push;
  PFN_cuCtxPopCurrent_v4000 context_pop;
  PFN_cuThreadExchangeStreamCaptureMode_v10010 exchange_capture_mode;
  PFN_cuMemGetAddressRange_v3020 memory_get_range;
  PFN_cuMemGetHandleForAddressRange_v11070 memory_get_handle;  // null: an older driver
  PFN_cuFuncLoad_v12040 function_load;                         // null: an older driver
};

// Found once. Throws StatusError where there is no driver.
const DriverApi& driver_api();

// A result that is no success becomes StatusError with the call's name and the driver's text.
void check_driver(CUresult result, const char* call);

}  // namespace moe_efa::kernels::cuda
