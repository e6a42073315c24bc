// Opens a device library (kernels/device.h) at run time, so that the extension links no CUDA. Knows nothing of what is
// inside.
#pragma once

#include <memory>
#include <string>

#include "kernels/device.h"

namespace moe_efa::runtime {

// Device `index` of the library at `path`. A library is never unloaded: drivers leave threads in it. Throws
// StatusError(kConfig) with the path and the reason: no such file, not a device library, one of another build, or what
// the library itself says, such as that there is no driver.
std::shared_ptr<kernels::Device> open_device(const std::string& path, int index);

}  // namespace moe_efa::runtime
