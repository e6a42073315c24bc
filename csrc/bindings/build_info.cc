// What this build contains and what it found on the host.
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "proto/chunk.h"
#include "runtime/device_library.h"
#include "runtime/gdrcopy.h"
#include "transport/libfabric_loader.h"
#include "transport/libfabric_rail.h"

namespace moe_efa::bindings {

namespace py = pybind11;

void bind_build_info(py::module_& module) {
  module.def(
      "build_info",
      [](const std::string& libfabric, const std::vector<std::string>& hints) {
        transport::LibfabricInfo info = transport::libfabric_info({libfabric, hints});
        py::dict out;
        out["protocol_version"] = proto::kProtocolVersion;
        out["compiler"] = __VERSION__;
        out["libfabric_built"] = info.built;
        out["libfabric_found"] = info.found;
        out["libfabric_path"] = info.path;
        out["libfabric_version"] = info.version;
        out["libfabric_error"] = info.error;
        return out;
      },
      py::arg("libfabric") = "", py::arg("libfabric_hints") = std::vector<std::string>{});
  module.def(
      "device_facts",
      [](const std::string& library, int index) {
        kernels::DeviceFacts facts;
        {
          py::gil_scoped_release release;
          facts = runtime::open_device(library, index)->facts();
        }
        py::dict out;
        out["name"] = facts.name;
        out["kind"] = facts.kind;
        out["num_sms"] = facts.num_sms;
        out["shares_memory"] = facts.shares_memory;
        out["dma_buf"] = facts.dma_buf;
        out["flushes_writes"] = facts.flushes_writes;
        return out;
      },
      py::arg("library"), py::arg("index"));
  module.def(
      "gdrcopy_info",
      [](const std::string& library) {
        runtime::GdrcopyInfo info;
        {
          py::gil_scoped_release release;
          info = runtime::gdrcopy_info(library);
        }
        py::dict out;
        out["usable"] = info.usable;
        out["path"] = info.path;
        out["version"] = info.version;
        out["error"] = info.error;
        return out;
      },
      py::arg("library") = "");
  module.def(
      "libfabric_default_provider",
      [](const std::string& libfabric, const std::vector<std::string>& hints) {
        return transport::default_provider({libfabric, hints});
      },
      py::arg("libfabric") = "", py::arg("libfabric_hints") = std::vector<std::string>{},
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "libfabric_providers",
      [](const std::string& libfabric, const std::vector<std::string>& hints) {
        return transport::available_providers({libfabric, hints});
      },
      py::arg("libfabric") = "", py::arg("libfabric_hints") = std::vector<std::string>{},
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "libfabric_nics",
      [](const std::string& provider, const std::string& libfabric, const std::vector<std::string>& hints) {
        return transport::available_nics({libfabric, hints}, provider);
      },
      py::arg("provider"), py::arg("libfabric") = "", py::arg("libfabric_hints") = std::vector<std::string>{},
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace moe_efa::bindings
