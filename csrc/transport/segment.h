// Shared memory in /dev/shm that its owner locks for life, so that leftovers of dead processes can be told from live
// segments across pid namespaces. Knows nothing of what is stored in it. Keeps I9: all pages exist once created.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace moe_efa::transport {

inline constexpr char kSegmentPrefix[] = "moe_efa-";

// "moe_efa-<job key>-<rank>-<role>"; a key that cannot be part of a file name is replaced by its hash.
std::string segment_name(const std::string& job_key, int rank, const std::string& role = "region");

// Removes the segments whose owner is dead; returns how many. Never touches one whose owner lives.
int sweep_stale_segments();

class Segment {
 public:
  Segment() = default;
  Segment(Segment&& other) noexcept;
  Segment& operator=(Segment&& other) noexcept;
  ~Segment();  // unmaps; the owner also removes the name if it is still there

  // Sweeps leftovers first. The memory is zero. Throws StatusError(kConfig) and leaves nothing behind when it cannot.
  static Segment create(const std::string& name, std::uint64_t bytes);
  // Maps a segment that another process of this host created with the same size.
  static Segment open(const std::string& name, std::uint64_t bytes);

  // Removes the name; mappings stay valid. Call it when everybody has opened the segment: then a crash leaves nothing.
  void unlink();

  bool valid() const { return data_ != nullptr; }
  std::byte* data() const { return data_; }
  std::uint64_t size() const { return bytes_; }
  const std::string& name() const { return name_; }

 private:
  void map(int fd);
  void release() noexcept;
  void swap(Segment& other) noexcept;

  std::string name_;
  std::byte* data_ = nullptr;
  std::uint64_t bytes_ = 0;
  int lock_fd_ = -1;      // the owner's: its flock says that the owner lives
  pid_t owner_pid_ = -1;  // a forked child inherits the object but not the right to remove the name
  bool linked_ = false;   // owner only
};

}  // namespace moe_efa::transport
