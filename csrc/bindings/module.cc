// moe_efa._C: the native extension. No torch here: tensors cross as pointers.
#include "bindings/bindings.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native parts of moe_efa: protocol, transports, CPU kernels.";
  moe_efa::bindings::bind_errors(module);
  moe_efa::bindings::bind_group(module);
  moe_efa::bindings::bind_build_info(module);
  moe_efa::bindings::bind_host_memory(module);
  moe_efa::bindings::bind_engine_cost(module);
  moe_efa::bindings::bind_simulator(module);
  moe_efa::bindings::bind_wire(module);
}
