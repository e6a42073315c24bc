// EmulatedDevice: kernels::Device on a host without a GPU. Streams are threads, kernels run on fibers
// (kernels/emulated_block.h), and device memory is shared memory that other processes may import.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "kernels/device.h"

namespace moe_efa::testing {

// What is queued runs in order on a thread of its own.
class EmulatedStream {
 public:
  EmulatedStream();
  ~EmulatedStream();
  void queue(std::function<void()> work);
  void drain();
  // What is queued in between goes into the graph, and runs when that is replayed.
  using Graph = std::vector<std::function<void()>>;
  void begin_capture();
  Graph end_capture();
  bool capturing();

 private:
  void loop();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> work_;
  bool stop_ = false, busy_ = false, capturing_ = false;
  Graph captured_;
  std::thread thread_;
};

class EmulatedDevice : public kernels::Device {
 public:
  explicit EmulatedDevice(bool stream_ordered);
  ~EmulatedDevice() override;

  const kernels::DeviceFacts& facts() const override { return facts_; }
  void* map_host(void* memory, std::size_t) override { return memory; }
  void unmap_host(void*) override {}
  void* allocate_host(std::size_t bytes) override;
  void free_host(void* memory) override;
  void* allocate(std::size_t bytes) override;
  void free(void* memory) override;
  std::string export_memory(void* memory) override;
  void* import_memory(const std::string& exported) override;
  void close_memory(void* imported) override;
  int dma_buf(void* memory, std::size_t bytes, std::uint64_t* offset) override;
  Stream own_stream(std::uint32_t index) override;
  void copy(void* to, const void* from, std::size_t bytes, Stream stream) override;
  void launch(const kernels::cuda::PlanArgs& args, Stream stream) override;
  void launch(const kernels::cuda::PackArgs& args, std::uint32_t num_blocks, Stream stream) override;
  void launch(const kernels::cuda::PullArgs& args, std::uint32_t num_blocks, const kernels::cuda::PackArgs* rest,
              std::uint32_t pack_blocks, Stream stream) override;
  void launch(const kernels::cuda::CombineArgs& args, const kernels::cuda::CombineBlocks& blocks,
              Stream stream) override;
  void launch(const kernels::cuda::GateArgs& args, Stream stream) override;
  void launch(const kernels::cuda::PackArgs* args, const kernels::cuda::Watch& watch, std::uint32_t num_blocks,
              Stream stream) override;
  void launch(const kernels::cuda::RecordedPull* args, const kernels::cuda::Watch& watch, std::uint32_t num_blocks,
              std::uint32_t pack_blocks, Stream stream) override;
  void launch(const kernels::cuda::CombineArgs* args, const kernels::cuda::Watch& watch,
              const kernels::cuda::CombineBlocks& blocks, Stream stream) override;
  bool capturing(Stream stream) override { return stream_of(stream).capturing(); }
  Mark mark(Stream stream) override;
  bool reached(Mark mark) override;
  void wait_for(Stream stream, Mark mark) override;
  void release(Mark mark) override;
  std::shared_ptr<void> beside_captures() override;
  void flush_writes() override { ++flushes_; }

  // For tests.
  EmulatedStream& caller_stream() { return streams_[0]; }
  void delay(double seconds);  // of what the caller queues from here on
  kernels::DeviceFacts& change_facts() { return facts_; }
  // Throws where this thread does not hold what beside_captures() gave: an allocator of others, as torch's, would fail
  // while another thread captures.
  void check_beside_captures() const;
  int flushes() const { return flushes_; }
  int imports() const { return imports_; }
  std::size_t num_mappings();  // allocated or imported, and not given back

 private:
  // Of export_memory(): shared between processes.
  struct Memory {
    int file = -1;
    std::size_t bytes = 0;
  };
  struct Point;

  EmulatedStream& stream_of(Stream stream);
  std::shared_ptr<Point> point(Mark mark);
  std::uint64_t next_seed();

  kernels::DeviceFacts facts_;
  std::mutex mutex_;
  std::map<void*, Memory> memory_;
  std::map<Mark, std::shared_ptr<Point>> points_;
  Mark next_mark_ = 1;
  std::uint64_t seed_ = 0;
  std::atomic<int> flushes_{0}, imports_{0};
  EmulatedStream streams_[1 + kNumOwnStreams];  // the caller's, and the own ones
};

}  // namespace moe_efa::testing
