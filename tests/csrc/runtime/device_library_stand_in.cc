// A device library for test_device_library.cc: opens device 0, whose calls all throw, and refuses what it should.
#include <cstdio>

#include "common/status.h"
#include "kernels/device.h"

namespace {

using namespace moe_efa;

class StandIn : public kernels::Device {
 public:
  const kernels::DeviceFacts& facts() const override { return facts_; }
  void* map_host(void*, std::size_t) override { fail(); }
  void unmap_host(void*) override { fail(); }
  void* allocate_host(std::size_t) override { fail(); }
  void free_host(void*) override { fail(); }
  void* allocate(std::size_t) override { fail(); }
  void free(void*) override { fail(); }
  std::string export_memory(void*) override { fail(); }
  void* import_memory(const std::string&) override { fail(); }
  void close_memory(void*) override { fail(); }
  int dma_buf(void*, std::size_t, std::uint64_t*) override { fail(); }
  Stream own_stream(std::uint32_t) override { fail(); }
  void copy(void*, const void*, std::size_t, Stream) override { fail(); }
  void launch(const kernels::cuda::PlanArgs&, Stream) override { fail(); }
  void launch(const kernels::cuda::PackArgs&, std::uint32_t, Stream) override { fail(); }
  void launch(const kernels::cuda::PullArgs&, std::uint32_t, const kernels::cuda::PackArgs*, std::uint32_t,
              Stream) override {
    fail();
  }
  void launch(const kernels::cuda::CombineArgs&, const kernels::cuda::CombineBlocks&, Stream) override { fail(); }
  void launch(const kernels::cuda::GateArgs&, Stream) override { fail(); }
  void launch(const kernels::cuda::PackArgs*, const kernels::cuda::Watch&, std::uint32_t, Stream) override { fail(); }
  void launch(const kernels::cuda::RecordedPull*, const kernels::cuda::Watch&, std::uint32_t, std::uint32_t,
              Stream) override {
    fail();
  }
  void launch(const kernels::cuda::CombineArgs*, const kernels::cuda::Watch&, const kernels::cuda::CombineBlocks&,
              Stream) override {
    fail();
  }
  bool capturing(Stream) override { fail(); }
  Mark mark(Stream) override { fail(); }
  bool reached(Mark) override { fail(); }
  void wait_for(Stream, Mark) override { fail(); }
  void release(Mark) override { fail(); }
  std::shared_ptr<void> beside_captures() override { fail(); }
  void flush_writes() override { fail(); }

 private:
  [[noreturn]] static void fail() {
    throw common::StatusError({common::StatusCode::kInternal, 3, -1, 7, -1, "stand-in: no such call"});
  }

  kernels::DeviceFacts facts_{.name = "stand-in", .kind = "emulated"};
};

}  // namespace

extern "C" __attribute__((visibility("default"))) kernels::Device* moe_efa_open_device(std::uint32_t abi, int index,
                                                                                       char* error,
                                                                                       std::size_t error_bytes) {
  if (abi == kernels::kDeviceAbi && index == 0) return new StandIn;
  if (index == 1) std::snprintf(error, error_bytes, "there is one device");
  return nullptr;
}
