// ExportedMemory: what one process encodes another decodes, and anything else is refused; no two processes are one.
#include "kernels/cuda/exported_memory.h"

#include <doctest/doctest.h>
#include <sys/wait.h>

using moe_efa::common::StatusError;
using moe_efa::kernels::cuda::ExportedMemory;

TEST_CASE("what was encoded is decoded") {
  ExportedMemory memory;
  memory.process = ExportedMemory::this_process();
  memory.address = 0x7f00'0000'1200;
  memory.offset = 0x1200;
  for (int i = 0; i < 64; ++i) memory.handle[i] = static_cast<std::uint8_t>(255 - i);
  ExportedMemory copy = ExportedMemory::decode(memory.encode());
  CHECK(copy.process == ExportedMemory::this_process());
  CHECK(copy.address == memory.address);
  CHECK(copy.offset == memory.offset);
  CHECK(std::memcmp(copy.handle, memory.handle, 64) == 0);
}

TEST_CASE("anything else is refused") {
  std::string encoded = ExportedMemory{}.encode();
  CHECK_THROWS_AS(ExportedMemory::decode(""), StatusError);
  CHECK_THROWS_AS(ExportedMemory::decode(encoded + "x"), StatusError);
  CHECK_THROWS_AS(ExportedMemory::decode(encoded.substr(1)), StatusError);
  encoded[0] ^= 1;
  CHECK_THROWS_AS(ExportedMemory::decode(encoded), StatusError);
}

TEST_CASE("a child is another process than its parent") {
  std::uint64_t parent = ExportedMemory::this_process();
  pid_t child = ::fork();
  if (child == 0) ::_exit(ExportedMemory::this_process() != parent ? 0 : 1);
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(status == 0);
}
