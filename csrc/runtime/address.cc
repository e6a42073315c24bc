#include "runtime/address.h"

#include <cstring>

#include "common/status.h"

namespace moe_efa::runtime {

namespace {

constexpr std::size_t kMostSlotsBytes = 4096;
constexpr std::uint32_t kMagic = 0x4d6f4541;  // "MoEA"

void put_bytes(std::string& out, const void* data, std::size_t size) {
  std::uint64_t length = size;
  out.append(reinterpret_cast<const char*>(&length), sizeof(length));
  out.append(static_cast<const char*>(data), size);
}

template <typename T>
void put(std::string& out, T value) {
  put_bytes(out, &value, sizeof(value));
}

class Reader {
 public:
  explicit Reader(const std::string& bytes) : bytes_(bytes) {}

  std::string take() {
    std::uint64_t length = 0;
    if (bytes_.size() - at_ < sizeof(length)) fail();
    std::memcpy(&length, bytes_.data() + at_, sizeof(length));
    at_ += sizeof(length);
    if (length > bytes_.size() - at_) fail();
    std::string field = bytes_.substr(at_, length);
    at_ += length;
    return field;
  }

  template <typename T>
  T take_value() {
    std::string field = take();
    if (field.size() != sizeof(T)) fail();
    T value;
    std::memcpy(&value, field.data(), sizeof(T));
    return value;
  }

  void finish() const {
    if (at_ != bytes_.size()) fail();
  }

  [[noreturn]] static void fail() {
    throw common::StatusError({common::StatusCode::kConfig, -1, -1, -1, -1, "malformed rank address at rendezvous"});
  }

 private:
  const std::string& bytes_;
  std::size_t at_ = 0;
};

}  // namespace

std::string Address::encode() const {
  std::string out;
  put(out, kMagic);
  put(out, rank);
  put(out, layout_hash);
  put_bytes(out, host.data(), host.size());
  put(out, port);
  put_bytes(out, segment.data(), segment.size());
  put(out, segment_bytes);
  put_bytes(out, slots.data(), slots.size());
  put(out, static_cast<std::uint32_t>(kernel_words));
  put(out, static_cast<std::uint32_t>(rails.size()));
  for (const auto& rail : rails) put_bytes(out, rail.data(), rail.size());
  return out;
}

Address Address::decode(const std::string& bytes) {
  Reader reader(bytes);
  Address address;
  if (reader.take_value<std::uint32_t>() != kMagic) {
    throw common::StatusError({common::StatusCode::kConfig, -1, -1, -1, -1, "not a rank address"});
  }
  address.rank = reader.take_value<std::uint32_t>();
  address.layout_hash = reader.take_value<std::uint64_t>();
  address.host = reader.take();
  address.port = reader.take_value<std::uint32_t>();
  address.segment = reader.take();
  address.segment_bytes = reader.take_value<std::uint64_t>();
  address.slots = reader.take();
  if (address.slots.size() > kMostSlotsBytes) reader.fail();
  auto kernel_words = reader.take_value<std::uint32_t>();
  if (kernel_words > 1) reader.fail();
  address.kernel_words = kernel_words == 1;
  auto num_rails = reader.take_value<std::uint32_t>();
  for (std::uint32_t i = 0; i < num_rails; ++i) {
    std::string rail = reader.take();
    const auto* data = reinterpret_cast<const std::byte*>(rail.data());
    address.rails.emplace_back(data, data + rail.size());
  }
  reader.finish();
  return address;
}

}  // namespace moe_efa::runtime
