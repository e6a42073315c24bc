// The bytes of a control connection: length-prefixed frames, each bounded and checked on receipt. Knows no sockets.
// Both ends are little-endian (x86-64, arm64).
#pragma once

#include <cstdint>
#include <string>

#include "common/status.h"

namespace moe_efa::transport {

enum class ControlType : std::uint8_t { kHello = 1, kHeartbeat = 2, kAbort = 3, kGoodbye = 4, kFarewell = 5 };

inline constexpr std::uint32_t kControlMagic = 0x4c45'4f4d;  // "MOEL"
inline constexpr std::uint32_t kControlVersion = 2;
inline constexpr std::size_t kMaxControlPayload = 4096;
inline constexpr std::size_t kMaxAbortText = 2048;  // and of a goodbye's reason
inline constexpr std::size_t kMaxJobKey = 1024;

struct ControlFrame {
  ControlType type = ControlType::kHeartbeat;
  std::string payload;
};

struct ControlHello {
  std::uint32_t version = kControlVersion;
  std::int32_t rank = -1;
  std::string job_key;
};

enum class FrameResult { kFrame, kPartial, kMalformed };

std::string encode_hello(const ControlHello& hello);
std::string encode_abort(const common::Status& status);  // the text is cut at kMaxAbortText
std::string encode_heartbeat(std::int32_t suspect);      // a rank that the sender has not heard lately, or -1
std::string encode_goodbye(std::uint64_t progress, const std::string& reason);  // cut at kMaxAbortText
std::string encode_empty(ControlType type);  // kFarewell; kHeartbeat without a suspect

// Moves the first frame out of `buffer`.
FrameResult take_frame(std::string& buffer, ControlFrame& frame);
bool decode_hello(const std::string& payload, ControlHello& hello);
bool decode_abort(const std::string& payload, common::Status& status);
bool decode_heartbeat(const std::string& payload, std::int32_t& suspect);
bool decode_goodbye(const std::string& payload, std::uint64_t& progress, std::string& reason);

}  // namespace moe_efa::transport
