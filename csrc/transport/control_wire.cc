// Frame: u8 type | u8 zero | u16 payload bytes | payload. A field is copied byte by byte, never read in place.
#include "transport/control_wire.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>

namespace moe_efa::transport {
namespace {

constexpr std::size_t kFrameHeaderBytes = 4;
constexpr std::int32_t kMaxRank = 1 << 24;

template <typename T>
void put(std::string& bytes, T value) {
  char raw[sizeof(T)];
  std::memcpy(raw, &value, sizeof(T));
  bytes.append(raw, sizeof(T));
}

// The same test on both sides: an odd field of our own must not make the receiver call our abort malformed.
bool valid_rank(std::int64_t rank) { return rank >= -1 && rank <= kMaxRank; }
bool valid_phase(std::int64_t phase) { return phase >= -1 && phase <= 1; }

class Reader {
 public:
  explicit Reader(const std::string& bytes) : bytes_(bytes) {}
  template <typename T>
  T get() {
    T value{};
    if (bytes_.size() - at_ < sizeof(T)) {
      ok_ = false;
      return value;
    }
    std::memcpy(&value, bytes_.data() + at_, sizeof(T));
    at_ += sizeof(T);
    return value;
  }
  std::string rest() const { return bytes_.substr(at_); }
  bool ok() const { return ok_; }

 private:
  const std::string& bytes_;
  std::size_t at_ = 0;
  bool ok_ = true;
};

// A text ends up in a Python str and on a terminal.
std::string plain_ascii(std::string text) {
  std::replace_if(text.begin(), text.end(), [](unsigned char c) { return (c < 0x20 && c != '\n') || c > 0x7e; }, '?');
  return text;
}

std::string frame_of(ControlType type, const std::string& payload) {
  std::string bytes;
  put(bytes, static_cast<std::uint8_t>(type));
  put(bytes, std::uint8_t{0});
  put(bytes, static_cast<std::uint16_t>(payload.size()));
  return bytes + payload;
}

}  // namespace

static_assert(kMaxControlPayload <= std::numeric_limits<std::uint16_t>::max());

std::string encode_hello(const ControlHello& hello) {
  std::string payload;
  put(payload, kControlMagic);
  put(payload, hello.version);
  put(payload, hello.rank);
  return frame_of(ControlType::kHello, payload + hello.job_key);
}

std::string encode_abort(const common::Status& status) {
  std::string payload;
  put(payload, static_cast<std::int32_t>(status.code));
  put(payload, static_cast<std::int32_t>(valid_rank(status.rank) ? status.rank : -1));
  put(payload, static_cast<std::int32_t>(valid_phase(status.phase) ? status.phase : -1));
  put(payload, std::max<std::int64_t>(status.epoch, -1));
  put(payload, std::max<std::int64_t>(status.chunk, -1));
  return frame_of(ControlType::kAbort, payload + status.message.substr(0, kMaxAbortText));
}

std::string encode_heartbeat(std::int32_t suspect) {
  std::string payload;
  put(payload, suspect);
  return frame_of(ControlType::kHeartbeat, payload);
}

std::string encode_goodbye(std::uint64_t progress, const std::string& reason) {
  std::string payload;
  put(payload, progress);
  return frame_of(ControlType::kGoodbye, payload + reason.substr(0, kMaxAbortText));
}

std::string encode_empty(ControlType type) { return frame_of(type, {}); }

FrameResult take_frame(std::string& buffer, ControlFrame& frame) {
  if (buffer.size() < kFrameHeaderBytes) return FrameResult::kPartial;
  std::uint8_t type = static_cast<std::uint8_t>(buffer[0]);
  std::uint16_t length;
  std::memcpy(&length, buffer.data() + 2, sizeof length);
  bool known = type >= static_cast<std::uint8_t>(ControlType::kHello) &&
               type <= static_cast<std::uint8_t>(ControlType::kFarewell);
  if (!known || buffer[1] != 0 || length > kMaxControlPayload) return FrameResult::kMalformed;
  if (buffer.size() < kFrameHeaderBytes + length) return FrameResult::kPartial;
  frame.type = static_cast<ControlType>(type);
  frame.payload = buffer.substr(kFrameHeaderBytes, length);
  buffer.erase(0, kFrameHeaderBytes + length);
  return FrameResult::kFrame;
}

bool decode_hello(const std::string& payload, ControlHello& hello) {
  Reader reader(payload);
  std::uint32_t magic = reader.get<std::uint32_t>();
  hello.version = reader.get<std::uint32_t>();
  hello.rank = reader.get<std::int32_t>();
  if (!reader.ok() || magic != kControlMagic) return false;
  hello.job_key = reader.rest();
  return hello.rank >= 0 && hello.rank <= kMaxRank && hello.job_key.size() <= kMaxJobKey;
}

bool decode_abort(const std::string& payload, common::Status& status) {
  Reader reader(payload);
  std::int32_t code = reader.get<std::int32_t>();
  status.rank = reader.get<std::int32_t>();
  status.phase = reader.get<std::int32_t>();
  status.epoch = reader.get<std::int64_t>();
  status.chunk = reader.get<std::int64_t>();
  if (!reader.ok()) return false;
  bool known = code > static_cast<std::int32_t>(common::StatusCode::kOk) &&
               code <= static_cast<std::int32_t>(common::StatusCode::kInternal);
  status.code = static_cast<common::StatusCode>(code);
  status.message = plain_ascii(reader.rest());
  return known && valid_rank(status.rank) && valid_phase(status.phase) && status.epoch >= -1 && status.chunk >= -1 &&
         status.message.size() <= kMaxAbortText;
}

bool decode_heartbeat(const std::string& payload, std::int32_t& suspect) {
  suspect = -1;
  if (payload.empty()) return true;
  Reader reader(payload);
  suspect = reader.get<std::int32_t>();
  return reader.ok() && reader.rest().empty() && valid_rank(suspect);
}

bool decode_goodbye(const std::string& payload, std::uint64_t& progress, std::string& reason) {
  Reader reader(payload);
  progress = reader.get<std::uint64_t>();
  if (!reader.ok()) return false;
  reason = plain_ascii(reader.rest());
  return reason.size() <= kMaxAbortText;
}

}  // namespace moe_efa::transport
