#include "runtime/futex_doorbell.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>

namespace moe_efa::runtime {

FutexDoorbell::Words* FutexDoorbell::words(std::uint32_t local_rank) const {
  return reinterpret_cast<Words*>(view_.region(local_rank) + view_.layout.doorbell());
}

void FutexDoorbell::ring(std::uint32_t local_rank) {
  Words* bell = words(local_rank);
  // Either this addition comes before the sleeper's announcement, and the kernel finds another count than the sleeper
  // saw; or the sleeper is seen here. All four accesses are in one total order.
  __atomic_fetch_add(&bell->rings, 1, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&bell->sleepers, __ATOMIC_SEQ_CST) == 0) return;
  syscall(SYS_futex, &bell->rings, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void FutexDoorbell::ring_all() {
  for (std::uint32_t local = 0; local < view_.topology.node_size; ++local) ring(local);
}

std::uint32_t FutexDoorbell::rings() const {
  return __atomic_load_n(&words(view_.topology.local_rank())->rings, __ATOMIC_SEQ_CST);
}

void FutexDoorbell::sleep(std::uint32_t seen, long timeout_us) {
  Words* bell = words(view_.topology.local_rank());
  timespec timeout{timeout_us / 1'000'000, timeout_us % 1'000'000 * 1000};
  __atomic_fetch_add(&bell->sleepers, 1, __ATOMIC_SEQ_CST);
  syscall(SYS_futex, &bell->rings, FUTEX_WAIT, seen, &timeout, nullptr, 0);
  __atomic_fetch_sub(&bell->sleepers, 1, __ATOMIC_SEQ_CST);
}

}  // namespace moe_efa::runtime
