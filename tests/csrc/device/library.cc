// The emulated device as a device library. Its calls return when their kernels are done, since tensors on the CPU have
// no stream; with the index -1 they return before, as those of a GPU do.
#include <cstdio>
#include <map>
#include <set>

#include "emulated_device.h"

namespace {

using moe_efa::testing::EmulatedDevice;
using moe_efa::testing::EmulatedStream;

std::set<EmulatedDevice*> devices;                                       // of this process
std::map<int, std::map<EmulatedDevice*, EmulatedStream::Graph>> graphs;  // by number

class OfLibrary final : public EmulatedDevice {
 public:
  explicit OfLibrary(bool stream_ordered) : EmulatedDevice(stream_ordered) { devices.insert(this); }
  ~OfLibrary() override {
    devices.erase(this);
    for (auto& [number, graph] : graphs) graph.erase(this);
  }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) moe_efa::kernels::Device* moe_efa_open_device(std::uint32_t abi,
                                                                                                int index, char* error,
                                                                                                std::size_t bytes) {
  if (abi != moe_efa::kernels::kDeviceAbi) {
    std::snprintf(error, bytes, "made for another version of moe_efa");
    return nullptr;
  }
  return new OfLibrary(index < 0);
}

// As torch.cuda.graph, for tests in Python: what the callers' streams get between the first two goes into a graph,
// whose number the second returns. For one thread.
extern "C" __attribute__((visibility("default"))) void emulated_begin_capture() {
  for (EmulatedDevice* device : devices) device->caller_stream().begin_capture();
}
extern "C" __attribute__((visibility("default"))) int emulated_end_capture() {
  int number = static_cast<int>(graphs.size());
  for (EmulatedDevice* device : devices) graphs[number][device] = device->caller_stream().end_capture();
  return number;
}
extern "C" __attribute__((visibility("default"))) void emulated_replay(int number) {
  for (auto& [device, graph] : graphs[number]) {
    for (auto& work : graph) device->caller_stream().queue(work);
  }
}
extern "C" __attribute__((visibility("default"))) void emulated_synchronize() {
  for (EmulatedDevice* device : devices) device->caller_stream().drain();
}
