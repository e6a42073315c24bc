// HostDevice: a kernels::Device whose memory is a file in memory that processes map, each at an address of its own, so
// that what is exported is really shared and nothing else is. It runs no kernels; the CPU can read everything.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <map>
#include <mutex>
#include <string>

#include "common/status.h"
#include "kernels/device.h"

namespace moe_efa::testing {

class HostDevice final : public kernels::Device {
 public:
  HostDevice() {
    facts_.name = "host memory";
    facts_.kind = "emulated";
    facts_.flushes_writes = true;
  }
  ~HostDevice() override {
    if (live() != 0) std::fprintf(stderr, "%zu mappings of a device were left\n", live());
  }

  kernels::DeviceFacts& change_facts() { return facts_; }
  std::size_t live() const {
    std::lock_guard lock(mutex_);
    return mappings_.size();
  }
  int imports() const { return imports_; }
  int flushes() const { return flushes_; }

  const kernels::DeviceFacts& facts() const override { return facts_; }
  void* map_host(void* memory, std::size_t) override { return memory; }
  void unmap_host(void*) override {}
  void* allocate_host(std::size_t) override { refuse("allocate_host"); }
  void free_host(void*) override {}

  void* allocate(std::size_t bytes) override {
    int fd = memfd_create("device", 0);
    if (fd < 0 || ftruncate(fd, static_cast<off_t>(bytes)) != 0) refuse("memfd_create");
    return map(fd, bytes);
  }
  void free(void* memory) override { unmap(memory); }

  std::string export_memory(void* memory) override {
    std::lock_guard lock(mutex_);
    const Mapping& mapping = mappings_.at(memory);
    return "/proc/" + std::to_string(getpid()) + "/fd/" + std::to_string(mapping.fd) + ' ' +
           std::to_string(mapping.bytes);
  }
  void* import_memory(const std::string& exported) override {
    std::size_t space = exported.find(' ');
    if (space == std::string::npos) refuse("import_memory");
    FILE* file = std::fopen(exported.substr(0, space).c_str(), "r+");
    if (file == nullptr) refuse("import_memory");
    int fd = dup(fileno(file));
    std::fclose(file);
    ++imports_;
    return map(fd, std::stoull(exported.substr(space + 1)));
  }
  void close_memory(void* imported) override { unmap(imported); }
  int dma_buf(void*, std::size_t, std::uint64_t*) override { refuse("dma_buf"); }

  Stream own_stream(std::uint32_t) override { return nullptr; }
  void copy(void*, const void*, std::size_t, Stream) override { refuse("copy"); }
  void launch(const kernels::cuda::PlanArgs&, Stream) override { refuse("launch"); }
  void launch(const kernels::cuda::PackArgs&, std::uint32_t, Stream) override { refuse("launch"); }
  void launch(const kernels::cuda::PullArgs&, std::uint32_t, const kernels::cuda::PackArgs*, std::uint32_t,
              Stream) override {
    refuse("launch");
  }
  void launch(const kernels::cuda::CombineArgs&, const kernels::cuda::CombineBlocks&, Stream) override {
    refuse("launch");
  }
  Mark mark(Stream) override { return 1; }
  bool reached(Mark) override { return true; }
  void wait_for(Stream, Mark) override {}
  void release(Mark) override {}
  void store_word(std::uint32_t*, std::uint32_t) override { refuse("store_word"); }
  void flush_writes() override { ++flushes_; }
  void drain() override {}

 private:
  struct Mapping {
    int fd;
    std::size_t bytes;
  };

  [[noreturn]] static void refuse(const char* call) {
    throw common::StatusError({common::StatusCode::kInternal, -1, -1, -1, -1, std::string("host device: ") + call});
  }
  void* map(int fd, std::size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) refuse("mmap");
    std::lock_guard lock(mutex_);
    mappings_[memory] = {fd, bytes};
    return memory;
  }
  void unmap(void* memory) {
    std::lock_guard lock(mutex_);
    Mapping mapping = mappings_.at(memory);
    munmap(memory, mapping.bytes);
    close(mapping.fd);
    mappings_.erase(memory);
  }

  kernels::DeviceFacts facts_;
  mutable std::mutex mutex_;
  std::map<void*, Mapping> mappings_;
  std::atomic<int> imports_{0}, flushes_{0};
};

}  // namespace moe_efa::testing
