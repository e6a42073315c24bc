// Inbox segment: one Ring per writing node, each a cursor of the writer, a cursor of the reader and the entries.
#include "transport/shm_rail.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#include "common/atomic.h"
#include "common/check.h"
#include "common/math.h"

namespace moe_efa::transport {
namespace {

constexpr std::uint32_t kAddressMagic = 0x5253'4f4d;  // "MOSR"
constexpr std::uint32_t kAddressVersion = 2;          // of this blob and of the inbox's layout
constexpr std::size_t kNameBytes = 256;
constexpr std::uint64_t kMaxDone = 4096;
constexpr std::uint64_t kMaxEntries = 1u << 20;
constexpr std::uint64_t kLineBytes = 64;  // cursors on lines of their own: two processes write them

struct Address {
  std::uint32_t magic, version;
  std::uint32_t node, num_nodes;
  std::uint64_t region_bytes, inbox_bytes;
  std::uint64_t entries;
  std::uint64_t slots_begin;  // of slots that lie apart, else 0
  std::uint32_t slots_name_bytes, reserved;
  char region_name[kNameBytes];
  char inbox_name[kNameBytes];
  char slots_name[kNameBytes];  // any bytes
};
static_assert(sizeof(Address) == 56 + 3 * kNameBytes && std::is_trivially_copyable_v<Address>);

[[noreturn]] void fail(const std::string& text) {
  throw common::StatusError({common::StatusCode::kConfig, -1, -1, -1, -1, text});
}

}  // namespace

struct ShmRail::Entry {
  std::uint32_t imm;
  std::uint32_t bytes;
};

struct ShmRail::Ring {
  alignas(kLineBytes) std::uint64_t tail;  // entries written; the writer's
  alignas(kLineBytes) std::uint64_t head;  // entries read; the reader's
  alignas(kLineBytes) Entry entries[1];    // in truth config.inbox_entries
};

namespace {

constexpr std::uint64_t kEntryBytes = 8;
constexpr std::uint64_t ring_bytes(std::uint64_t entries) {
  return 2 * kLineBytes + common::round_up(entries * kEntryBytes, kLineBytes);
}

}  // namespace

ShmRail::ShmRail(const ShmRailConfig& config)
    : config_(config),
      entries_(std::bit_ceil(std::clamp<std::uint64_t>(config.inbox_entries, 2, kMaxEntries))),
      inbox_bytes_(ring_bytes(entries_) * config.num_nodes),
      peers_(config.num_nodes),
      heads_(config.num_nodes, 0),
      corrupt_(config.num_nodes, false),
      done_(kMaxDone) {
  static_assert(sizeof(Entry) == kEntryBytes);
  MOE_EFA_CHECK(config.memory.region != nullptr && config.own_node < config.num_nodes, "bad ShmRailConfig");
  MOE_EFA_CHECK(config.region_name.size() < kNameBytes && config.inbox_name.size() < kNameBytes &&
                    config.exported_slots.size() <= kNameBytes,
                "segment names are too long");
  MOE_EFA_CHECK(config.memory.slots == nullptr || config.import_slots, "slots apart that nobody could reach");
  inbox_ = Segment::create(config.inbox_name, inbox_bytes_);  // zero: every cursor starts at 0
}

std::vector<std::byte> ShmRail::local_address() const {
  Address address{};
  address.magic = kAddressMagic;
  address.version = kAddressVersion;
  address.node = config_.own_node;
  address.num_nodes = config_.num_nodes;
  address.region_bytes = config_.memory.bytes;
  if (config_.memory.slots != nullptr) address.slots_begin = config_.memory.slots_begin;
  address.slots_name_bytes = static_cast<std::uint32_t>(config_.exported_slots.size());
  address.inbox_bytes = inbox_bytes_;
  address.entries = entries_;
  config_.region_name.copy(address.region_name, kNameBytes - 1);
  config_.inbox_name.copy(address.inbox_name, kNameBytes - 1);
  config_.exported_slots.copy(address.slots_name, kNameBytes);
  std::vector<std::byte> blob(sizeof address);
  std::memcpy(blob.data(), &address, sizeof address);
  return blob;
}

void ShmRail::add_peer(std::uint32_t node, std::span<const std::byte> blob) {
  MOE_EFA_CHECK(node < config_.num_nodes && node != config_.own_node && peers_[node].ring == nullptr,
                "node " << node << " cannot be added as a peer of node " << config_.own_node);
  Address address{};
  if (blob.size() != sizeof address) fail("node " + std::to_string(node) + " does not speak of a shared-memory rail");
  std::memcpy(&address, blob.data(), sizeof address);
  address.region_name[kNameBytes - 1] = address.inbox_name[kNameBytes - 1] = '\0';
  if (address.magic != kAddressMagic || address.version != kAddressVersion) {
    fail("node " + std::to_string(node) +
         " speaks another version of the shared-memory rail: is moe_efa the same "
         "everywhere?");
  }
  const bool apart = config_.memory.slots != nullptr;
  if (address.node != node || address.num_nodes != config_.num_nodes || address.entries != entries_ ||
      address.inbox_bytes != inbox_bytes_ || (address.slots_begin != 0) != apart ||
      address.slots_begin > address.region_bytes || address.slots_name_bytes > (apart ? kNameBytes : 0) ||
      address.reserved != 0) {
    fail("the shared-memory rail of node " + std::to_string(node) + " has another configuration than that of node " +
         std::to_string(config_.own_node));
  }
  Peer peer;
  peer.region = Segment::open(address.region_name, apart ? address.slots_begin : address.region_bytes);
  peer.memory = {peer.region.data(), nullptr, address.slots_begin, address.region_bytes};
  if (apart) {
    peer.memory.slots = config_.import_slots(std::string(address.slots_name, address.slots_name_bytes));
    if (peer.memory.slots == nullptr) fail("the slots of node " + std::to_string(node) + " cannot be reached");
  }
  peer.inbox = Segment::open(address.inbox_name, address.inbox_bytes);
  peer.ring = ring_of(peer.inbox, config_.own_node);
  peers_[node] = std::move(peer);
}

ShmRail::Ring* ShmRail::ring_of(const Segment& inbox, std::uint32_t writer_node) const {
  return reinterpret_cast<Ring*>(inbox.data() + writer_node * ring_bytes(entries_));
}

PostResult ShmRail::post_write(const WriteRequest& request) {
  MOE_EFA_CHECK(request.peer_node < config_.num_nodes && peers_[request.peer_node].ring != nullptr,
                "write to unknown node " << request.peer_node);
  Peer& peer = peers_[request.peer_node];
  MOE_EFA_CHECK(config_.memory.contains(request.local_offset, request.bytes) &&
                    peer.memory.contains(request.remote_offset, request.bytes),
                "write of " << request.bytes << " bytes from " << request.local_offset << " to "
                            << request.remote_offset << " of node " << request.peer_node << " leaves a region");
  if (done_tail_ - done_head_ == kMaxDone) return PostResult::kAgain;  // the completion queue: poll first
  if (request.with_imm && peer.tail - peer.head == entries_) {
    // Acquire: pairs with the reader's release of `head`; what it has read may be overwritten.
    peer.head = common::load_acquire(&peer.ring->head);
    if (peer.tail - peer.head > entries_) {
      throw common::StatusError(
          {common::StatusCode::kTransport, -1, -1, -1, -1,
           "shared memory: the inbox of node " + std::to_string(request.peer_node) + " is corrupt"});
    }
    if (peer.tail - peer.head == entries_) return PostResult::kAgain;
  }
  if (request.bytes > 0) {
    std::memcpy(peer.memory.at(request.remote_offset), config_.memory.at(request.local_offset), request.bytes);
  }
  if (request.with_imm) {
    peer.ring->entries[peer.tail & (entries_ - 1)] = {request.imm, request.bytes};
    // Release: publishes the copied bytes and the entry to the peer that acquires `tail`.
    common::store_release(&peer.ring->tail, ++peer.tail);
  }
  // Reported by a later poll(), so after the immediate is visible.
  done_[done_tail_++ % kMaxDone] = request.id;
  return PostResult::kPosted;
}

std::size_t ShmRail::poll(std::span<RailEvent> events) {
  std::size_t filled = 0;
  while (done_head_ != done_tail_ && filled < events.size()) {
    RailEvent& event = events[filled++];
    event.kind = RailEvent::Kind::kWriteDone;
    event.id = done_[done_head_++ % kMaxDone];
  }
  for (std::uint32_t i = 0; i < config_.num_nodes && filled < events.size(); ++i) {
    std::uint32_t node = next_ring_;
    next_ring_ = next_ring_ + 1 == config_.num_nodes ? 0 : next_ring_ + 1;
    if (node != config_.own_node && !corrupt_[node]) poll_ring(node, events, filled);
  }
  return filled;
}

void ShmRail::poll_ring(std::uint32_t node, std::span<RailEvent> events, std::size_t& filled) {
  Ring* ring = ring_of(inbox_, node);
  std::uint64_t head = heads_[node];
  // Acquire: pairs with the writer's release of `tail`; entries before it, and the bytes they vouch for, are visible.
  std::uint64_t tail = common::load_acquire(&ring->tail);
  if (tail - head > entries_) {
    corrupt_[node] = true;
    RailEvent& event = events[filled++];
    event = RailEvent{};
    event.kind = RailEvent::Kind::kError;
    event.peer_node = static_cast<int>(node);
    event.error = "shared memory: the inbox ring written by node " + std::to_string(node) + " is corrupt";
    return;
  }
  if (head == tail) return;
  while (head != tail && filled < events.size()) {
    const Entry& entry = ring->entries[head++ & (entries_ - 1)];
    RailEvent& event = events[filled++];
    event.kind = RailEvent::Kind::kRemoteImm;
    event.imm = entry.imm;
    event.bytes = entry.bytes;
  }
  heads_[node] = head;
  // Release: our reads of these entries are done; the writer that acquires `head` may overwrite them.
  common::store_release(&ring->head, head);
}

std::string ShmRail::describe() const { return "shared memory" + nic_suffix(config_.rail_index, config_.num_rails); }

}  // namespace moe_efa::transport
