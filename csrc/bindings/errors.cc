// StatusError becomes an exception of moe_efa.errors, with rank, phase, epoch and chunk as attributes.
#include <exception>

#include "bindings/bindings.h"
#include "common/status.h"
#include "proto/topology.h"

namespace moe_efa::bindings {

namespace py = pybind11;
using common::StatusCode;

namespace {

py::object optional_int(std::int64_t value) {
  if (value < 0) return py::none();
  return py::int_(value);
}

void raise(const common::Status& status) {
  py::module_ errors = py::module_::import("moe_efa.errors");
  py::object type, instance;
  switch (status.code) {
    case StatusCode::kInvalid:
      PyErr_SetString(PyExc_ValueError, status.message.c_str());
      return;
    case StatusCode::kConfig:
      type = errors.attr("ConfigError");
      instance = type(status.message);
      break;
    case StatusCode::kClosed:
      type = errors.attr("ClosedError");
      instance = type(status.message);
      break;
    default: {
      const char* name = status.code == StatusCode::kPeerLost      ? "PeerLostError"
                         : status.code == StatusCode::kPeerTimeout ? "PeerTimeoutError"
                                                                   : "TransportError";
      py::object phase = py::none();
      if (status.phase >= 0) phase = py::str(proto::phase_name(static_cast<proto::Phase>(status.phase)));
      type = errors.attr(name);
      instance = type(status.message, py::arg("rank") = optional_int(status.rank), py::arg("phase") = phase,
                      py::arg("epoch") = optional_int(status.epoch), py::arg("chunk") = optional_int(status.chunk));
    }
  }
  PyErr_SetObject(type.ptr(), instance.ptr());
}

}  // namespace

void bind_errors(py::module_&) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const common::StatusError& error) {
      raise(error.status());
    }
  });
}

}  // namespace moe_efa::bindings
