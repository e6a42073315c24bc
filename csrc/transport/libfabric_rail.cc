// LibfabricRail: see the header. Every range is checked before it is posted, because software providers drop a bad
// write silently (I10); a source is free again only when its completion was read here (I11).
#include "transport/libfabric_rail.h"

#include <utility>

#include "common/status.h"
#include "transport/libfabric_choice.h"
#include "transport/libfabric_memory.h"
#include "transport/libfabric_provider.h"

#if MOE_EFA_HAVE_LIBFABRIC
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <type_traits>
#endif

namespace moe_efa::transport {

using common::Status;
using common::StatusCode;
using common::StatusError;

namespace {

[[noreturn]] void throw_status(StatusCode code, std::string message) {
  Status status;
  status.code = code;
  status.message = std::move(message);
  throw StatusError(std::move(status));
}

}  // namespace

#if !MOE_EFA_HAVE_LIBFABRIC

std::unique_ptr<Rail> make_libfabric_rail(const LibfabricRailConfig& config) {
  throw_status(StatusCode::kConfig,
               "rail " + std::to_string(config.rail_index) + ": " + libfabric_info(config.search).error);
}

#else

namespace {

constexpr std::uint64_t kRequestedKey = 0x6d6f65;  // where the application chooses keys; one region per domain
constexpr std::uint64_t kScratchKey = 0x6d6f66;
constexpr std::uint64_t kSlotsKey = 0x6d6f67;
constexpr std::size_t kScratchBytes = 64;
constexpr std::size_t kPollBatch = 32;

template <typename Fid>
struct CloseFid {
  void operator()(Fid* fid) const { fi_close(&fid->fid); }
};
template <typename Fid>
using FidPtr = std::unique_ptr<Fid, CloseFid<Fid> >;

// A part of a region as its peers reach it. Parts follow each other in offsets.
struct RemotePart {
  std::uint64_t base = 0;  // what an offset into the part is added to
  std::uint64_t key = 0;
  std::uint64_t bytes = 0;  // 0: there is no such part
};

// What local_address() packs, followed by name_bytes of endpoint name. All hosts are little-endian.
struct AddressHeader {
  static constexpr std::uint32_t kMagic = 0x6c52456d;  // "mERl"
  static constexpr std::uint32_t kVersion = 2;

  std::uint32_t magic = kMagic;
  std::uint32_t version = kVersion;
  std::uint32_t provider_version = 0;
  std::uint32_t cq_data_bytes = 0;
  RemotePart parts[2];  // the whole region, or what comes before the slots and the slots
  std::uint32_t name_bytes = 0;
  char provider[36] = {};  // zero-terminated label
};
static_assert(sizeof(AddressHeader) == 104 && std::is_trivially_copyable_v<AddressHeader>);

// The context of one operation. The provider owns `space` while the operation is in flight.
struct Operation {
  fi_context2 space;  // first: libfabric hands back its address
  std::uint64_t id;
  std::uint32_t peer_node;
  bool is_write;  // else a posted receive
};
static_assert(std::is_standard_layout_v<Operation>);

struct Peer {
  bool known = false;
  fi_addr_t address = FI_ADDR_UNSPEC;
  RemotePart parts[2];

  bool apart() const { return parts[1].bytes > 0; }
  std::uint64_t bytes() const { return parts[0].bytes + parts[1].bytes; }
  // Where the part begins that `offset` is in; an offset on the border is in the second.
  std::uint64_t begin_of(std::uint64_t offset) const {
    return apart() && offset >= parts[0].bytes ? parts[0].bytes : 0;
  }
  const RemotePart& part_of(std::uint64_t offset) const { return parts[begin_of(offset) > 0 ? 1 : 0]; }
  std::uint64_t end_of(std::uint64_t offset) const { return begin_of(offset) + part_of(offset).bytes; }
};

// Structs grow at their end from version to version; the slack keeps a newer library off our stack.
struct ErrorEntry {
  fi_cq_err_entry entry;
  char slack[64];
};

}  // namespace

class LibfabricRail final : public Rail {
 public:
  explicit LibfabricRail(const LibfabricRailConfig& config);
  ~LibfabricRail() override;

  std::vector<std::byte> local_address() const override;
  void add_peer(std::uint32_t node, std::span<const std::byte> address) override;
  PostResult post_write(const WriteRequest& request) override;
  std::size_t poll(std::span<RailEvent> events) override;
  std::string describe() const override;

 private:
  std::string label() const { return label_of(choice_.facts); }
  std::string where() const { return "rail " + std::to_string(rail_index_) + " (" + describe() + ")"; }
  std::string where(std::uint32_t node) const { return where() + ", peer node " + std::to_string(node); }
  void open(const LibfabricRailConfig& config);
  void refuse_unfit(const EndpointFacts& facts, const RailNeeds& needs) const;
  std::uint64_t size_option(int option, std::uint64_t otherwise) const;
  void set_efa_options(const RailNeeds& needs);
  void check_efa_writes();
  FidPtr<fid_mr> register_memory(void* memory, std::uint64_t bytes, std::uint64_t access, std::uint64_t key,
                                 const MemoryDescriptor& descriptor);
  void read_endpoint_name();
  void post_receives();
  const Peer& checked_peer(const WriteRequest& request) const;
  bool translate(const fi_cq_data_entry& entry, RailEvent* event);
  bool read_error(RailEvent* event);
  void recycle(Operation* operation);

  const LibfabricApi& api_;
  int rail_index_, num_rails_;
  proto::RegionMemory region_;
  std::uint32_t max_outstanding_;
  std::uint64_t max_write_bytes_ = 0;
  std::uint64_t write_flags_ = FI_COMPLETION;

  std::vector<Operation> writes_, receives_;  // fixed at construction: the provider holds their addresses
  std::vector<Operation*> free_writes_, idle_receives_;
  std::vector<Peer> peers_;                                       // by node
  alignas(kScratchBytes) std::byte scratch_[kScratchBytes] = {};  // target of posted receives; nobody sends
  std::vector<std::byte> endpoint_name_;

  // Destroyed bottom up: endpoint first, fabric last.
  ProviderChoice choice_;
  FidPtr<fid_fabric> fabric_;
  FidPtr<fid_domain> domain_;
  FidPtr<fid_mr> memory_, slots_memory_, scratch_memory_;
  FidPtr<fid_av> addresses_;
  FidPtr<fid_cq> completions_;
  FidPtr<fid_ep> endpoint_;
};

LibfabricRail::LibfabricRail(const LibfabricRailConfig& config)
    : api_(load_libfabric(config.search)),
      rail_index_(config.rail_index),
      num_rails_(config.num_rails),
      region_(config.memory),
      max_outstanding_(std::max(config.max_outstanding, 1u)),
      choice_(choose_provider(api_, config)) {
  if (region_.region == nullptr || region_.bytes == 0) throw_status(StatusCode::kConfig, where() + ": empty region");
  open(config);
}

LibfabricRail::~LibfabricRail() {
  // A registration bound to an endpoint has to go before it; elsewhere after it, as writes may still be in flight.
  if ((choice_.info->domain_attr->mr_mode & FI_MR_ENDPOINT) != 0) {
    memory_.reset();
    slots_memory_.reset();
    scratch_memory_.reset();
  }
}

void LibfabricRail::open(const LibfabricRailConfig& config) {
  SignalGuard signals;
  fi_info* info = choice_.info.get();
  const EndpointFacts& facts = choice_.facts;
  const RailNeeds needs = {config.max_remote_events, config.max_outstanding, config.max_write_bytes,
                           config.slots.kind != MemoryDescriptor::Kind::kSystem};
  refuse_unfit(facts, needs);
  max_outstanding_ = static_cast<std::uint32_t>(outstanding_writes(facts, needs));
  if (!is_efa(facts.provider)) write_flags_ |= FI_DELIVERY_COMPLETE;  // efa's completion is the remote NIC's own word

  fid_fabric* fabric = nullptr;
  FI_CHECK(api_.fabric(info->fabric_attr, &fabric, nullptr), where());
  fabric_.reset(fabric);
  fid_domain* domain = nullptr;
  FI_CHECK(fi_domain(fabric, info, &domain, nullptr), where());
  domain_.reset(domain);

  fi_av_attr av_attr = {};
  av_attr.type = info->domain_attr->av_type == FI_AV_UNSPEC ? FI_AV_TABLE : info->domain_attr->av_type;
  av_attr.count = config.num_peers;
  fid_av* av = nullptr;
  FI_CHECK(fi_av_open(domain, &av_attr, &av, nullptr), where());
  addresses_.reset(av);

  fi_cq_attr cq_attr = {};
  cq_attr.size = completion_entries(facts, needs);
  cq_attr.format = FI_CQ_FORMAT_DATA;
  cq_attr.wait_obj = FI_WAIT_NONE;
  fid_cq* cq = nullptr;
  FI_CHECK(fi_cq_open(domain, &cq_attr, &cq, nullptr), where() << ", completion queue of " << cq_attr.size);
  completions_.reset(cq);

  fid_ep* endpoint = nullptr;
  FI_CHECK(fi_endpoint(domain, info, &endpoint, nullptr), where());
  endpoint_.reset(endpoint);
  FI_CHECK(fi_ep_bind(endpoint, &av->fid, 0), where());
  FI_CHECK(fi_ep_bind(endpoint, &cq->fid, FI_TRANSMIT | FI_RECV), where());
  if (is_efa(facts.provider)) set_efa_options(needs);
  FI_CHECK(fi_enable(endpoint), where());
  if (is_efa(facts.provider)) check_efa_writes();
  // The opened endpoint knows better than fi_getinfo did.
  EndpointFacts opened = facts;
  opened.max_write_bytes = size_option(kOptMaxRmaSize, facts.max_write_bytes);
  if (is_efa(facts.provider)) opened.tx_size = std::min(facts.tx_size, size_option(kOptTxSize, facts.tx_size));
  refuse_unfit(opened, needs);
  max_write_bytes_ = opened.max_write_bytes;
  max_outstanding_ = static_cast<std::uint32_t>(outstanding_writes(opened, needs));
  read_endpoint_name();

  constexpr std::uint64_t kAccess = FI_WRITE | FI_REMOTE_WRITE;
  memory_ = register_memory(region_.region, region_.end_of(0), kAccess, kRequestedKey, {});
  if (region_.slots != nullptr) {
    MemoryDescriptor slots = config.slots;
    if (!takes_dmabuf(facts.provider, {FI_MAJOR(api_.version), FI_MINOR(api_.version)})) slots.dmabuf_fd = -1;
    slots_memory_ = register_memory(region_.slots, region_.bytes - region_.slots_begin, kAccess, kSlotsKey, slots);
  }

  writes_.resize(max_outstanding_);
  free_writes_.reserve(writes_.size());
  for (Operation& operation : writes_) {
    operation.is_write = true;
    free_writes_.push_back(&operation);
  }
  if (posted_receives(facts, needs) > 0) {
    scratch_memory_ = register_memory(scratch_, kScratchBytes, FI_RECV, kScratchKey, {});
    receives_.resize(posted_receives(facts, needs));
    for (Operation& operation : receives_) {
      operation.is_write = false;
      idle_receives_.push_back(&operation);
    }
    post_receives();
    if (!idle_receives_.empty()) {  // a peer that knows the address may write as many immediates as were promised
      throw_status(StatusCode::kTransport, where() + ": only " +
                                               std::to_string(receives_.size() - idle_receives_.size()) + " of " +
                                               std::to_string(receives_.size()) + " receives could be posted");
    }
  }
}

void LibfabricRail::refuse_unfit(const EndpointFacts& facts, const RailNeeds& needs) const {
  const std::string why = unfit(facts, needs);
  if (!why.empty()) throw_status(StatusCode::kConfig, where() + ": " + why);
}

std::uint64_t LibfabricRail::size_option(int option, std::uint64_t otherwise) const {
  std::size_t value = 0, bytes = sizeof(value);
  const bool told = fi_getopt(&endpoint_->fid, FI_OPT_ENDPOINT, option, &value, &bytes) == 0;
  return told && value > 0 ? value : otherwise;
}

void LibfabricRail::set_efa_options(const RailNeeds& needs) {
  for (const EndpointOption& option : efa_options(choice_.facts, needs)) {
    const bool flag = option.value != 0;
    const int result = option.is_bool ? fi_setopt(&endpoint_->fid, FI_OPT_ENDPOINT, option.number, &flag, sizeof(flag))
                                      : fi_setopt(&endpoint_->fid, FI_OPT_ENDPOINT, option.number, &option.value,
                                                  sizeof(option.value));
    if (result == 0 || option.required_for == nullptr) continue;
    throw_status(StatusCode::kConfig, where() + ": " + option.required_for + " is not possible here: " + option.name +
                                          " was refused: " + libfabric_error_text(result));
  }
}

void LibfabricRail::check_efa_writes() {
  bool emulated = true;
  std::size_t bytes = sizeof(emulated);
  const int result = fi_getopt(&endpoint_->fid, FI_OPT_ENDPOINT, kOptEfaEmulatedWrite, &emulated, &bytes);
  if (result == 0 && !emulated) return;
  throw_status(StatusCode::kConfig, where() + ": RDMA write is emulated by this library or device (" + api_.path +
                                        "); install the current EFA installer, or use provider tcp");
}

FidPtr<fid_mr> LibfabricRail::register_memory(void* memory, std::uint64_t bytes, std::uint64_t access,
                                              std::uint64_t key, const MemoryDescriptor& descriptor) {
  fid_mr* mr = nullptr;
  const Registration registration(memory, bytes, access, key, descriptor);
  FI_CHECK(fi_mr_regattr(domain_.get(), &registration.attributes(), registration.flags(), &mr),
           where() << ", " << bytes << " bytes"
                   << (descriptor.kind == MemoryDescriptor::Kind::kSystem
                           ? " (is `ulimit -l` large enough?)"
                           : " of GPU memory (does the driver give dma-bufs, or is nvidia-peermem loaded? otherwise "
                             "buffers=\"host\")"));
  FidPtr<fid_mr> owner(mr);
  if ((choice_.info->domain_attr->mr_mode & FI_MR_ENDPOINT) != 0) {
    FI_CHECK(fi_mr_bind(mr, &endpoint_->fid, 0), where());
    FI_CHECK(fi_mr_enable(mr), where());
  }
  return owner;
}

void LibfabricRail::read_endpoint_name() {
  endpoint_name_.resize(256);
  std::size_t bytes = endpoint_name_.size();
  FI_CHECK(fi_getname(&endpoint_->fid, endpoint_name_.data(), &bytes), where());
  endpoint_name_.resize(bytes);
}

std::string LibfabricRail::describe() const {
  return "libfabric " + label() + " " + api_.version_text() + " on " + choice_.info->domain_attr->name +
         nic_suffix(rail_index_, num_rails_);
}

std::vector<std::byte> LibfabricRail::local_address() const {
  AddressHeader header;
  header.provider_version = choice_.info->fabric_attr->prov_version;
  header.cq_data_bytes = static_cast<std::uint32_t>(choice_.info->domain_attr->cq_data_size);
  const bool virtual_addresses = (choice_.info->domain_attr->mr_mode & FI_MR_VIRT_ADDR) != 0;
  auto part = [&](fid_mr* memory, std::byte* at, std::uint64_t bytes) {
    return RemotePart{virtual_addresses ? reinterpret_cast<std::uintptr_t>(at) : 0, fi_mr_key(memory), bytes};
  };
  header.parts[0] = part(memory_.get(), region_.region, region_.end_of(0));
  if (slots_memory_) {
    header.parts[1] = part(slots_memory_.get(), region_.slots, region_.bytes - region_.slots_begin);
  }
  header.name_bytes = static_cast<std::uint32_t>(endpoint_name_.size());
  label().copy(header.provider, sizeof(header.provider) - 1);
  std::vector<std::byte> address(sizeof(header) + endpoint_name_.size());
  std::memcpy(address.data(), &header, sizeof(header));
  std::memcpy(address.data() + sizeof(header), endpoint_name_.data(), endpoint_name_.size());
  return address;
}

void LibfabricRail::add_peer(std::uint32_t node, std::span<const std::byte> address) {
  auto refuse = [&](const std::string& why) { throw_status(StatusCode::kConfig, where(node) + ": " + why); };
  AddressHeader header;
  if (address.size() < sizeof(header)) refuse("address of " + std::to_string(address.size()) + " bytes is no address");
  std::memcpy(&header, address.data(), sizeof(header));
  if (header.magic != AddressHeader::kMagic) refuse("not the address of a libfabric rail");
  if (header.version != AddressHeader::kVersion) {
    refuse("address version " + std::to_string(header.version) + ", here " + std::to_string(AddressHeader::kVersion));
  }
  header.provider[sizeof(header.provider) - 1] = '\0';
  const std::uint32_t own_version = choice_.info->fabric_attr->prov_version;
  if (label().compare(0, sizeof(header.provider) - 1, header.provider) != 0 || header.provider_version != own_version) {
    auto name = [](const std::string& provider, std::uint32_t version) {
      return provider + " " + std::to_string(FI_MAJOR(version)) + "." + std::to_string(FI_MINOR(version));
    };
    refuse("it runs provider " + name(header.provider, header.provider_version) + ", here it is " +
           name(label(), own_version) + "; all nodes need the same libfabric");
  }
  if (header.cq_data_bytes != choice_.info->domain_attr->cq_data_size) {
    refuse("its immediates have " + std::to_string(header.cq_data_bytes) + " bytes, here " +
           std::to_string(choice_.info->domain_attr->cq_data_size));
  }
  if (header.name_bytes != endpoint_name_.size() || address.size() != sizeof(header) + header.name_bytes ||
      header.parts[0].bytes == 0 || header.parts[0].bytes + header.parts[1].bytes < header.parts[1].bytes) {
    refuse("damaged address");
  }
  if (node < peers_.size() && peers_[node].known) throw_status(StatusCode::kInternal, where(node) + ": added twice");

  Peer peer;
  const int inserted = fi_av_insert(addresses_.get(), address.data() + sizeof(header), 1, &peer.address, 0, nullptr);
  if (inserted != 1) throw_libfabric_error("fi_av_insert", inserted < 0 ? inserted : -FI_EADDRNOTAVAIL, where(node));
  peer.known = true;
  std::copy(std::begin(header.parts), std::end(header.parts), peer.parts);
  if (peers_.size() <= node) peers_.resize(node + 1);
  peers_[node] = peer;
}

const Peer& LibfabricRail::checked_peer(const WriteRequest& request) const {
  auto refuse = [&](const std::string& why) {
    throw_status(StatusCode::kInternal, where(request.peer_node) + ": write refused: " + why);
  };
  if (request.peer_node >= peers_.size() || !peers_[request.peer_node].known) refuse("the peer was never added");
  const Peer& peer = peers_[request.peer_node];
  auto check = [&](const char* side, std::uint64_t offset, std::uint64_t limit) {
    if (offset <= limit && request.bytes <= limit - offset) [[likely]]
      return;
    refuse(std::to_string(request.bytes) + " bytes at offset " + std::to_string(offset) + " exceed the " + side +
           " memory, which ends at " + std::to_string(limit));
  };
  check("own", request.local_offset, region_.end_of(request.local_offset));
  check("peer's", request.remote_offset, peer.end_of(request.remote_offset));
  if (request.bytes > max_write_bytes_) {
    refuse(std::to_string(request.bytes) + " bytes exceed the provider's " + std::to_string(max_write_bytes_));
  }
  return peer;
}

PostResult LibfabricRail::post_write(const WriteRequest& request) {
  const Peer& peer = checked_peer(request);
  if (free_writes_.empty()) return PostResult::kAgain;
  Operation* operation = free_writes_.back();
  operation->id = request.id;
  operation->peer_node = request.peer_node;

  const bool from_slots = slots_memory_ && request.local_offset >= region_.slots_begin;
  iovec source = {region_.at(request.local_offset), request.bytes};
  void* descriptor = fi_mr_desc(from_slots ? slots_memory_.get() : memory_.get());
  const RemotePart& part = peer.part_of(request.remote_offset);
  fi_rma_iov target = {};  // valid for immediate-only writes too: efa resolves it even when it writes nothing
  target.addr = part.base + (request.remote_offset - peer.begin_of(request.remote_offset));
  target.len = request.bytes;
  target.key = part.key;
  fi_msg_rma message = {};
  message.msg_iov = &source;
  message.desc = &descriptor;
  message.iov_count = 1;
  message.addr = peer.address;
  message.rma_iov = &target;
  message.rma_iov_count = 1;
  message.context = &operation->space;
  message.data = request.imm;
  const ssize_t result =
      fi_writemsg(endpoint_.get(), &message, write_flags_ | (request.with_imm ? FI_REMOTE_CQ_DATA : 0));
  if (result == -FI_EAGAIN) return PostResult::kAgain;
  if (result < 0) [[unlikely]]
    throw_libfabric_error("fi_writemsg", result, where(request.peer_node));
  free_writes_.pop_back();
  return PostResult::kPosted;
}

void LibfabricRail::post_receives() {
  while (!idle_receives_.empty()) {
    Operation* operation = idle_receives_.back();
    const ssize_t result = fi_recv(endpoint_.get(), scratch_, kScratchBytes, fi_mr_desc(scratch_memory_.get()),
                                   FI_ADDR_UNSPEC, &operation->space);
    if (result == -FI_EAGAIN) return;  // the next poll tries again
    if (result < 0) throw_libfabric_error("fi_recv", result, where());
    idle_receives_.pop_back();
  }
}

void LibfabricRail::recycle(Operation* operation) {
  (operation->is_write ? free_writes_ : idle_receives_).push_back(operation);
}

// False where the entry is nobody's news.
bool LibfabricRail::translate(const fi_cq_data_entry& entry, RailEvent* event) {
  auto* operation = static_cast<Operation*>(entry.op_context);
  // FI_REMOTE_WRITE and FI_WRITE alone tell the two apart: other flags differ between providers and versions, and
  // a local completion may carry FI_REMOTE_CQ_DATA.
  if ((entry.flags & FI_REMOTE_WRITE) != 0) {
    if (!receives_.empty() && operation != nullptr) recycle(operation);
    *event = RailEvent{};
    event->kind = RailEvent::Kind::kRemoteImm;
    event->imm = static_cast<std::uint32_t>(entry.data);
    event->bytes = static_cast<std::uint32_t>(entry.len);
    return true;
  }
  if (operation == nullptr) return false;
  recycle(operation);
  if (!operation->is_write) return false;  // a message that nobody should have sent
  *event = RailEvent{};
  event->kind = RailEvent::Kind::kWriteDone;
  event->id = operation->id;
  return true;
}

bool LibfabricRail::read_error(RailEvent* event) {
  ErrorEntry error = {};  // err_data_size 0: the provider lends its own buffer
  const ssize_t result = fi_cq_readerr(completions_.get(), &error.entry, 0);
  if (result == -FI_EAGAIN || result == 0) return false;
  *event = RailEvent{};
  event->kind = RailEvent::Kind::kError;
  if (result < 0) {
    event->error = where() + ": fi_cq_readerr failed: " + libfabric_error_text(result);
    return true;
  }
  const fi_cq_err_entry& entry = error.entry;
  auto* operation = static_cast<Operation*>(entry.op_context);
  // A remote write that failed here may name a receive, or nothing.
  const bool own = operation >= writes_.data() && operation < writes_.data() + writes_.size();
  const bool receive = operation >= receives_.data() && operation < receives_.data() + receives_.size();
  if (own || receive) recycle(operation);
  char text[256] = "";
  const char* provider_text = fi_cq_strerror(completions_.get(), entry.prov_errno, entry.err_data, text, sizeof(text));
  if (own) {
    event->own_write = true;
    event->id = operation->id;
    event->peer_node = static_cast<int>(operation->peer_node);
  }
  event->error = (own ? where(operation->peer_node) + ": fi_writemsg" : where() + ": incoming write") +
                 " failed: " + libfabric_error_text(entry.err) +
                 ", provider: " + (provider_text != nullptr ? provider_text : "") + " (" +
                 std::to_string(entry.prov_errno) + ")";
  const std::string status = is_efa(choice_.facts.provider) ? efa_status_text(entry.prov_errno) : "";
  if (!status.empty()) event->error += ": " + status;
  return true;
}

std::size_t LibfabricRail::poll(std::span<RailEvent> events) {
  std::size_t count = 0;
  fi_cq_data_entry batch[kPollBatch];
  while (count < events.size()) {
    const std::size_t wanted = std::min(kPollBatch, events.size() - count);
    const ssize_t read = fi_cq_read(completions_.get(), batch, wanted);
    if (read > 0) {
      for (ssize_t i = 0; i < read; ++i) count += translate(batch[i], &events[count]) ? 1 : 0;
      if (static_cast<std::size_t>(read) < wanted) break;
      continue;
    }
    if (read == 0 || read == -FI_EAGAIN) break;
    if (read == -FI_EAVAIL) {
      if (!read_error(&events[count])) break;
    } else {
      events[count] = RailEvent{};
      events[count].kind = RailEvent::Kind::kError;
      events[count].error = where() + ": fi_cq_read failed: " + libfabric_error_text(read);
    }
    ++count;
    break;
  }
  if (!idle_receives_.empty()) post_receives();
  return count;
}

std::unique_ptr<Rail> make_libfabric_rail(const LibfabricRailConfig& config) {
  return std::make_unique<LibfabricRail>(config);
}

#endif  // MOE_EFA_HAVE_LIBFABRIC

}  // namespace moe_efa::transport
