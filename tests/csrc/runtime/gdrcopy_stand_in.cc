// GDRCopy's library for tests without a GPU. A mapping is memory of its own, as far as loads and stores go: a thread,
// which stands for the bus, carries words that were stored there to the memory that was pinned, some time later and in
// any order. So nothing gets there but through here. $GDR_STAND_IN_FAILS names what does not work.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#define MOE_EFA_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr std::size_t kPage = 64 << 10;
constexpr auto kPause = std::chrono::microseconds(100);

std::atomic<long> stores{0}, live{0};

bool fails(const char* what) {
  const char* named = std::getenv("GDR_STAND_IN_FAILS");
  return named != nullptr && std::strcmp(named, what) == 0;
}

struct Mapping {
  Mapping(std::uint64_t* pinned, std::size_t bytes) : memory(pinned), words(bytes / 8), seen(bytes / 8) {
    std::memcpy(words.data(), pinned, bytes);
    seen = words;
    bus = std::thread([this] { carry(); });
  }
  ~Mapping() {
    stop = true;
    bus.join();
  }
  void carry() {
    for (std::size_t begin = 0; !stop; begin = begin * 31 + 7) {
      for (std::size_t i = 0; i < words.size(); ++i) {
        std::size_t at = (begin + i) % words.size();
        std::uint64_t value = __atomic_load_n(&words[at], __ATOMIC_ACQUIRE);
        if (value == seen[at]) continue;
        seen[at] = value;
        ++stores;
        __atomic_store_n(&memory[at], value, __ATOMIC_RELEASE);
      }
      std::this_thread::sleep_for(kPause);
    }
  }

  std::uint64_t* memory;
  std::vector<std::uint64_t> words, seen;
  std::atomic<bool> stop{false};
  std::thread bus;
};

struct Pin {
  unsigned long address;
  std::size_t bytes;
  Mapping* mapping = nullptr;
};

}  // namespace

struct gdr_mh_t {
  unsigned long h;
};

MOE_EFA_EXPORT void gdr_runtime_get_version(int* major, int* minor) {
  *major = fails("version") ? 3 : 2;
  *minor = 5;
}

MOE_EFA_EXPORT void* gdr_open() {
  if (fails("gdr_open")) return nullptr;
  ++live;
  return &live;
}

MOE_EFA_EXPORT int gdr_close(void*) {
  --live;
  return 0;
}

MOE_EFA_EXPORT int gdr_pin_buffer(void*, unsigned long address, std::size_t bytes, std::uint64_t, std::uint32_t,
                                  gdr_mh_t* handle) {
  if (fails("gdr_pin_buffer")) return EPERM;
  std::vector<unsigned char> resident(bytes / static_cast<std::size_t>(sysconf(_SC_PAGESIZE)) + 1);
  bool pages = address % kPage == 0 && bytes % kPage == 0 && bytes > 0;
  if (!pages || mincore(reinterpret_cast<void*>(address), bytes, resident.data()) != 0) return EINVAL;
  ++live;
  handle->h = reinterpret_cast<unsigned long>(new Pin{address, bytes});
  return 0;
}

MOE_EFA_EXPORT int gdr_unpin_buffer(void*, gdr_mh_t handle) {
  auto* pin = reinterpret_cast<Pin*>(handle.h);
  if (pin->mapping != nullptr) return EINVAL;
  delete pin;
  --live;
  return 0;
}

MOE_EFA_EXPORT int gdr_map(void*, gdr_mh_t handle, void** address, std::size_t bytes) {
  auto* pin = reinterpret_cast<Pin*>(handle.h);
  if (fails("gdr_map")) return EAGAIN;
  if (pin->mapping != nullptr || bytes > pin->bytes || bytes % 8 != 0) return EINVAL;
  static std::vector<std::uint64_t> other(kPage);
  auto* memory = reinterpret_cast<std::uint64_t*>(pin->address);
  pin->mapping = new Mapping(fails("elsewhere") ? other.data() : memory, bytes);
  *address = pin->mapping->words.data();
  ++live;
  return 0;
}

MOE_EFA_EXPORT int gdr_unmap(void*, gdr_mh_t handle, void* address, std::size_t) {
  auto* pin = reinterpret_cast<Pin*>(handle.h);
  if (pin->mapping == nullptr || address != pin->mapping->words.data()) return EINVAL;
  delete pin->mapping;
  pin->mapping = nullptr;
  --live;
  return 0;
}

// For tests: words carried so far; what was opened, pinned or mapped and not given back.
MOE_EFA_EXPORT long gdr_stand_in_stores() { return stores; }
MOE_EFA_EXPORT long gdr_stand_in_live() { return live; }
