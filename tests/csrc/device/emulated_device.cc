#include "emulated_device.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "../kernels/emulated_block.h"
#include "common/status.h"
#include "kernels/cuda/plan_body.h"
#include "kernels/cuda/recorded_body.h"

namespace moe_efa::testing {

namespace {

using kernels::cuda::kWarpSize;

constexpr std::uint32_t kNumSms = 4;
constexpr std::uint32_t kPlanWarps = 2;
constexpr std::size_t kPageBytes = 64 << 10;  // memory begins where one does, as a GPU's

thread_local int beside_captures_here = 0;

[[noreturn]] void fail(const std::string& what) {
  throw common::StatusError({common::StatusCode::kInternal, -1, -1, -1, -1, "emulated device: " + what});
}

struct PlanShared {
  kernels::cuda::Tickets tickets;
  std::vector<std::uint32_t> words;
};

}  // namespace

EmulatedStream::EmulatedStream() : thread_([this] { loop(); }) {}

EmulatedStream::~EmulatedStream() {
  drain();
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void EmulatedStream::queue(std::function<void()> work) {
  {
    std::lock_guard lock(mutex_);
    if (capturing_) {
      captured_.push_back(std::move(work));
      return;
    }
    work_.push_back(std::move(work));
  }
  changed_.notify_all();
}

void EmulatedStream::begin_capture() {
  std::lock_guard lock(mutex_);
  capturing_ = true;
}

EmulatedStream::Graph EmulatedStream::end_capture() {
  std::lock_guard lock(mutex_);
  capturing_ = false;
  return std::exchange(captured_, {});
}

bool EmulatedStream::capturing() {
  std::lock_guard lock(mutex_);
  return capturing_;
}

void EmulatedStream::drain() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return work_.empty() && !busy_; });
}

void EmulatedStream::loop() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stop_ || !work_.empty(); });
    if (work_.empty()) return;
    std::function<void()> work = std::move(work_.front());
    work_.pop_front();
    busy_ = true;
    lock.unlock();
    work();
    work = {};
    lock.lock();
    busy_ = false;
    changed_.notify_all();
  }
}

struct EmulatedDevice::Point {
  std::mutex mutex;
  std::condition_variable changed;
  bool reached = false;
};

EmulatedDevice::EmulatedDevice(bool stream_ordered) {
  facts_.name = "emulated by host threads";
  facts_.kind = "emulated";
  facts_.num_sms = kNumSms;
  facts_.stream_ordered = stream_ordered;
  facts_.flushes_writes = true;
}

EmulatedDevice::~EmulatedDevice() {
  for (EmulatedStream& stream : streams_) stream.drain();
  while (!memory_.empty()) free(memory_.begin()->first);
}

void* EmulatedDevice::allocate_host(std::size_t bytes) {
  void* memory = std::aligned_alloc(256, common::round_up<std::size_t>(bytes, 256));
  if (memory == nullptr) throw std::bad_alloc();
  return std::memset(memory, 0, bytes);
}

void EmulatedDevice::free_host(void* memory) { std::free(memory); }

void* EmulatedDevice::allocate(std::size_t bytes) {
  int file = memfd_create("emulated-device", 0);
  if (file < 0 || ftruncate(file, static_cast<off_t>(bytes)) != 0) fail("no memory");
  void* space = mmap(nullptr, bytes + kPageBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (space == MAP_FAILED) fail("no memory");
  auto begin = reinterpret_cast<std::uintptr_t>(space), end = begin + bytes + kPageBytes;
  std::uintptr_t aligned = common::round_up<std::uintptr_t>(begin, kPageBytes);
  void* memory = reinterpret_cast<void*>(aligned);
  if (mmap(memory, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED) fail("no memory");
  std::uintptr_t behind = common::round_up<std::uintptr_t>(aligned + bytes, getpagesize());
  if (aligned > begin) munmap(space, aligned - begin);
  if (end > behind) munmap(reinterpret_cast<void*>(behind), end - behind);
  std::lock_guard lock(mutex_);
  memory_[memory] = {file, bytes};
  return memory;
}

void EmulatedDevice::free(void* memory) {
  std::lock_guard lock(mutex_);
  auto found = memory_.find(memory);
  if (found == memory_.end()) fail("free() of something else");
  munmap(memory, found->second.bytes);
  close(found->second.file);
  memory_.erase(found);
}

std::string EmulatedDevice::export_memory(void* memory) {
  std::lock_guard lock(mutex_);
  const Memory& found = memory_.at(memory);
  return std::to_string(getpid()) + "/fd/" + std::to_string(found.file) + " " + std::to_string(found.bytes);
}

void* EmulatedDevice::import_memory(const std::string& exported) {
  std::size_t space = exported.find(' ');
  std::string path = "/proc/" + exported.substr(0, space);
  std::size_t bytes = std::stoull(exported.substr(space + 1));
  int file = open(path.c_str(), O_RDWR);
  if (file < 0) fail("cannot open " + path);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) fail("cannot map " + path);
  ++imports_;
  std::lock_guard lock(mutex_);
  memory_[memory] = {file, bytes};
  return memory;
}

std::size_t EmulatedDevice::num_mappings() {
  std::lock_guard lock(mutex_);
  return memory_.size();
}

void EmulatedDevice::close_memory(void* imported) { free(imported); }

int EmulatedDevice::dma_buf(void*, std::size_t, std::uint64_t*) { fail("no dma-buf"); }

kernels::Device::Stream EmulatedDevice::own_stream(std::uint32_t index) { return &streams_[1 + index]; }

EmulatedStream& EmulatedDevice::stream_of(Stream stream) {
  return stream == nullptr ? streams_[0] : *static_cast<EmulatedStream*>(stream);
}

void EmulatedDevice::delay(double seconds) {
  streams_[0].queue([seconds] { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); });
}

std::uint64_t EmulatedDevice::next_seed() {
  std::lock_guard lock(mutex_);
  return ++seed_;
}

void EmulatedDevice::copy(void* to, const void* from, std::size_t bytes, Stream stream) {
  stream_of(stream).queue([=] { std::memcpy(to, from, bytes); });
}

void EmulatedDevice::launch(const kernels::cuda::PlanArgs& args, Stream stream) {
  stream_of(stream).queue([args, seed = next_seed()] {
    run_grid<PlanShared>(2, kPlanWarps * kWarpSize, seed, [&](EmulatedBlock& block, PlanShared& shared) {
      std::size_t words = kernels::cuda::plan_shared_words(args.config, kPlanWarps);
      if (shared.words.size() != words) shared.words.resize(words);  // the first fiber of the block
      kernels::cuda::plan_body(block, args, shared.tickets, shared.words.data());
    });
  });
}

void EmulatedDevice::launch(const kernels::cuda::PackArgs& args, std::uint32_t num_blocks, Stream stream) {
  num_blocks = std::min(num_blocks, kNumSms);
  stream_of(stream).queue([=, seed = next_seed()] {
    run_grid<kernels::cuda::Tickets>(num_blocks, kWarpSize, seed,
                                     [&](EmulatedBlock& block, kernels::cuda::Tickets& shared) {
                                       kernels::cuda::pack_body(block, args, num_blocks, shared);
                                     });
  });
}

void EmulatedDevice::launch(const kernels::cuda::PullArgs& args, std::uint32_t num_blocks,
                            const kernels::cuda::PackArgs* rest, std::uint32_t pack_blocks, Stream stream) {
  kernels::cuda::PackArgs pack = rest == nullptr ? kernels::cuda::PackArgs{} : *rest;
  stream_of(stream).queue([=, seed = next_seed()] {
    run_grid<kernels::cuda::PullShared>(num_blocks, kWarpSize, seed,
                                        [&](EmulatedBlock& block, kernels::cuda::PullShared& shared) {
                                          if (block.block() < pack_blocks) {
                                            kernels::cuda::pack_body(block, pack, pack_blocks, shared.tickets);
                                          } else {
                                            kernels::cuda::pull_body(block, args, num_blocks - pack_blocks, shared);
                                          }
                                        });
  });
}

void EmulatedDevice::launch(const kernels::cuda::CombineArgs& args, const kernels::cuda::CombineBlocks& blocks,
                            Stream stream) {
  stream_of(stream).queue([=, seed = next_seed()] {
    run_grid<kernels::cuda::CombineShared>(blocks.publish + blocks.forward + blocks.reduce, kWarpSize, seed,
                                           [&](EmulatedBlock& block, kernels::cuda::CombineShared& shared) {
                                             kernels::cuda::combine_body(block, args, blocks, shared);
                                           });
  });
}

void EmulatedDevice::launch(const kernels::cuda::GateArgs& args, Stream stream) {
  stream_of(stream).queue([args, seed = next_seed()] {
    run_grid<kernels::cuda::Tickets>(1, kWarpSize, seed, [&](EmulatedBlock& block, kernels::cuda::Tickets& shared) {
      kernels::cuda::gate_body(block, args, shared);
    });
  });
}

void EmulatedDevice::launch(const kernels::cuda::PackArgs* args, const kernels::cuda::Watch& watch,
                            std::uint32_t num_blocks, Stream stream) {
  num_blocks = std::min(num_blocks, kNumSms);
  stream_of(stream).queue([=, seed = next_seed()] {
    using Shared = kernels::cuda::RecordedPackShared;
    run_grid<Shared>(num_blocks, kWarpSize, seed, [&](EmulatedBlock& block, Shared& shared) {
      kernels::cuda::recorded_pack_body(block, args, watch, shared);
    });
  });
}

void EmulatedDevice::launch(const kernels::cuda::RecordedPull* args, const kernels::cuda::Watch& watch,
                            std::uint32_t num_blocks, std::uint32_t pack_blocks, Stream stream) {
  stream_of(stream).queue([=, seed = next_seed()] {
    using Shared = kernels::cuda::RecordedPullShared;
    run_grid<Shared>(num_blocks, kWarpSize, seed, [&](EmulatedBlock& block, Shared& shared) {
      kernels::cuda::recorded_pull_body(block, args, watch, pack_blocks, shared);
    });
  });
}

void EmulatedDevice::launch(const kernels::cuda::CombineArgs* args, const kernels::cuda::Watch& watch,
                            const kernels::cuda::CombineBlocks& blocks, Stream stream) {
  stream_of(stream).queue([=, seed = next_seed()] {
    using Shared = kernels::cuda::RecordedCombineShared;
    run_grid<Shared>(blocks.publish + blocks.forward + blocks.reduce, kWarpSize, seed,
                     [&](EmulatedBlock& block, Shared& shared) {
                       kernels::cuda::recorded_combine_body(block, args, watch, blocks, shared);
                     });
  });
}

kernels::Device::Mark EmulatedDevice::mark(Stream stream) {
  auto point = std::make_shared<Point>();
  stream_of(stream).queue([point] {
    std::lock_guard lock(point->mutex);
    point->reached = true;
    point->changed.notify_all();
  });
  std::lock_guard lock(mutex_);
  points_[next_mark_] = point;
  return next_mark_++;
}

std::shared_ptr<EmulatedDevice::Point> EmulatedDevice::point(Mark mark) {
  std::lock_guard lock(mutex_);
  auto found = points_.find(mark);
  if (found == points_.end()) fail("no such mark");
  return found->second;
}

bool EmulatedDevice::reached(Mark mark) {
  std::shared_ptr<Point> found = point(mark);
  std::lock_guard lock(found->mutex);
  return found->reached;
}

void EmulatedDevice::wait_for(Stream stream, Mark mark) {
  stream_of(stream).queue([found = point(mark)] {
    std::unique_lock lock(found->mutex);
    found->changed.wait(lock, [&] { return found->reached; });
  });
}

void EmulatedDevice::release(Mark mark) {
  std::lock_guard lock(mutex_);
  if (points_.erase(mark) == 0) fail("release() of something else");
}

std::shared_ptr<void> EmulatedDevice::beside_captures() {
  return {&++beside_captures_here, [](int* here) { --*here; }};
}

void EmulatedDevice::check_beside_captures() const {
  if (beside_captures_here == 0) fail("memory of others is allocated without beside_captures()");
}

}  // namespace moe_efa::testing
