// The emulated device as a device library. Its calls return when their kernels are done, since tensors on the CPU have
// no stream; with the index -1 they return before, as those of a GPU do.
#include <cstdio>

#include "emulated_device.h"

extern "C" __attribute__((visibility("default"))) moe_efa::kernels::Device* moe_efa_open_device(std::uint32_t abi,
                                                                                                int index, char* error,
                                                                                                std::size_t bytes) {
  if (abi != moe_efa::kernels::kDeviceAbi) {
    std::snprintf(error, bytes, "made for another version of moe_efa");
    return nullptr;
  }
  return new moe_efa::testing::EmulatedDevice(index < 0);
}
