// POSIX shared memory with a lock that marks a live owner. Protocol of a name: whoever removes one holds the flock of
// its inode, so a name that still has a link while we hold the lock is ours to remove and cannot be replaced meanwhile.
#include "transport/segment.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <thread>
#include <utility>

#include "common/check.h"
#include "common/status.h"

namespace moe_efa::transport {
namespace {

constexpr char kShmDirectory[] = "/dev/shm";
constexpr std::size_t kMaxKeyBytes = 64;
// Allocated in steps, so that a process with a periodic signal (a profiler) makes progress between interruptions.
constexpr std::uint64_t kAllocateStep = 64ull << 20;
constexpr std::chrono::milliseconds kNameDeadline{2000};

[[noreturn]] void fail(const std::string& text) {
  throw common::StatusError({common::StatusCode::kConfig, -1, -1, -1, -1, text});
}

class Fd {
 public:
  explicit Fd(int fd) : fd_(fd) {}
  ~Fd() {
    if (fd_ >= 0) ::close(fd_);
  }
  Fd(Fd&& other) noexcept : fd_(other.take()) {}
  Fd& operator=(Fd&&) = delete;
  int get() const { return fd_; }
  int take() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

bool is_plain(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
}

std::string slashed(const std::string& name) { return "/" + name; }

bool try_lock(int fd) {
  int rc;
  do {
    rc = ::flock(fd, LOCK_EX | LOCK_NB);
  } while (rc != 0 && errno == EINTR);
  return rc == 0;
}

bool has_name(int fd) {
  struct stat info{};
  return ::fstat(fd, &info) == 0 && info.st_nlink > 0;
}

bool remove_if_stale(const std::string& name) {
  Fd fd(::shm_open(slashed(name).c_str(), O_RDWR, 0));  // FD_CLOEXEC is implied
  if (fd.get() < 0) return false;                       // gone, or another user's
  if (!try_lock(fd.get())) return false;                // its owner lives
  return has_name(fd.get()) && ::shm_unlink(slashed(name).c_str()) == 0;
}

// A new inode under `name`, locked by us.
Fd create_locked(const std::string& name) {
  auto deadline = std::chrono::steady_clock::now() + kNameDeadline;
  while (true) {
    Fd fd(::shm_open(slashed(name).c_str(), O_RDWR | O_CREAT | O_EXCL, 0600));
    if (fd.get() >= 0) {
      // A sweeper that came between creation and lock takes this inode for a dead process's: it holds the lock now, or
      // held it and removed the name. Either way the inode is lost to us; take the next one.
      if (try_lock(fd.get()) && has_name(fd.get())) return fd;
    } else if (errno != EEXIST) {
      fail("cannot create shared memory /dev/shm/" + name + ": " + std::strerror(errno));
    } else if (remove_if_stale(name)) {
      continue;
    }
    if (std::chrono::steady_clock::now() > deadline) {
      fail("shared memory /dev/shm/" + name +
           " exists and a live process owns it: was this job started twice on one "
           "host with the same key?");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

std::string space_message(const std::string& name, std::uint64_t bytes, std::uint64_t free_bytes, int error) {
  return "shared memory " + name + " needs " + std::to_string(bytes) + " bytes but " + std::to_string(free_bytes) +
         " are free in /dev/shm (" + std::strerror(error) +
         "): raise the size of /dev/shm (docker run --shm-size=..., or mount -o remount,size=... /dev/shm) or lower "
         "memory_budget_bytes";
}

// Every page, now: a hole in a full /dev/shm would be a SIGBUS in the middle of a round.
void allocate(int fd, const std::string& name, std::uint64_t bytes) {
  struct statvfs space{};
  bool known = ::statvfs(kShmDirectory, &space) == 0 && space.f_blocks != 0;  // no blocks: a mount without a limit
  std::uint64_t free_bytes = known ? std::uint64_t{space.f_bavail} * space.f_frsize : 0;
  // Asked before allocating, so that a request that cannot be met does not fill /dev/shm under other processes.
  if (known && bytes > free_bytes) fail(space_message(name, bytes, free_bytes, ENOSPC));
  for (std::uint64_t offset = 0; offset < bytes;) {
    std::uint64_t step = std::min(kAllocateStep, bytes - offset);
    int error = ::posix_fallocate(fd, static_cast<off_t>(offset), static_cast<off_t>(step));
    if (error == EINTR) continue;
    if (error != 0) fail(space_message(name, bytes, free_bytes, error));
    offset += step;
  }
}

}  // namespace

std::string segment_name(const std::string& job_key, int rank, const std::string& role) {
  std::string key = job_key;
  if (key.empty() || key.size() > kMaxKeyBytes || !std::all_of(key.begin(), key.end(), is_plain)) {
    std::uint64_t hash = 0xcbf29ce484222325ull;  // FNV-1a
    for (unsigned char c : job_key) hash = (hash ^ c) * 0x100000001b3ull;
    char text[32];
    std::snprintf(text, sizeof text, "x%016llx", static_cast<unsigned long long>(hash));
    key = text;
  }
  return kSegmentPrefix + key + "-" + std::to_string(rank) + "-" + role;
}

int sweep_stale_segments() {
  DIR* directory = ::opendir(kShmDirectory);
  if (directory == nullptr) return 0;
  int removed = 0;
  while (const dirent* entry = ::readdir(directory)) {
    if (std::strncmp(entry->d_name, kSegmentPrefix, sizeof kSegmentPrefix - 1) == 0) {
      removed += remove_if_stale(entry->d_name) ? 1 : 0;
    }
  }
  ::closedir(directory);
  return removed;
}

Segment Segment::create(const std::string& name, std::uint64_t bytes) {
  MOE_EFA_CHECK(
      bytes > 0 && name.rfind(kSegmentPrefix, 0) == 0 && name.find('/') == std::string::npos && name.size() < 256,
      "bad shared memory name '" << name << "' or size " << bytes);
  sweep_stale_segments();
  Fd fd = create_locked(name);
  Segment segment;
  segment.name_ = name;
  segment.bytes_ = bytes;
  segment.owner_pid_ = ::getpid();
  segment.linked_ = true;
  segment.lock_fd_ = fd.take();  // from here on an exception removes the name, under the lock
  allocate(segment.lock_fd_, name, bytes);
  segment.map(segment.lock_fd_);
  return segment;
}

Segment Segment::open(const std::string& name, std::uint64_t bytes) {
  Fd fd(::shm_open(slashed(name).c_str(), O_RDWR, 0));
  if (fd.get() < 0) {
    fail("cannot open shared memory /dev/shm/" + name + ": " + std::strerror(errno) +
         "; ranks of one host must share /dev/shm and run as one user (containers: docker run --ipc=host), and its "
         "owner must be alive");
  }
  struct stat info{};
  if (::fstat(fd.get(), &info) != 0 || static_cast<std::uint64_t>(info.st_size) != bytes) {
    fail("shared memory /dev/shm/" + name + " has " + std::to_string(info.st_size) + " bytes, expected " +
         std::to_string(bytes) + ": do all ranks use the same configuration?");
  }
  Segment segment;
  segment.name_ = name;
  segment.bytes_ = bytes;
  segment.map(fd.get());
  return segment;
}

void Segment::map(int fd) {
  void* address = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (address == MAP_FAILED) {
    fail("cannot map " + std::to_string(bytes_) + " bytes of shared memory " + name_ + ": " + std::strerror(errno));
  }
  data_ = static_cast<std::byte*>(address);
#ifdef MADV_POPULATE_WRITE
  // Fills the page tables, so that the first round does not pay a fault per page. A hint: kernels before 5.14 refuse.
  (void)::madvise(address, bytes_, MADV_POPULATE_WRITE);
#endif
}

void Segment::unlink() {
  if (!linked_ || owner_pid_ != ::getpid()) return;
  linked_ = false;
  // We hold the lock since creation, so the name is still this inode's, unless someone removed it by hand.
  if (has_name(lock_fd_)) ::shm_unlink(slashed(name_).c_str());
}

void Segment::release() noexcept {
  if (data_ != nullptr) ::munmap(data_, bytes_);
  data_ = nullptr;
  if (lock_fd_ >= 0) {
    unlink();  // before the lock goes
    ::close(lock_fd_);
    lock_fd_ = -1;
  }
}

void Segment::swap(Segment& other) noexcept {
  std::swap(name_, other.name_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(lock_fd_, other.lock_fd_);
  std::swap(owner_pid_, other.owner_pid_);
  std::swap(linked_, other.linked_);
}

Segment::Segment(Segment&& other) noexcept { swap(other); }

Segment& Segment::operator=(Segment&& other) noexcept {
  Segment taken(std::move(other));
  swap(taken);
  return *this;
}

Segment::~Segment() { release(); }

}  // namespace moe_efa::transport
