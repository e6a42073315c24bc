#include "transport/libfabric_memory.h"

#if MOE_EFA_HAVE_LIBFABRIC

namespace moe_efa::transport {

Registration::Registration(void* memory, std::uint64_t bytes, std::uint64_t access, std::uint64_t key,
                           const MemoryDescriptor& descriptor)
    : range_{memory, bytes} {
  fi_mr_attr& attributes = attributes_.known;
  attributes.mr_iov = &range_;
  attributes.iov_count = 1;
  attributes.access = access;
  attributes.requested_key = key;
  if (descriptor.kind == MemoryDescriptor::Kind::kSystem) return;
  attributes.iface = FI_HMEM_CUDA;
  attributes.device.cuda = descriptor.device;
  if (descriptor.dmabuf_fd < 0) return;
  dmabuf_ = {descriptor.dmabuf_fd, descriptor.dmabuf_offset, bytes, memory};
  attributes.mr_iov = reinterpret_cast<const iovec*>(&dmabuf_);  // a union from 1.20 on
  flags_ = kMrDmabuf;
}

}  // namespace moe_efa::transport

#endif  // MOE_EFA_HAVE_LIBFABRIC
