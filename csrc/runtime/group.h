// Group: one rank's native object. It owns the region, the rails, the engine, the driver thread and the failure
// detector, and runs one call at a time; others may have been started, and go on beside it and without it. It knows no
// tensors: pointers, sizes and plans.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/status.h"
#include "engine/descriptor_ring.h"
#include "engine/engine.h"
#include "kernels/cpu/combine_call.h"
#include "kernels/cpu/dispatch_call.h"
#include "kernels/device.h"
#include "kernels/device/dispatch_call.h"
#include "kernels/device/recording.h"
#include "kernels/device/state.h"
#include "kernels/launch.h"
#include "proto/region.h"
#include "runtime/address.h"
#include "runtime/background.h"
#include "runtime/config.h"
#include "runtime/driver.h"
#include "runtime/futex_doorbell.h"
#include "runtime/host_pool.h"
#include "runtime/slot_memory.h"
#include "runtime/started_call.h"
#include "runtime/thread_pool.h"
#include "transport/liveness.h"
#include "transport/pump.h"
#include "transport/rail.h"
#include "transport/segment.h"

namespace moe_efa::runtime {

struct DispatchRequest {
  const void* x = nullptr;
  proto::DType dtype = proto::DType::kBf16;
  std::uint32_t num_tokens = 0;
  const std::int64_t* topk_idx = nullptr;  // fresh
  const float* topk_weights = nullptr;     // fresh
  std::uint32_t expert_alignment = 1;
  std::int64_t capacity = kernels::Plan::kExact;  // fresh: rows of the output in static mode
  std::shared_ptr<kernels::Plan> plan;            // a replay
  bool gradient = false;                          // x is one: sent in grad_wire_dtype
  bool fp8_output = false;                        // hand the rows of an FP8 wire through
  // On a device:
  void* stream = nullptr;       // the caller's
  bool alone = true;            // kernels go there, and not on a stream of their own
  void* send_memory = nullptr;  // fresh: device_send_bytes(num_tokens) that live as long as the plan
};

struct CombineRequest {
  const void* y = nullptr;
  proto::DType dtype = proto::DType::kBf16;
  std::shared_ptr<kernels::Plan> plan;
  void* out = nullptr;
  const float* weights = nullptr;
  const float* weight_grads = nullptr;
  float* topk_weight_grads = nullptr;
  bool gradient = false;  // y is one: sent in grad_combine_dtype
  // On a device, as in DispatchRequest:
  void* stream = nullptr;
  bool alone = true;
};

// On a device: what a dispatch needs memory for once its sizes are known, and where that is.
struct DispatchSizes {
  std::shared_ptr<kernels::Plan> plan;
  std::size_t plan_bytes = 0;  // of device memory that lives as long as the plan
};
struct DispatchMemory {
  kernels::DispatchOutput output;
  void* plan_memory = nullptr;
};
struct NoMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where a dispatch in a graph puts what it gives: memory of the device that the caller keeps as long as the graph.
struct RecordedOutput {
  kernels::DispatchOutput rows;
  void* plan_memory = nullptr;             // fresh: device_plan_bytes(capacity)
  kernels::device::RecordedTables tables;  // fresh
};

struct PhaseStats {
  std::uint64_t calls = 0;
  std::uint64_t wire_bytes = 0;        // posted towards other nodes: headers, metadata and counts included
  std::uint64_t wire_floor_bytes = 0;  // one row, FP8 with its scales, per (token, remote node)
  double seconds = 0;
};

struct GroupStats {
  PhaseStats phases[proto::kNumPhases];
  std::uint64_t writes = 0;
  std::vector<engine::NicStats> nics;  // what of it each NIC took
};

struct GroupInfo {
  std::string transport;
  std::vector<std::string> nics;  // one description per rail; empty on a single node
  proto::LayoutConfig layout;
  std::uint64_t registered_bytes = 0;
  std::uint32_t num_threads = 1;
  std::string device;   // that runs the kernels; empty = the CPU
  std::string buffers;  // where slots are: "host" | "device"
  std::string flags;    // where words are that only kernels read: the same
};

class Group {
 public:
  // Region, rails, listener; talks to nobody. `device`: where its tensors are, null for the CPU.
  explicit Group(const GroupConfig& config, std::shared_ptr<kernels::Device> device = nullptr);
  ~Group();
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  std::string address() const;
  void connect(const std::vector<std::string>& addresses);  // of all ranks, by rank: maps their memory
  // Opens the control connections, after every rank has connected. `poll` is called while it waits and may throw.
  void meet(const std::function<void()>& poll);
  void start();        // after every rank has met its peers
  void check() const;  // throws the first failure, if there is one

  // Called now and then by waiting loops; may throw (an interrupted interpreter).
  void set_interrupt_check(std::function<void()> check) { interrupt_check_ = std::move(check); }
  // On a device, before the first call: gives a dispatch its memory, once, when the sizes are known. Called by whoever
  // steps the calls, a waiting caller or the background, and with no lock held, so it may take its time; but what it
  // waits for must not wait for a call. Throws NoMemory.
  using Allocate = std::function<DispatchMemory(std::uint64_t ticket, const DispatchSizes& sizes)>;
  void set_allocate(Allocate allocate) { allocate_ = std::move(allocate); }

  // A dispatch is two calls, since the caller allocates the output once the sizes are known.
  std::shared_ptr<kernels::Plan> dispatch_begin(const DispatchRequest& request);
  void dispatch_finish(const kernels::DispatchOutput& output);
  void combine(const CombineRequest& request);

  // The same in two halves: the first returns a ticket at once, finish() waits for the rest. In between the call goes
  // on in the background; what it reads, and where a combine writes, is left alone. Calls of a phase run one after the
  // other, in the order of all calls (I14); finish() may come in any order.
  std::uint64_t dispatch_start(const DispatchRequest& request, std::shared_ptr<HostPool> pool);
  std::uint64_t combine_start(const CombineRequest& request);
  // `stream`: on a device, where the caller goes on.
  DispatchBuffers finish(std::uint64_t ticket, void* stream = nullptr);  // empty for a combine
  bool ended(std::uint64_t ticket) const;                                // finish() would not wait
  // Instead of finish(): true, and the ticket is gone, once the call touches no memory of the caller's any more.
  // Nothing else ends a call that was started: its results are dropped, but the others get from this rank what it owes
  // them.
  bool forget(std::uint64_t ticket);

  // On a device all calls are started (`pool` is not used), and finish() returns when the results are ready on the
  // caller's stream. A dispatch has its memory by set_allocate().
  // Until finished calls are done, which on a device is later, and what graphs replay on the stream.
  void synchronize(void* stream = nullptr);
  std::size_t device_send_bytes(std::uint32_t num_tokens) const;

  // Into a graph: kernels are queued on request.stream, which is being captured, and at every replay they are a call of
  // this group. A dispatch is of a capacity or of a plan.
  std::shared_ptr<kernels::Plan> record_dispatch(const DispatchRequest& request, const RecordedOutput& output);
  void record_combine(const CombineRequest& request);
  // Before a call that is no replay is started: until the stream has come to it, so that all ranks number calls and
  // replays in the order of their streams (I14). Nothing may be held that set_allocate()'s function waits for.
  void catch_up(void* stream);
  bool capturing(void* stream) const { return device_ && device_->capturing(stream); }
  std::size_t device_plan_bytes(std::int64_t capacity) const;
  // Where the kernels of calls go that are not alone.
  void* own_stream(proto::Phase phase) const { return device_->own_stream(static_cast<std::uint32_t>(phase)); }

  // Fails the group on every rank. The blame is on this rank, unless the caller knows better.
  void abort(const std::string& message);
  void abort(const common::Status& status);
  // Lets started calls run out and drains; waits for the others when `collective`. Throws kPeerTimeout naming nobody's
  // fault but the clock's. `reason`: the error that makes this rank leave, for those who turn out to need it.
  void close(bool collective, double timeout_s, const std::string& reason = {});

  GroupStats stats();
  GroupInfo info() const;
  const kernels::Device* device() const { return device_.get(); }

 private:
  void make_rails();
  [[noreturn]] void fail(common::Status status);
  void record(const common::Status& status);
  void check_open(std::optional<proto::Phase> entering = std::nullopt);
  bool peer_left(std::uint32_t rank, bool wait) const;
  common::Status departure(proto::Phase phase, std::int64_t epoch, std::uint64_t calls_begun) const;
  void drain(double most_s);
  void check_results(double timeout_s);
  std::uint64_t calls_begun() const;
  std::int64_t next_epoch(proto::Phase phase) const;
  std::uint64_t calls_done();
  bool left_behind();
  void close_together(double timeout_s);
  struct Prepared {
    std::shared_ptr<kernels::Plan> plan;
    proto::DType wire, out;
  };
  Prepared prepare_dispatch(const DispatchRequest& request);
  kernels::CombineArgs prepare_combine(const CombineRequest& request);
  void count(proto::Phase phase, const kernels::Plan& plan, proto::DType wire);
  void count_locked(proto::Phase phase, const kernels::Plan& plan, proto::DType wire);
  template <typename Call>
  bool step_call(Call& call, proto::Phase phase);
  template <typename Call>
  kernels::Waiting waiting_for(const Call& call, proto::Phase phase);
  template <typename Call, typename Until>
  void run(Call& call, proto::Phase phase, const Until& until);
  void run_in_turn(const StartedCall& call, const std::function<bool()>& until);
  bool step_background();
  void stand_in(bool caller_waits);
  void drop_started();
  // With calls_mutex_ held:
  std::uint64_t start_call(std::shared_ptr<StartedCall> call);
  bool step_started();
  void settle_background();
  void check_patience(proto::Phase phase, std::int64_t epoch, const kernels::Waiting& waiting, double idle_s,
                      bool* warned);
  common::Status peer_failure(proto::Phase phase, std::int64_t epoch, const kernels::Waiting& waiting) const;
  void place_kernel_words(const std::vector<Address>& addresses);
  void open_device_state();
  void stop_kernels();
  void close_device();
  std::shared_ptr<kernels::Plan> new_device_plan(const DispatchRequest& request) const;
  std::uint64_t start_device_dispatch(const DispatchRequest& request, const Prepared& prepared);
  std::uint64_t start_device_combine(const CombineRequest& request, const kernels::CombineArgs& args);
  std::shared_ptr<StartedCall> pending_call(std::uint64_t ticket);
  void check_plan(const kernels::Plan& plan) const;
  bool place_dispatch();
  void watch_device_calls();
  void add_recording(std::unique_ptr<kernels::device::Recording> recording,
                     std::function<std::shared_ptr<StartedCall>(kernels::device::Recording&)> make_call);
  bool answer_gates();
  bool answer_gate(std::size_t index);
  void check_replayed(const kernels::Plan& plan, proto::Phase phase) const;
  bool replays_run() const;
  void check_replays();
  std::vector<std::uint32_t> neighbours() const;
  std::uint64_t floor_bytes(proto::Phase phase, const kernels::Plan& plan, proto::DType dtype) const;
  kernels::CallContext context();

  GroupConfig config_;
  Sizing sizing_;
  proto::RegionLayout layout_;
  SlotMemory slots_;
  transport::Segment segment_;  // own region, where mates or shared-memory rails map it
  std::vector<transport::Segment> mate_segments_;
  std::vector<std::byte*> regions_, slot_bases_, kernel_word_bases_;  // [node_size]
  bool kernel_words_apart_ = false;
  proto::NodeView view_;
  FutexDoorbell doorbell_{view_};
  kernels::RankState state_;
  ThreadPool pool_;
  bool crowded_;  // more busy threads than cores on this host
  std::uint64_t cache_share_bytes_;
  std::unique_ptr<transport::Liveness> liveness_;
  std::vector<std::unique_ptr<transport::Rail>> rails_;
  std::function<void()> unlink_rails_;
  std::unique_ptr<engine::DescriptorRing> descriptors_;
  std::unique_ptr<engine::Engine> engine_;
  std::unique_ptr<transport::Pump> pump_;
  std::unique_ptr<Driver> driver_;
  std::function<void()> interrupt_check_;
  Allocate allocate_;

  std::shared_ptr<kernels::Device> device_;
  std::vector<std::byte*> device_regions_;  // that the device has mapped
  std::unique_ptr<kernels::device::State> device_state_;
  struct Recorded {
    std::unique_ptr<kernels::device::Recording> recording;
    std::function<std::shared_ptr<StartedCall>(kernels::device::Recording&)> make_call;
    std::shared_ptr<StartedCall> call;  // of the last replay
  };
  std::deque<Recorded> recorded_;                    // calls in graphs; under calls_mutex_, added to by callers alone
  std::size_t expected_ = 0, looked_at_ = 0;         // of them: the next to be replayed, and see answer_gates()
  std::vector<std::shared_ptr<StartedCall>> stuck_;  // after an error: their kernels have not left

  std::optional<kernels::cpu::DispatchCall> dispatch_;
  DispatchRequest dispatch_request_;
  std::shared_ptr<kernels::Plan> dispatch_plan_;
  proto::DType dispatch_wire_ = proto::DType::kBf16, dispatch_out_ = proto::DType::kBf16;
  // Counters, kernels and descriptors belong to whoever holds the mutex: the caller or the background.
  mutable std::mutex calls_mutex_;
  std::deque<std::shared_ptr<StartedCall>> moving_[proto::kNumPhases];  // not done; the first of a phase is stepped
  bool caller_waits_ = false, in_background_ = false, driver_entered_ = false;
  std::map<std::uint64_t, std::shared_ptr<StartedCall>> pending_;  // not finished; the caller's alone
  std::uint64_t next_ticket_ = 0;
  PhaseStats phase_stats_[proto::kNumPhases];
  std::vector<transport::Liveness::Peer> peers_;
  bool connected_ = false, met_ = false, started_ = false, closed_ = false;
  std::atomic<bool> failed_{false};
  mutable std::mutex failure_mutex_;
  common::Status failure_;
  bool failure_raised_ = false;
  std::unique_ptr<Background> background_;
};

}  // namespace moe_efa::runtime
