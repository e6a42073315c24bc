// HostBuffer: memory from the pool that goes back to it with the last reference, for tensors made over its buffer.
#include <memory>

#include "bindings/bindings.h"
#include "runtime/host_pool.h"

namespace moe_efa::bindings {

namespace py = pybind11;
using runtime::HostBuffer;
using runtime::HostPool;

namespace {

py::buffer_info buffer_info(const HostBuffer& buffer) {
  return {buffer.data(), 1, py::format_descriptor<std::uint8_t>::format(), static_cast<py::ssize_t>(buffer.bytes())};
}

}  // namespace

void bind_host_memory(py::module_& module) {
  py::class_<HostBuffer, std::shared_ptr<HostBuffer>>(module, "HostBuffer", py::buffer_protocol())
      .def_buffer(&buffer_info);
  py::class_<HostPool, std::shared_ptr<HostPool>>(module, "HostPool")
      .def(py::init<std::size_t>(), py::kw_only(), py::arg("max_idle_bytes"))
      .def(
          "take",
          [](const std::shared_ptr<HostPool>& pool, std::size_t bytes) {
            return std::make_shared<HostBuffer>(pool, bytes);
          },
          py::arg("bytes"))
      .def("trim", &HostPool::trim, py::arg("max_idle_bytes"))
      .def_property_readonly("idle_bytes", &HostPool::idle_bytes);
}

}  // namespace moe_efa::bindings
