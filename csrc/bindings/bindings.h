// One bind function per area; module.cc calls them all. pybind11 lives in this folder only.
#pragma once

#include <pybind11/pybind11.h>

namespace moe_efa::bindings {

void bind_errors(pybind11::module_& module);
void bind_group(pybind11::module_& module);
void bind_build_info(pybind11::module_& module);
void bind_host_memory(pybind11::module_& module);
void bind_engine_cost(pybind11::module_& module);
void bind_simulator(pybind11::module_& module);
void bind_wire(pybind11::module_& module);

}  // namespace moe_efa::bindings
