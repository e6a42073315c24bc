// Describes memory to fi_mr_regattr: host memory, or a GPU's by address or as a dma-buf. Internal to the libfabric
// files.
#pragma once

#include "transport/libfabric_rail.h"

#if MOE_EFA_HAVE_LIBFABRIC
#include <rdma/fi_domain.h>

namespace moe_efa::transport {

// Not in headers of API 1.17. The flag is fi_mr_attr's own; the structure grew at its end.
inline constexpr std::uint64_t kMrDmabuf = 1ull << 40;
struct DmabufRange {
  int fd;
  std::uint64_t offset;
  std::size_t length;
  void* base;
};

class Registration {
 public:
  Registration(void* memory, std::uint64_t bytes, std::uint64_t access, std::uint64_t key,
               const MemoryDescriptor& descriptor);
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;

  const fi_mr_attr& attributes() const { return attributes_.known; }
  std::uint64_t flags() const { return flags_; }

 private:
  struct {
    fi_mr_attr known;
    char appended[64];  // by later versions; zero there means unused
  } attributes_ = {};
  iovec range_ = {};
  DmabufRange dmabuf_ = {};
  std::uint64_t flags_ = 0;
};

}  // namespace moe_efa::transport

#endif  // MOE_EFA_HAVE_LIBFABRIC
