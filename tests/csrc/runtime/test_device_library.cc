// What becomes of a device library that opens, and of files that are none. The library is device_library_stand_in.cc,
// built beside this program.
#include <doctest/doctest.h>
#include <unistd.h>

#include <string>

#include "common/status.h"
#include "runtime/device_library.h"

namespace {

using namespace moe_efa;

std::string stand_in() {
  char path[4096];
  ssize_t length = ::readlink("/proc/self/exe", path, sizeof(path));
  REQUIRE(length > 0);
  std::string folder(path, static_cast<std::size_t>(length));
  return folder.substr(0, folder.rfind('/')) + "/device_library_stand_in.so";
}

std::string refusal(const std::string& path, int index) {
  try {
    runtime::open_device(path, index);
  } catch (const common::StatusError& error) {
    CHECK(error.status().code == common::StatusCode::kConfig);
    return error.what();
  }
  return "";
}

bool says(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("a device outlives everything but its holders, and its errors arrive as they were thrown") {
  std::shared_ptr<kernels::Device> device = runtime::open_device(stand_in(), 0);
  CHECK(device->facts().name == "stand-in");
  std::shared_ptr<kernels::Device> second = runtime::open_device(stand_in(), 0);
  CHECK(second != device);
  device.reset();
  try {
    second->flush_writes();
    FAIL("no error");
  } catch (const common::StatusError& error) {
    CHECK(error.status().code == common::StatusCode::kInternal);
    CHECK(error.status().rank == 3);
    CHECK(error.status().epoch == 7);
    CHECK(std::string(error.what()) == "stand-in: no such call");
  }
}

TEST_CASE("what cannot be opened is refused with the path and the reason") {
  CHECK(says(refusal("", 0), "'': the path of a library is needed"));
  CHECK(says(refusal("libc.so.6", 0), "'libc.so.6': the path of a library is needed"));
  std::string absent = refusal("/nowhere/libmoe_efa_cuda.so", 0);
  CHECK(says(absent, "cannot open a device of /nowhere/libmoe_efa_cuda.so: "));
  CHECK(says(absent, "No such file"));
  CHECK(says(refusal("/proc/self/exe", 0), "/proc/self/exe: "));
  CHECK(says(refusal(stand_in(), 1), "stand_in.so: there is one device"));
  CHECK(says(refusal(stand_in(), 2), "stand_in.so: it gives no reason"));
}
