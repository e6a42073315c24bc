// MOE_EFA_CHECK: an error of this process's own making becomes a StatusError with file and line.
#pragma once

#include <sstream>

#include "common/status.h"

#define MOE_EFA_CHECK(condition, ...)                                                                    \
  do {                                                                                                   \
    if (!(condition)) [[unlikely]] {                                                                     \
      std::ostringstream moe_efa_check_stream;                                                           \
      moe_efa_check_stream << __VA_ARGS__ << " [" #condition ", " << __FILE__ << ":" << __LINE__ << "]"; \
      throw ::moe_efa::common::StatusError(                                                              \
          {::moe_efa::common::StatusCode::kInternal, -1, -1, -1, -1, moe_efa_check_stream.str()});       \
    }                                                                                                    \
  } while (0)
