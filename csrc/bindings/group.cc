// Group, its configuration, plans and call arguments. Every call releases the GIL.
#include <pybind11/stl.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <thread>
#include <tuple>

#include "bindings/bindings.h"
#include "common/status.h"
#include "kernels/cuda/plan_view.h"
#include "runtime/device_library.h"
#include "runtime/group.h"

namespace moe_efa::bindings {

namespace py = pybind11;
using runtime::CombineRequest;
using runtime::DispatchRequest;
using runtime::Group;
using runtime::GroupConfig;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);  // NOLINT: the caller vouches for it
}

proto::DType dtype_of(const std::string& name) {  // of a tensor that is sent or received
  if (name == "bf16") return proto::DType::kBf16;
  if (name == "fp32") return proto::DType::kFp32;
  throw common::StatusError({common::StatusCode::kInvalid, -1, -1, -1, -1, "dtype '" + name + "' is not bf16 or fp32"});
}

GroupConfig make_config(const py::kwargs& kwargs) {
  GroupConfig config;
  for (auto item : kwargs) {
    auto name = py::cast<std::string>(item.first);
    py::handle value = item.second;
    if (name == "rank")
      config.topology.rank = py::cast<std::uint32_t>(value);
    else if (name == "num_ranks")
      config.topology.num_ranks = py::cast<std::uint32_t>(value);
    else if (name == "node_size")
      config.topology.node_size = py::cast<std::uint32_t>(value);
    else if (name == "num_experts")
      config.num_experts = py::cast<std::uint32_t>(value);
    else if (name == "hidden_size")
      config.hidden_size = py::cast<std::uint32_t>(value);
    else if (name == "top_k")
      config.top_k = py::cast<std::uint32_t>(value);
    else if (name == "max_tokens_per_rank")
      config.max_tokens_per_rank = py::cast<std::uint32_t>(value);
    else if (name == "wire_dtype")
      config.wire_dtype = py::cast<std::string>(value);
    else if (name == "combine_dtype")
      config.combine_dtype = py::cast<std::string>(value);
    else if (name == "grad_wire_dtype")
      config.grad_wire_dtype = py::cast<std::string>(value);
    else if (name == "grad_combine_dtype")
      config.grad_combine_dtype = py::cast<std::string>(value);
    else if (name == "fp8_scale")
      config.fp8_scale = py::cast<std::string>(value);
    else if (name == "transport")
      config.transport = py::cast<std::string>(value);
    else if (name == "provider")
      config.provider = py::cast<std::string>(value);
    else if (name == "num_nics")
      config.num_nics = py::cast<std::uint32_t>(value);
    else if (name == "nic_names")
      config.nic_names = py::cast<std::vector<std::string>>(value);
    else if (name == "timeout_s")
      config.timeout_s = py::cast<double>(value);
    else if (name == "heartbeat_timeout_s")
      config.heartbeat_timeout_s = py::cast<double>(value);
    else if (name == "memory_budget_bytes")
      config.memory_budget_bytes = py::cast<std::uint64_t>(value);
    else if (name == "job_key")
      config.job_key = py::cast<std::string>(value);
    else if (name == "listen_host")
      config.listen_host = py::cast<std::string>(value);
    else if (name == "libfabric")
      config.libfabric = py::cast<std::string>(value);
    else if (name == "libfabric_hints")
      config.libfabric_hints = py::cast<std::vector<std::string>>(value);
    else if (name == "num_threads")
      config.num_threads = py::cast<std::uint32_t>(value);
    else if (name == "ranks_on_host")
      config.ranks_on_host = py::cast<std::uint32_t>(value);
    else if (name == "chunk_rows")
      config.chunk_rows = py::cast<std::uint32_t>(value);
    else if (name == "slots")
      config.slots = py::cast<std::uint32_t>(value);
    else if (name == "buffers")
      config.buffers = py::cast<std::string>(value);
    else if (name == "device_library")
      config.device_library = py::cast<std::string>(value);
    else if (name == "device_index")
      config.device_index = py::cast<std::int32_t>(value);
    else if (name == "gdrcopy")
      config.gdrcopy = py::cast<std::string>(value);
    else if (name == "reorder")
      config.reorder = py::cast<bool>(value);
    else if (name == "reorder_seed")
      config.reorder_seed = py::cast<std::uint64_t>(value);
    else if (name == "reorder_drop_node")
      config.reorder_drop_node = py::cast<std::int32_t>(value);
    else if (name == "reorder_drop_after")
      config.reorder_drop_after = py::cast<std::uint64_t>(value);
    else if (name == "reorder_drop_nic")
      config.reorder_drop_nic = py::cast<std::int32_t>(value);
    else
      throw py::type_error("GroupConfig has no field '" + name + "'");
  }
  return config;
}

void check_interrupt() {
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// Lets threads of ours into the interpreter, until it ends: then whoever asks for the GIL never returns. Atomics, so
// that a child of fork() cannot find a lock taken.
class Door {
 public:
  bool enter() {
    ++inside_;
    if (!shut_) return true;
    leave();
    return false;
  }
  void leave() { --inside_; }
  void shut(double most_s) {
    shut_ = true;
    auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(most_s);
    while (inside_ > 0 && std::chrono::steady_clock::now() < end) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

 private:
  std::atomic<bool> shut_{false};
  std::atomic<int> inside_{0};
};
Door door;

// Python's allocate(ticket, plan, plan_bytes) -> addresses of rows, weights, scales and memory for the plan.
class Allocate {
 public:
  explicit Allocate(py::function allocate) : allocate_(new py::function(std::move(allocate)), DeleteWithGil()) {}

  runtime::DispatchMemory operator()(std::uint64_t ticket, const runtime::DispatchSizes& sizes) const {
    struct Visit {
      bool let_in = door.enter();
      ~Visit() {
        if (let_in) door.leave();
      }
    } visit;
    if (!visit.let_in) throw runtime::NoMemory("the process is ending");
    py::gil_scoped_acquire gil;
    try {
      using Addresses = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t>;
      auto [x, weights, scales, plan] = (*allocate_)(ticket, sizes.plan, sizes.plan_bytes).cast<Addresses>();
      return {{pointer<void>(x), pointer<float>(weights), pointer<float>(scales)}, pointer<void>(plan)};
    } catch (const py::error_already_set& error) {
      if (!error.matches(PyExc_Exception)) throw;  // an interrupt of the caller who waits
      throw runtime::NoMemory(py::cast<std::string>(error.type().attr("__name__")) + ": " +
                              py::cast<std::string>(py::str(error.value())));
    }
  }

 private:
  struct DeleteWithGil {
    void operator()(py::function* function) const {
      py::gil_scoped_acquire gil;
      delete function;
    }
  };
  std::shared_ptr<py::function> allocate_;  // copied without the GIL
};

// A child of fork() has the object but not its threads: there it is left alone.
struct DeleteInOwnProcess {
  pid_t pid = getpid();
  void operator()(Group* group) const {
    if (getpid() != pid) return;
    // It joins threads and may wait for a GPU.
    std::optional<py::gil_scoped_release> unlocked;
    if (PyGILState_Check() != 0) unlocked.emplace();
    delete group;
  }
};
using GroupPtr = std::unique_ptr<Group, DeleteInOwnProcess>;

// Plans go back and forth between Python and a running call; they are immutable once their dispatch has finished.
using PlanPtr = std::shared_ptr<kernels::Plan>;

// The one word of a plan that changes after its dispatch; a tensor over it keeps it and nothing else of the plan.
struct OverflowFlag {
  std::shared_ptr<std::int64_t> word;
};

DispatchRequest make_dispatch(std::uintptr_t x_ptr, const std::string& dtype, std::uint32_t num_tokens,
                              std::uintptr_t topk_idx_ptr, std::uintptr_t topk_weights_ptr,
                              std::uint32_t expert_alignment, std::optional<std::int64_t> capacity, const PlanPtr& plan,
                              bool gradient, bool fp8_output, std::uintptr_t stream, bool alone,
                              std::uintptr_t send_memory_ptr) {
  if (capacity && (*capacity < 0 || *capacity > INT32_MAX)) {
    throw common::StatusError({common::StatusCode::kInvalid, -1, -1, -1, -1,
                               "capacity " + std::to_string(*capacity) + " is outside [0, 2^31)"});
  }
  if (!plan && expert_alignment == 0) {
    throw common::StatusError({common::StatusCode::kInvalid, -1, -1, -1, -1, "expert_alignment must be positive"});
  }
  return {pointer<const void>(x_ptr),
          dtype_of(dtype),
          num_tokens,
          pointer<const std::int64_t>(topk_idx_ptr),
          pointer<const float>(topk_weights_ptr),
          expert_alignment,
          capacity.value_or(kernels::Plan::kExact),
          plan,
          gradient,
          fp8_output,
          pointer<void>(stream),
          alone,
          pointer<void>(send_memory_ptr)};
}

CombineRequest make_combine(std::uintptr_t y_ptr, const std::string& dtype, const PlanPtr& plan, std::uintptr_t out_ptr,
                            std::uintptr_t weights_ptr, std::uintptr_t weight_grads_ptr,
                            std::uintptr_t topk_weight_grads_ptr, bool gradient, std::uintptr_t stream, bool alone) {
  return {pointer<const void>(y_ptr),
          dtype_of(dtype),
          plan,
          pointer<void>(out_ptr),
          pointer<const float>(weights_ptr),
          pointer<const float>(weight_grads_ptr),
          pointer<float>(topk_weight_grads_ptr),
          gradient,
          pointer<void>(stream),
          alone};
}

py::dict stats_dict(const runtime::GroupStats& stats) {
  py::dict out;
  std::uint64_t wire = 0, floor = 0;
  for (std::uint32_t p = 0; p < proto::kNumPhases; ++p) {
    const runtime::PhaseStats& phase = stats.phases[p];
    py::dict entry;
    entry["calls"] = phase.calls;
    entry["wire_bytes"] = phase.wire_bytes;
    entry["wire_floor_bytes"] = phase.wire_floor_bytes;
    entry["seconds"] = phase.seconds;
    out[proto::phase_name(static_cast<proto::Phase>(p))] = entry;
    wire += phase.wire_bytes;
    floor += phase.wire_floor_bytes;
  }
  out["rounds"] = stats.phases[1].calls;
  out["wire_bytes"] = wire;
  out["wire_floor_bytes"] = floor;
  out["writes"] = stats.writes;
  py::list nics;
  for (const engine::NicStats& nic : stats.nics) {
    py::dict entry;
    entry["writes"] = nic.writes;
    entry["bytes"] = nic.bytes;
    nics.append(entry);
  }
  out["nics"] = nics;
  return out;
}

py::dict info_dict(const runtime::GroupInfo& info) {
  py::dict out;
  out["transport"] = info.transport;
  out["nics"] = info.nics;
  out["chunk_rows"] = info.layout.chunk_rows;
  out["slots"] = info.layout.slots;
  out["publish_slots"] = info.layout.publish_slots;
  out["registered_bytes"] = info.registered_bytes;
  out["num_threads"] = info.num_threads;
  out["device"] = info.device;
  out["buffers"] = info.buffers;
  out["flags"] = info.flags;
  return out;
}

}  // namespace

void bind_group(py::module_& module) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<GroupConfig>(module, "GroupConfig")
      .def(py::init(&make_config))
      .def_readwrite("warn_after_s", &GroupConfig::warn_after_s);

  py::class_<OverflowFlag>(module, "OverflowFlag", py::buffer_protocol()).def_buffer([](const OverflowFlag& flag) {
    return py::buffer_info(flag.word.get(), 1);
  });

  py::class_<kernels::Plan, PlanPtr>(module, "Plan", py::dynamic_attr())
      .def_readonly("plan_id", &kernels::Plan::plan_id)
      .def_readonly("num_tokens", &kernels::Plan::num_tokens)
      .def_readonly("offsets", &kernels::Plan::offsets)
      .def_readonly("tokens_per_expert", &kernels::Plan::tokens_per_expert)
      .def_property_readonly("rows", &kernels::Plan::rows)
      .def_property_readonly("overflow",
                             [](const kernels::Plan& plan) -> std::optional<OverflowFlag> {
                               if (!plan.is_static() || plan.device_view) return std::nullopt;
                               return OverflowFlag{plan.overflow};
                             })
      .def_property_readonly("device_overflow_ptr",
                             [](const kernels::Plan& plan) -> std::optional<std::uintptr_t> {
                               if (!plan.is_static() || !plan.device_view) return std::nullopt;
                               return reinterpret_cast<std::uintptr_t>(plan.device_view->overflow);
                             })
      .def_property_readonly("nbytes", &kernels::Plan::nbytes);

  py::class_<DispatchRequest>(module, "DispatchArgs")
      .def(py::init(&make_dispatch), py::kw_only(), py::arg("x_ptr"), py::arg("dtype"), py::arg("num_tokens"),
           py::arg("topk_idx_ptr") = 0, py::arg("topk_weights_ptr") = 0, py::arg("expert_alignment") = 1,
           py::arg("capacity") = py::none(), py::arg("plan") = py::none(), py::arg("gradient") = false,
           py::arg("fp8_output") = false, py::arg("stream") = 0, py::arg("alone") = true,
           py::arg("send_memory_ptr") = 0);
  py::class_<CombineRequest>(module, "CombineArgs")
      .def(py::init(&make_combine), py::kw_only(), py::arg("y_ptr"), py::arg("dtype"), py::arg("plan"),
           py::arg("out_ptr"), py::arg("weights_ptr") = 0, py::arg("weight_grads_ptr") = 0,
           py::arg("topk_weight_grads_ptr") = 0, py::arg("gradient") = false, py::arg("stream") = 0,
           py::arg("alone") = true);

  py::class_<runtime::DispatchBuffers>(module, "DispatchBuffers")
      .def_readonly("plan", &runtime::DispatchBuffers::plan)
      .def_readonly("x", &runtime::DispatchBuffers::x)
      .def_readonly("weights", &runtime::DispatchBuffers::weights)
      .def_readonly("scales", &runtime::DispatchBuffers::scales);

  py::class_<Group, GroupPtr>(module, "Group")
      .def(py::init([](const GroupConfig& config) {
             std::shared_ptr<kernels::Device> device;
             if (!config.device_library.empty()) {
               device = runtime::open_device(config.device_library, config.device_index);
             }
             GroupPtr group(new Group(config, std::move(device)));
             group->set_interrupt_check(&check_interrupt);
             return group;
           }),
           py::arg("config"), release())
      .def("address", [](const Group& group) { return py::bytes(group.address()); })
      .def("connect", &Group::connect, py::arg("addresses"), release())
      .def(
          "meet",
          [](Group& group, const py::function& poll) {
            py::gil_scoped_release unlocked;
            group.meet([&poll] {
              py::gil_scoped_acquire gil;
              poll();
            });
          },
          py::arg("poll"))
      .def("check", &Group::check, release())
      .def("start", &Group::start, release())
      .def("dispatch_begin", &Group::dispatch_begin, py::arg("args"), release())
      .def(
          "dispatch_finish",
          [](Group& group, std::uintptr_t out_ptr, std::uintptr_t weights_ptr, std::uintptr_t scales_ptr) {
            group.dispatch_finish({pointer<void>(out_ptr), pointer<float>(weights_ptr), pointer<float>(scales_ptr)});
          },
          py::arg("out_ptr"), py::arg("weights_ptr"), py::arg("scales_ptr") = 0, release())
      .def("combine", &Group::combine, py::arg("args"), release())
      .def(
          "set_allocate",
          [](Group& group, py::function allocate) { group.set_allocate(Allocate(std::move(allocate))); },
          py::arg("allocate"))
      .def("own_stream",
           [](const Group& group) {
             return reinterpret_cast<std::uintptr_t>(group.own_stream(proto::Phase::kDispatch));
           })
      .def("device_send_bytes", &Group::device_send_bytes, py::arg("num_tokens"))
      .def("dispatch_start", &Group::dispatch_start, py::arg("args"), py::arg("pool"), release())
      .def("combine_start", &Group::combine_start, py::arg("args"), release())
      .def(
          "finish",
          [](Group& group, std::uint64_t ticket, std::uintptr_t stream) {
            return group.finish(ticket, pointer<void>(stream));
          },
          py::arg("ticket"), py::arg("stream") = 0, release())
      .def(
          "synchronize", [](Group& group, std::uintptr_t stream) { group.synchronize(pointer<void>(stream)); },
          py::arg("stream") = 0, release())
      .def(
          "catch_up", [](Group& group, std::uintptr_t stream) { group.catch_up(pointer<void>(stream)); },
          py::arg("stream"), release())
      .def(
          "capturing", [](const Group& group, std::uintptr_t stream) { return group.capturing(pointer<void>(stream)); },
          py::arg("stream"), release())
      .def("device_plan_bytes", &Group::device_plan_bytes, py::arg("capacity"))
      .def(
          "record_dispatch",
          [](Group& group, const DispatchRequest& request, std::uintptr_t out_ptr, std::uintptr_t weights_ptr,
             std::uintptr_t scales_ptr, std::uintptr_t plan_memory_ptr, std::uintptr_t counts_ptr,
             std::uintptr_t offsets_ptr) {
            return group.record_dispatch(
                request, {{pointer<void>(out_ptr), pointer<float>(weights_ptr), pointer<float>(scales_ptr)},
                          pointer<void>(plan_memory_ptr),
                          {pointer<std::int64_t>(counts_ptr), pointer<std::int32_t>(offsets_ptr)}});
          },
          py::arg("args"), py::kw_only(), py::arg("out_ptr"), py::arg("weights_ptr") = 0, py::arg("scales_ptr") = 0,
          py::arg("plan_memory_ptr") = 0, py::arg("counts_ptr") = 0, py::arg("offsets_ptr") = 0, release())
      .def("record_combine", &Group::record_combine, py::arg("args"), release())
      .def("ended", &Group::ended, py::arg("ticket"), release())
      .def("forget", &Group::forget, py::arg("ticket"), release())
      .def(
          "abort", [](Group& group, const std::string& message) { group.abort(message); }, py::arg("message"),
          release())
      .def(
          "abort_for",
          [](Group& group, const std::string& message, int rank, bool lost) {
            group.abort(common::Status{lost ? common::StatusCode::kPeerLost : common::StatusCode::kPeerTimeout, rank,
                                       -1, -1, -1, message});
          },
          py::arg("message"), py::kw_only(), py::arg("rank"), py::arg("lost"), release())
      .def("close", &Group::close, py::kw_only(), py::arg("collective"), py::arg("timeout_s"), py::arg("reason") = "",
           release())
      .def("stats",
           [](Group& group) {
             runtime::GroupStats stats;
             {
               py::gil_scoped_release unlocked;
               stats = group.stats();
             }
             return stats_dict(stats);
           })
      .def("info", [](const Group& group) { return info_dict(group.info()); });

  module.def(
      "refuse_callbacks", [](double timeout_s) { door.shut(timeout_s); }, py::arg("timeout_s"), release(),
      "At the end of the process: no thread of ours enters the interpreter any more. Waits for one that is in it.");

  module.def(
      "plan_memory",
      [](const GroupConfig& config) {
        runtime::Sizing sizing = runtime::choose_layout(config);
        py::dict out;
        out["registered_bytes"] = sizing.region_bytes;
        out["chunk_rows"] = sizing.layout.chunk_rows;
        out["slots"] = sizing.layout.slots;
        out["publish_slots"] = sizing.layout.publish_slots;
        out["completion_queue_events"] = engine::max_inbound_events(sizing.layout);
        proto::RegionLayout layout(sizing.layout, 0);
        py::dict parts;
        parts["flags"] = layout.flag_bytes();
        parts["counts"] = layout.counts_part_bytes();
        parts["dispatch_rings"] = layout.ring_part_bytes(proto::Phase::kDispatch);
        parts["combine_rings"] = layout.ring_part_bytes(proto::Phase::kCombine);
        parts["dispatch_send_slots"] = layout.send_part_bytes(proto::Phase::kDispatch);
        parts["combine_send_slots"] = layout.send_part_bytes(proto::Phase::kCombine);
        parts["publish"] = layout.publish_part_bytes();
        out["parts"] = parts;
        out["device_words_bytes"] =
            layout.kernel_words_at() + layout.kernel_words_bytes() - (layout.total_bytes() - layout.slots_begin());
        out["dispatch_slot_bytes"] = layout.slot_bytes(proto::Phase::kDispatch);
        out["combine_slot_bytes"] = layout.slot_bytes(proto::Phase::kCombine);
        out["writes_per_nic"] = runtime::kWritesPerNic;
        return out;
      },
      py::arg("config"), "What a configuration registers, before anything is allocated.");
}

}  // namespace moe_efa::bindings
