#include "kernels/cuda/fault.h"

#include <sstream>

#include "common/status.h"
#include "proto/topology.h"

namespace moe_efa::kernels::cuda {

namespace {

using common::StatusCode;

struct Text {
  StatusCode code;
  const char* what;
};

Text text_of(What what) {
  switch (what) {
    case What::kNothing:
      return {StatusCode::kInternal, "nothing"};
    case What::kGrid:
      return {StatusCode::kInternal, "a block of the grid did not come in time"};
    case What::kCredit:
      return {StatusCode::kPeerTimeout, "no credit in time"};
    case What::kChunk:
      return {StatusCode::kPeerTimeout, "no chunk in time"};
    case What::kPublished:
      return {StatusCode::kPeerTimeout, "no published chunk in time"};
    case What::kConsumed:
      return {StatusCode::kPeerTimeout, "no published chunk was consumed in time"};
    case What::kGate:
      return {StatusCode::kPeerTimeout, "the host did not let a captured call go on in time"};
    case What::kHeader:
      return {StatusCode::kProtocol, header_text(HeaderPart::kIdentity)};
    case What::kPlan:
      return {StatusCode::kProtocol, header_text(HeaderPart::kPlan)};
    case What::kRows:
      return {StatusCode::kProtocol, header_text(HeaderPart::kRows)};
    case What::kDType:
      return {StatusCode::kProtocol, header_text(HeaderPart::kDType)};
    case What::kRowEntries:
      return {StatusCode::kProtocol, header_text(HeaderPart::kEntries)};
    case What::kEntry:
      return {StatusCode::kProtocol, "expert or top-k position out of range"};
    case What::kIndex:
      return {StatusCode::kProtocol, "index beyond the announced count"};
    case What::kLeftOver:
      return {StatusCode::kProtocol, "entries left over"};
    case What::kPulls:
      return {StatusCode::kProtocol, "more rows than were announced"};
    case What::kSize:
      return {StatusCode::kProtocol, header_text(HeaderPart::kSize)};
    case What::kExpertId:
      return {StatusCode::kInvalid, "expert id out of range"};
  }
  return {StatusCode::kInternal, "unknown fault"};
}

}  // namespace

void raise(const Fault& fault) {
  if (fault.set == 0) return;
  Text text = text_of(fault.what);
  auto phase = static_cast<proto::Phase>(fault.phase);
  std::ostringstream message;
  if (fault.what == What::kExpertId) {
    message << "topk_idx[" << fault.chunk << "] (of all slots) is " << static_cast<std::int64_t>(fault.got)
            << ", outside [-1, " << fault.expected << ")";
    throw common::StatusError({text.code, -1, -1, -1, -1, message.str()});
  }
  if (fault.what == What::kGate) {
    message << proto::phase_name(phase) << " of rank " << fault.rank << ", replay " << fault.chunk << ": " << text.what;
    throw common::StatusError(
        {text.code, static_cast<int>(fault.rank), static_cast<int>(fault.phase), -1, -1, message.str()});
  }
  message << "chunk " << fault.chunk << " of rank " << fault.peer << " in " << proto::phase_name(phase) << ", epoch "
          << fault.epoch << ": " << text.what << " (rank " << fault.rank << " expected " << fault.expected << ", got "
          << fault.got << ")";
  throw common::StatusError({text.code, static_cast<int>(fault.peer), static_cast<int>(fault.phase),
                             static_cast<std::int64_t>(fault.epoch), static_cast<std::int64_t>(fault.chunk),
                             message.str()});
}

}  // namespace moe_efa::kernels::cuda
