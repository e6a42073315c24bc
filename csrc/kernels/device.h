// Device: what the runtime asks of a GPU. It is implemented by a library of its own that is opened at run time (CUDA's
// by nvcc, one of host threads by the tests), so that the extension links no CUDA and one binary serves every machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace moe_efa::kernels {

namespace cuda {
struct CombineArgs;
struct CombineBlocks;
struct GateArgs;
struct PackArgs;
struct PlanArgs;
struct PullArgs;
struct RecordedPull;
struct Watch;
}  // namespace cuda

struct DeviceFacts {
  std::string name;             // of the product
  std::string kind;             // "cuda" | "emulated"
  std::uint32_t num_sms = 1;    // blocks that a resident grid may have without sharing an SM
  bool stream_ordered = true;   // a call returns when its kernels are queued; false: when they are done
  bool shares_memory = true;    // export_memory() works: the ranks of a node may read each other's device memory
  bool dma_buf = false;         // dma_buf() works
  bool flushes_writes = false;  // writes of a NIC are seen by kernels only after flush_writes()
  bool sees_writes = true;      // they are seen at all
};

// Calls may come from any thread. Whatever goes wrong is a StatusError that names the call.
class Device {
 public:
  using Stream = void*;        // cudaStream_t
  using Mark = std::uint64_t;  // a point on a stream; never 0

  virtual ~Device() = default;
  virtual const DeviceFacts& facts() const = 0;

  // Makes host memory (whole pages, mapped by this process) reachable for kernels, at the address that is returned.
  virtual void* map_host(void* memory, std::size_t bytes) = 0;
  virtual void unmap_host(void* memory) = 0;
  // Host memory for flags and copies, which kernels reach at the same address; zeros.
  virtual void* allocate_host(std::size_t bytes) = 0;
  virtual void free_host(void* memory) = 0;
  // Memory of the device, aligned to 256 bytes; zeros.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void free(void* memory) = 0;

  // What another process of this host hands to its import_memory() to reach memory of allocate().
  virtual std::string export_memory(void* memory) = 0;
  virtual void* import_memory(const std::string& exported) = 0;
  virtual void close_memory(void* imported) = 0;
  // A dma-buf of memory of allocate(), for a NIC to register; the caller closes it. *offset: of the memory in it.
  virtual int dma_buf(void* memory, std::size_t bytes, std::uint64_t* offset) = 0;

  // Streams for calls that go on beside their caller's stream.
  virtual Stream own_stream(std::uint32_t index) = 0;  // index < kNumOwnStreams
  // The rest is queued on a stream, in order.
  virtual void copy(void* to, const void* from, std::size_t bytes, Stream stream) = 0;  // host side: of allocate_host()
  virtual void launch(const cuda::PlanArgs& args, Stream stream) = 0;
  virtual void launch(const cuda::PackArgs& args, std::uint32_t num_blocks, Stream stream) = 0;
  virtual void launch(const cuda::PullArgs& args, std::uint32_t num_blocks, const cuda::PackArgs* rest,
                      std::uint32_t pack_blocks, Stream stream) = 0;
  virtual void launch(const cuda::CombineArgs& args, const cuda::CombineBlocks& blocks, Stream stream) = 0;
  // Of a graph: `args` is device memory, read when the kernel runs, and nothing runs behind a fault that `watch` knows.
  virtual void launch(const cuda::GateArgs& args, Stream stream) = 0;
  virtual void launch(const cuda::PackArgs* args, const cuda::Watch& watch, std::uint32_t num_blocks,
                      Stream stream) = 0;
  virtual void launch(const cuda::RecordedPull* args, const cuda::Watch& watch, std::uint32_t num_blocks,
                      std::uint32_t pack_blocks, Stream stream) = 0;
  virtual void launch(const cuda::CombineArgs* args, const cuda::Watch& watch, const cuda::CombineBlocks& blocks,
                      Stream stream) = 0;
  // Whether what is queued on the stream goes into a graph, to run at every replay of it.
  virtual bool capturing(Stream stream) = 0;
  // Marks what is queued so far; release() it once.
  virtual Mark mark(Stream stream) = 0;
  virtual bool reached(Mark mark) = 0;
  virtual void wait_for(Stream stream, Mark mark) = 0;  // what is queued on the stream later comes after the mark
  virtual void release(Mark mark) = 0;

  // While it lives, on this thread: what others do to the device that a capture by another thread would forbid is
  // allowed, such as memory for an allocator. Null where nothing is forbidden.
  virtual std::shared_ptr<void> beside_captures() = 0;

  // What NICs have written so far is seen by kernels that learn of it later.
  virtual void flush_writes() = 0;

  static constexpr std::uint32_t kNumOwnStreams = 2;  // one for each phase
};

// The one symbol of a device library: device `index` for this process, or null and a reason in `error`. `abi` is the
// caller's kDeviceAbi; a library of another one refuses.
inline constexpr std::uint32_t kDeviceAbi = 5;
inline constexpr char kOpenDeviceSymbol[] = "moe_efa_open_device";
using OpenDevice = Device* (*)(std::uint32_t abi, int index, char* error, std::size_t error_bytes);

}  // namespace moe_efa::kernels
