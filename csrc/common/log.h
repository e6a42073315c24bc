// One readable line on stderr, where the cause is known. Nothing here is on a hot path.
#pragma once

#include <cstdio>
#include <string>

namespace moe_efa::common {

inline void log_line(const char* level, int rank, const std::string& text) {
  std::fprintf(stderr, "moe_efa %s [rank %d]: %s\n", level, rank, text.c_str());
  std::fflush(stderr);
}

}  // namespace moe_efa::common
