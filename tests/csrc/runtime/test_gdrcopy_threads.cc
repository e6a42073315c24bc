// Whole groups whose flags go through a window onto device memory, under a thread sanitizer: callers, drivers, kernels
// and the thread that plays the bus.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "device_rounds.h"
#include "gdrcopy_testing.h"

using namespace moe_efa;
using namespace moe_efa::testing;

TEST_CASE("flags go through a window beside all that goes on") {
  Run cpu = run_group(4, 2, "shm", "", false);
  for (bool reorder : {false, true}) {
    CAPTURE(reorder);
    Run run = run_group(4, 2, "shm", "device", reorder, std::vector<std::string>(4, stand_in().path));
    CHECK_MESSAGE(run.failure.empty(), run.failure);
    CHECK(run.flags == std::vector<std::string>(4, "device"));
    CHECK(run.results == cpu.results);
  }
  CHECK(stand_in().stores() > 0);
  CHECK(stand_in().live() == 0);
}
