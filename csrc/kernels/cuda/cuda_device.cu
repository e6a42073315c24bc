// CudaDevice: kernels::Device on the CUDA runtime API, and the one symbol that this library exports.
//
// Calls in a captured stream: launch, copy, and wait_for of a mark of that capture become nodes of the graph. mark is
// captured too, and such a mark must not be asked whether it is reached. wait_for of any other mark fails. The rest
// is about other streams and is done at once.
//
// allocate, free, map_host, unmap_host, import_memory and close_memory may wait until kernels that run have ended,
// whatever their stream: they are for times when none of ours waits for another rank.
#include <unistd.h>

#include <array>
#include <cstdio>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "common/math.h"
#include "kernels/cuda/combine.h"
#include "kernels/cuda/cuda_launch.h"
#include "kernels/cuda/driver_api.h"
#include "kernels/cuda/exported_memory.h"
#include "kernels/cuda/gate.h"
#include "kernels/cuda/pack.h"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/primary_context.h"
#include "kernels/cuda/pull.h"
#include "kernels/device.h"

namespace moe_efa::kernels::cuda {

namespace {

using common::StatusCode;
using common::StatusError;

[[noreturn]] void refuse(const std::string& why) { throw StatusError({StatusCode::kConfig, -1, -1, -1, -1, why}); }

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Throws with what is missing where this process has no device `index`.
void find_device(int index) {
  int driver = 0, count = 0;
  CUDA_CHECK(cudaDriverGetVersion(&driver));
  if (driver == 0) refuse("there is no NVIDIA driver (libcuda.so.1) here");
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) {
    refuse("the NVIDIA driver (CUDA " + version_text(driver) + ") is too old for the CUDA " +
           version_text(CUDART_VERSION) + " that this library was built with");
  }
  if (error != cudaErrorNoDevice) check_cuda(error, "cudaGetDeviceCount");
  if (index < 0 || index >= count) {
    refuse("there is no GPU " + std::to_string(index) + ": this process sees " + std::to_string(count) + " of them");
  }
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
  return value;
}

void check_abilities(int index) {
  constexpr struct {
    cudaDeviceAttr attribute;
    const char* name;
  } kNeeded[] = {
      {cudaDevAttrCooperativeLaunch, "launch grids that are resident as a whole (cooperative launch)"},
      {cudaDevAttrConcurrentKernels, "run kernels beside each other"},
      {cudaDevAttrUnifiedAddressing, "share one address space with the host"},
      {cudaDevAttrCanMapHostMemory, "map host memory"},
      {cudaDevAttrHostRegisterSupported, "map memory that is allocated already (cudaHostRegister)"},
  };
  for (const auto& needed : kNeeded) {
    if (attribute(needed.attribute, index) == 0) refuse(std::string("it cannot ") + needed.name);
  }
}

using OwnStreams = std::array<cudaStream_t, Device::kNumOwnStreams>;

// Own streams outlive their device object: whoever allocates on them, as torch does, may come back to them later. The
// next object takes them over.
class StreamPool {
 public:
  static StreamPool& of_process() {
    static auto* pool = new StreamPool;  // never destroyed, since the driver may be gone by then
    return *pool;
  }
  OwnStreams take(int index) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<OwnStreams>& idle = idle_[index];
    if (idle.empty()) return {};
    OwnStreams streams = idle.back();
    idle.pop_back();
    return streams;
  }
  void give(int index, const OwnStreams& streams) {
    std::lock_guard<std::mutex> lock(mutex_);
    idle_[index].push_back(streams);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int, std::vector<OwnStreams>> idle_;
};

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index) : index_(index), primary_(index) {
    DeviceScope scope(primary_);
    cudaDeviceProp properties;
    CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
    facts_.name = properties.name;
    try {
      check_abilities(index);
      read_facts();
      make_streams();
      load_everything();
    } catch (const StatusError& error) {
      destroy();
      common::Status status = error.status();
      status.message = facts_.name + ", compute capability " + std::to_string(properties.major) + "." +
                       std::to_string(properties.minor) + ": " + status.message;
      throw StatusError(std::move(status));
    }
  }
  // At the end of a process the driver may be gone already: whatever fails here has nothing left to free.
  ~CudaDevice() override {
    try {
      DeviceScope scope(primary_);
      destroy();
    } catch (const StatusError&) {
    }
  }

  const DeviceFacts& facts() const override { return facts_; }

  // ---- Memory ----

  void* map_host(void* memory, std::size_t bytes) override {
    DeviceScope scope(primary_);
    CUDA_CHECK(cudaHostRegister(memory, bytes, cudaHostRegisterMapped | cudaHostRegisterPortable));
    void* mapped = nullptr;
    cudaError_t error = cudaHostGetDevicePointer(&mapped, memory, 0);
    if (error != cudaSuccess) cudaHostUnregister(memory);
    check_cuda(error, "cudaHostGetDevicePointer");
    return mapped;
  }
  void unmap_host(void* memory) override {
    DeviceScope scope(primary_);
    CUDA_CHECK(cudaHostUnregister(memory));
  }

  void* allocate_host(std::size_t bytes) override {
    DeviceScope scope(primary_);
    void *memory = nullptr, *mapped = nullptr;
    CUDA_CHECK(cudaHostAlloc(&memory, some(bytes), cudaHostAllocMapped | cudaHostAllocPortable));
    std::memset(memory, 0, bytes);
    CUDA_CHECK(cudaHostGetDevicePointer(&mapped, memory, 0));
    if (mapped != memory) {
      cudaFreeHost(memory);
      refuse(facts_.name + " does not reach host memory at the host's address");
    }
    return memory;
  }
  void free_host(void* memory) override {
    DeviceScope scope(primary_);
    CUDA_CHECK(cudaFreeHost(memory));
  }

  void* allocate(std::size_t bytes) override {
    DeviceScope scope(primary_);
    void* memory = nullptr;
    std::size_t taken = bytes < kPageBytes ? some(bytes) : common::round_up(bytes, kPageBytes);
    CUDA_CHECK(cudaMalloc(&memory, taken));
    // Not on the default stream, which waits for those of others.
    CUDA_CHECK(cudaMemsetAsync(memory, 0, taken, control_));
    CUDA_CHECK(cudaStreamSynchronize(control_));
    return memory;
  }
  void free(void* memory) override {
    DeviceScope scope(primary_);
    CUDA_CHECK(cudaFree(memory));
  }

  std::string export_memory(void* memory) override {
    DeviceScope scope(primary_);
    CUdeviceptr base = 0, address = reinterpret_cast<CUdeviceptr>(memory);
    check_driver(driver_api().memory_get_range(&base, nullptr, address), "cuMemGetAddressRange");
    cudaIpcMemHandle_t handle;
    CUDA_CHECK(cudaIpcGetMemHandle(&handle, reinterpret_cast<void*>(base)));
    ExportedMemory exported;
    exported.process = ExportedMemory::this_process();
    exported.address = address;
    exported.offset = address - base;
    static_assert(sizeof(handle) == sizeof(exported.handle));
    std::memcpy(exported.handle, &handle, sizeof(handle));
    return exported.encode();
  }
  // A process cannot open what it exported itself: its threads may be ranks that do this, and take the address.
  void* import_memory(const std::string& text) override {
    DeviceScope scope(primary_);
    ExportedMemory exported = ExportedMemory::decode(text);
    if (exported.process == ExportedMemory::this_process()) {
      void* memory = reinterpret_cast<void*>(exported.address);
      reach_peer(memory);
      return memory;
    }
    cudaIpcMemHandle_t handle;
    std::memcpy(&handle, exported.handle, sizeof(handle));
    void* base = nullptr;
    CUDA_CHECK(cudaIpcOpenMemHandle(&base, handle, cudaIpcMemLazyEnablePeerAccess));
    void* memory = static_cast<std::byte*>(base) + exported.offset;
    std::lock_guard<std::mutex> lock(mutex_);
    opened_.emplace(memory, base);  // once more for each time: CUDA counts them
    return memory;
  }
  void close_memory(void* imported) override {
    DeviceScope scope(primary_);
    void* base = nullptr;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto found = opened_.find(imported);
      if (found == opened_.end()) return;  // of this process
      base = found->second;
      opened_.erase(found);
    }
    CUDA_CHECK(cudaIpcCloseMemHandle(base));
  }

  // Whole pages; allocate() gave what is as large as one of the device's pages whole ones, and those of the host are
  // smaller. For NICs behind PCIe: where the GPU has another link to the host, the driver chooses the mapping.
  int dma_buf(void* memory, std::size_t bytes, std::uint64_t* offset) override {
    DeviceScope scope(primary_);
    if (!facts_.dma_buf) refuse(facts_.name + ": its driver makes no dma-buf that a NIC could use");
    auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    auto address = reinterpret_cast<std::uint64_t>(memory);
    std::uint64_t begin = address / page * page, end = common::round_up<std::uint64_t>(address + bytes, page);
    int file = -1;
    check_driver(driver_api().memory_get_handle(&file, begin, end - begin, CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD, 0),
                 "cuMemGetHandleForAddressRange");
    *offset = address - begin;
    return file;
  }

  // ---- Streams ----

  Stream own_stream(std::uint32_t index) override {
    if (index >= kNumOwnStreams) refuse("own_stream: there is no stream " + std::to_string(index));
    return own_[index];
  }

  void copy(void* to, const void* from, std::size_t bytes, Stream stream) override {
    if (bytes == 0) return;
    DeviceScope scope(primary_);
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)));
  }
  void launch(const PlanArgs& args, Stream stream) override {
    DeviceScope scope(primary_);
    launch_plan(args, stream);
  }
  void launch(const PackArgs& args, std::uint32_t num_blocks, Stream stream) override {
    DeviceScope scope(primary_);
    launch_pack(args, num_blocks, stream);
  }
  void launch(const PullArgs& args, std::uint32_t num_blocks, const PackArgs* rest, std::uint32_t pack_blocks,
              Stream stream) override {
    DeviceScope scope(primary_);
    launch_pull(args, num_blocks, rest, pack_blocks, stream);
  }
  void launch(const CombineArgs& args, const CombineBlocks& blocks, Stream stream) override {
    DeviceScope scope(primary_);
    launch_combine(args, blocks, stream);
  }
  void launch(const GateArgs& args, Stream stream) override {
    DeviceScope scope(primary_);
    launch_gate(args, stream);
  }
  void launch(const PackArgs* args, const Watch& watch, std::uint32_t num_blocks, Stream stream) override {
    DeviceScope scope(primary_);
    launch_recorded_pack(args, watch, num_blocks, stream);
  }
  void launch(const RecordedPull* args, const Watch& watch, std::uint32_t num_blocks, std::uint32_t pack_blocks,
              Stream stream) override {
    DeviceScope scope(primary_);
    launch_recorded_pull(args, watch, num_blocks, pack_blocks, stream);
  }
  void launch(const CombineArgs* args, const Watch& watch, const CombineBlocks& blocks, Stream stream) override {
    DeviceScope scope(primary_);
    launch_recorded_combine(args, watch, blocks, stream);
  }
  bool capturing(Stream stream) override {
    DeviceScope scope(primary_);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    CUDA_CHECK(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
    return status != cudaStreamCaptureStatusNone;
  }

  // ---- Marks: events, which are used again and again ----

  Mark mark(Stream stream) override {
    DeviceScope scope(primary_);
    cudaEvent_t event = take_event();
    if (cudaError_t error = cudaEventRecord(event, static_cast<cudaStream_t>(stream)); error != cudaSuccess) {
      give_event(event);
      check_cuda(error, "cudaEventRecord");
    }
    return reinterpret_cast<Mark>(event);
  }
  bool reached(Mark mark) override {
    DeviceScope scope(primary_);
    cudaError_t error = cudaEventQuery(reinterpret_cast<cudaEvent_t>(mark));
    if (error == cudaErrorNotReady) return false;
    check_cuda(error, "cudaEventQuery");
    return true;
  }
  void wait_for(Stream stream, Mark mark) override {
    DeviceScope scope(primary_);
    CUDA_CHECK(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), reinterpret_cast<cudaEvent_t>(mark), 0));
  }
  void release(Mark mark) override { give_event(reinterpret_cast<cudaEvent_t>(mark)); }

  std::shared_ptr<void> beside_captures() override { return std::make_shared<DeviceScope>(primary_); }

  void flush_writes() override {
    if (!facts_.flushes_writes) return;
    DeviceScope scope(primary_);
    CUDA_CHECK(cudaDeviceFlushGPUDirectRDMAWrites(cudaFlushGPUDirectRDMAWritesTargetCurrentDevice,
                                                  cudaFlushGPUDirectRDMAWritesToAllDevices));
  }

 private:
  // What cudaMalloc gives whole to one allocation: nothing else of this process is in what another one imports.
  static constexpr std::size_t kPageBytes = std::size_t{2} << 20;

  static std::size_t some(std::size_t bytes) { return bytes > 0 ? bytes : 1; }

  void read_facts() {
    facts_.kind = "cuda";
    facts_.num_sms = static_cast<std::uint32_t>(attribute(cudaDevAttrMultiProcessorCount, index_));
    // Whoever reads a ring may be another GPU of this node.
    bool ordered =
        attribute(cudaDevAttrGPUDirectRDMAWritesOrdering, index_) >= cudaGPUDirectRDMAWritesOrderingAllDevices;
    bool flushable =
        (attribute(cudaDevAttrGPUDirectRDMAFlushWritesOptions, index_) & cudaFlushGPUDirectRDMAWritesOptionHost) != 0;
    facts_.flushes_writes = !ordered && flushable;
    facts_.shares_memory = reaches_all_peers();
    facts_.sees_writes = ordered || flushable;
    int dma_buf = 0;
    check_driver(driver_api().device_get_attribute(&dma_buf, CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED, primary_.device()),
                 "cuDeviceGetAttribute");
    facts_.dma_buf = dma_buf != 0 && driver_api().memory_get_handle != nullptr;
  }

  // Of the GPUs that this process sees; those of other processes show when their memory is imported.
  bool reaches_all_peers() const {
    int count = 0;
    CUDA_CHECK(cudaGetDeviceCount(&count));
    for (int peer = 0; peer < count; ++peer) {
      int can = 1;
      if (peer != index_) CUDA_CHECK(cudaDeviceCanAccessPeer(&can, index_, peer));
      if (can == 0) return false;
    }
    return true;
  }

  void make_streams() {
    int least = 0, greatest = 0;
    CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CUDA_CHECK(cudaStreamCreateWithPriority(&control_, cudaStreamNonBlocking, greatest));
    own_ = StreamPool::of_process().take(index_);
    for (cudaStream_t& stream : own_) {
      if (stream == nullptr) CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest));
    }
  }

  // The driver loads a kernel when it is first used, and waits for all kernels that run: for ever, if one of those
  // waits for what the new one does.
  void load_everything() {
    for (const void* kernel :
         {plan_kernel_entry(), pack_kernel_entry(), pull_kernel_entry(), combine_kernel_entry(), gate_kernel_entry(),
          recorded_pack_kernel_entry(), recorded_pull_kernel_entry(), recorded_combine_kernel_entry()}) {
      cudaFuncAttributes attributes;
      CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));  // fails where there is no code for this device
      cudaFunction_t function = nullptr;
      CUDA_CHECK(cudaGetFuncBySymbol(&function, kernel));
      if (driver_api().function_load != nullptr) check_driver(driver_api().function_load(function), "cuFuncLoad");
    }
    // The driver's own, for memory.
    constexpr std::size_t kWord = sizeof(std::uint32_t);
    auto* device = static_cast<std::uint32_t*>(allocate(kWord));
    auto* host = static_cast<std::uint32_t*>(allocate_host(2 * kWord));
    host[0] = 1;
    copy(device, host, kWord, control_);
    copy(host + 1, device, kWord, control_);
    CUDA_CHECK(cudaStreamSynchronize(control_));
    std::uint32_t seen = *static_cast<volatile std::uint32_t*>(host + 1);
    free_host(host);
    free(device);
    if (seen != 1) refuse("a word that was copied did not arrive");
  }

  // For memory of another device of this process.
  void reach_peer(void* memory) {
    cudaPointerAttributes attributes;
    CUDA_CHECK(cudaPointerGetAttributes(&attributes, memory));
    if (attributes.type != cudaMemoryTypeDevice || attributes.device == index_) return;
    cudaError_t error = cudaDeviceEnablePeerAccess(attributes.device, 0);
    if (error != cudaErrorPeerAccessAlreadyEnabled) check_cuda(error, "cudaDeviceEnablePeerAccess");
  }

  cudaEvent_t take_event() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!free_events_.empty()) {
        cudaEvent_t event = free_events_.back();
        free_events_.pop_back();
        return event;
      }
    }
    cudaEvent_t event = nullptr;
    CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    return event;
  }
  void give_event(cudaEvent_t event) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_events_.push_back(event);
  }

  void destroy() {
    if (control_ != nullptr) cudaStreamDestroy(control_);
    StreamPool::of_process().give(index_, own_);
    for (cudaEvent_t event : free_events_) cudaEventDestroy(event);
    for (const auto& [memory, base] : opened_) cudaIpcCloseMemHandle(base);
  }

  const int index_;
  const PrimaryContext primary_;
  DeviceFacts facts_;
  OwnStreams own_{};
  cudaStream_t control_ = nullptr;  // for what must not wait
  std::mutex mutex_;                // of what follows
  std::vector<cudaEvent_t> free_events_;
  std::unordered_multimap<void*, void*> opened_;  // by what import_memory returned
};

}  // namespace

}  // namespace moe_efa::kernels::cuda

extern "C" __attribute__((visibility("default"))) moe_efa::kernels::Device* moe_efa_open_device(
    std::uint32_t abi, int index, char* error, std::size_t error_bytes) {
  using namespace moe_efa::kernels;
  std::string reason;
  try {
    if (abi == kDeviceAbi) {
      cuda::find_device(index);
      return new cuda::CudaDevice(index);
    }
    reason = "it is of another build (device interface " + std::to_string(kDeviceAbi) + ", not " + std::to_string(abi) +
             "): build moe_efa again";
  } catch (const std::exception& caught) {
    reason = caught.what();
  }
  if (error != nullptr) std::snprintf(error, error_bytes, "%s", reason.c_str());
  return nullptr;
}
