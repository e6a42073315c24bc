// How long the loops of a Group wait.
#pragma once

namespace moe_efa::runtime {

inline constexpr double kVerdictS = 0.5;  // after an error of a rail: for the failure detector to say what happened
inline constexpr long kRailsPauseUs = 50, kMatesPauseUs = 10'000;  // the longest sleep of a waiting call

}  // namespace moe_efa::runtime
