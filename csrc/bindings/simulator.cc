// The simulator: one run of one profile and seed, without the GIL.
#include "simulator/check.h"

#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "simulator/profile.h"

namespace moe_efa::bindings {

namespace py = pybind11;

void bind_simulator(py::module_& module) {
  module.def("simulate_profiles", [] { return simulator::profile_names(); });
  module.def(
      "simulate_check",
      [](const std::string& profile, std::uint64_t seed, std::uint32_t num_ranks, std::size_t trace_lines) {
        simulator::CheckResult result;
        {
          py::gil_scoped_release release;
          simulator::CheckOptions options;
          options.num_ranks = num_ranks;
          options.trace_lines = trace_lines;
          result = simulator::run_check(profile, seed, options);
        }
        py::dict out;
        out["ok"] = result.ok;
        out["message"] = result.message;
        out["profile"] = result.profile;
        out["seed"] = result.seed;
        out["num_ranks"] = result.num_ranks;
        out["node_size"] = result.node_size;
        out["events"] = result.events;
        out["virtual_us"] = result.virtual_us;
        out["epochs"] = result.epochs;
        out["inflight_high_water"] = result.inflight_high_water;
        out["inbound_high_water"] = result.inbound_high_water;
        out["inbound_limit"] = result.inbound_limit;
        return out;
      },
      py::arg("profile"), py::arg("seed"), py::kw_only(), py::arg("num_ranks") = 0, py::arg("trace_lines") = 40);
}

}  // namespace moe_efa::bindings
