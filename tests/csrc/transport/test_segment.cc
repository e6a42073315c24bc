// Segment: what is made is mapped by others, and what is left behind is swept.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <functional>
#include <set>
#include <string>
#include <thread>
#include <utility>

#include "common/status.h"
#include "transport/segment.h"

using namespace moe_efa::transport;
using moe_efa::common::StatusCode;
using moe_efa::common::StatusError;

namespace {

std::string unique_name(const std::string& role) { return segment_name("test" + std::to_string(::getpid()), 0, role); }
bool exists(const std::string& name) {
  struct stat info{};
  return ::stat(("/dev/shm/" + name).c_str(), &info) == 0;
}
// Exit status of a child that runs `body`; signals count as 100 + number.
int in_child(const std::function<int()>& body) {
  pid_t pid = ::fork();
  if (pid == 0) ::_exit(body());
  int status = 0;
  ::waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 100 + WTERMSIG(status);
}
// A child that runs until it is killed, whatever becomes of the test.
class Background {
 public:
  explicit Background(const std::function<void()>& body) : pid_(::fork()) {
    if (pid_ == 0) {
      body();
      ::_exit(0);
    }
  }
  ~Background() { kill(); }
  Background(const Background&) = delete;
  Background& operator=(const Background&) = delete;
  void kill() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

 private:
  pid_t pid_;
};
std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const StatusError& error) {
    CHECK(error.status().code == StatusCode::kConfig);
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("what the owner writes another process reads") {
  std::string name = unique_name("share");
  Segment owner = Segment::create(name, 10000);
  CHECK(owner.size() == 10000);
  for (std::uint64_t i = 0; i < owner.size(); ++i) REQUIRE(owner.data()[i] == std::byte{0});
  std::memcpy(owner.data() + 9000, "hello", 6);
  CHECK(in_child([&] {
          Segment other = Segment::open(name, 10000);
          bool same = std::strcmp(reinterpret_cast<char*>(other.data() + 9000), "hello") == 0;
          std::memcpy(other.data(), "world", 6);
          return same ? 0 : 1;
        }) == 0);
  CHECK(std::strcmp(reinterpret_cast<char*>(owner.data()), "world") == 0);
  struct stat info{};
  ::stat(("/dev/shm/" + name).c_str(), &info);
  CHECK((info.st_mode & 0777) == 0600);
  CHECK(info.st_blocks * 512 >= 10000);  // no holes
}

TEST_CASE("unlink is idempotent, leaves mappings, and the destructor removes the name") {
  std::string name = unique_name("unlink");
  {
    Segment owner = Segment::create(name, 4096);
    Segment mate = Segment::open(name, 4096);
    mate.unlink();  // not the owner's: nothing
    CHECK(exists(name));
    owner.unlink();
    owner.unlink();
    CHECK_FALSE(exists(name));
    owner.data()[1] = std::byte{7};
    CHECK(mate.data()[1] == std::byte{7});
    Segment second = Segment::create(name, 4096);
    owner.unlink();  // must not remove the new one
    CHECK(exists(name));
  }
  CHECK_FALSE(exists(name));
}

TEST_CASE("a segment moves") {
  std::string name = unique_name("move");
  Segment first = Segment::create(name, 4096);
  std::byte* data = first.data();
  Segment second = std::move(first);
  CHECK(second.data() == data);
  CHECK_FALSE(first.valid());
  Segment third = Segment::create(unique_name("move2"), 4096);
  third = std::move(second);
  CHECK(third.data() == data);
  CHECK_FALSE(exists(unique_name("move2")));
  CHECK(exists(name));
}

TEST_CASE("a wrong size and a missing segment are configuration errors") {
  Segment owner = Segment::create(unique_name("size"), 4096);
  CHECK(error_of([&] { Segment::open(owner.name(), 8192); }).find("4096") != std::string::npos);
  CHECK(error_of([&] { Segment::open(unique_name("nowhere"), 4096); }).find("--ipc=host") != std::string::npos);
}

TEST_CASE("the name of a live owner is refused, in this process and in another") {
  Segment owner = Segment::create(unique_name("live"), 4096);
  CHECK(error_of([&] { Segment::create(owner.name(), 4096); }).find("live process") != std::string::npos);
  CHECK(in_child([&] {
          try {
            Segment::create(owner.name(), 4096);
          } catch (const StatusError&) {
            return 0;
          }
          return 1;
        }) == 0);
  CHECK(exists(owner.name()));
}

TEST_CASE("a killed owner's segment is swept, a live one's is not") {
  std::string dead = unique_name("dead");
  Segment alive = Segment::create(unique_name("alive"), 4096);
  int rc = in_child([&] {
    Segment segment = Segment::create(dead, 4096);
    ::kill(::getpid(), SIGKILL);
    return 0;
  });
  CHECK(rc == 100 + SIGKILL);
  // Another process of this host may sweep at any moment, so how many we remove proves nothing.
  sweep_stale_segments();
  CHECK_FALSE(exists(dead));
  CHECK(exists(alive.name()));
}

TEST_CASE("a dead owner's name can be taken, and a mate's mapping of it does not count as an owner") {
  std::string name = unique_name("reuse");
  int pipe_fds[2];
  REQUIRE(::pipe(pipe_fds) == 0);
  Background first([&] {
    Segment segment = Segment::create(name, 4096);
    segment.data()[0] = std::byte{1};
    (void)!::write(pipe_fds[1], "x", 1);
    ::pause();
  });
  char byte;
  REQUIRE(::read(pipe_fds[0], &byte, 1) == 1);
  Segment mate = Segment::open(name, 4096);
  first.kill();
  Segment owner = Segment::create(name, 4096);
  CHECK(owner.data()[0] == std::byte{0});
  CHECK(mate.data()[0] == std::byte{1});
  ::close(pipe_fds[0]);
  ::close(pipe_fds[1]);
}

TEST_CASE("a forked child neither removes nor frees what its parent owns") {
  Segment owner = Segment::create(unique_name("fork"), 4096);
  CHECK(in_child([&] {
          Segment mine = std::move(owner);
          mine.unlink();
          return 0;
        }) == 0);
  CHECK(exists(owner.name()));
  CHECK(in_child([&] {
          sweep_stale_segments();
          return 0;
        }) == 0);
  CHECK(exists(owner.name()));
}

TEST_CASE("too little room is an error with numbers, and leaves nothing behind") {
  struct statvfs space{};
  ::statvfs("/dev/shm", &space);
  std::uint64_t want = space.f_bavail * space.f_frsize + (1ull << 30);
  std::string name = unique_name("huge");
  std::string text = error_of([&] { Segment::create(name, want); });
  CHECK(text.find(std::to_string(want)) != std::string::npos);
  CHECK(text.find("--shm-size") != std::string::npos);
  CHECK(text.find("memory_budget_bytes") != std::string::npos);
  CHECK_FALSE(exists(name));
}

TEST_CASE("a failure halfway through allocation leaves nothing behind") {
  std::string name = unique_name("limit");
  CHECK(in_child([&] {
          ::signal(SIGXFSZ, SIG_IGN);
          rlimit limit{100 << 20, 100 << 20};  // between the first and the second step
          ::setrlimit(RLIMIT_FSIZE, &limit);
          try {
            Segment::create(name, 200 << 20);
          } catch (const StatusError& error) {
            return error.status().code == StatusCode::kConfig && !exists(name) ? 0 : 2;
          }
          return 1;
        }) == 0);
}

TEST_CASE("a small /dev/shm is an error and not a SIGBUS") {
  int rc = in_child([] {
    if (::unshare(CLONE_NEWNS) != 0 && ::unshare(CLONE_NEWNS | CLONE_NEWUSER) != 0) return 77;
    if (::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) return 77;
    if (::mount("tmpfs", "/dev/shm", "tmpfs", 0, "size=1m") != 0) return 77;
    Segment fits = Segment::create(segment_name("small", 0), 900 << 10);
    std::memset(fits.data(), 1, fits.size());
    try {
      Segment::create(segment_name("small", 1), 900 << 10);
    } catch (const StatusError&) {
      return exists(segment_name("small", 1)) ? 2 : 0;
    }
    return 1;
  });
  if (rc == 77) {
    MESSAGE("skipped: no right to mount");
  } else {
    CHECK(rc == 0);
  }
}

TEST_CASE("who loses a race for the last room gets an error, not a SIGBUS later") {
  int rc = in_child([] {
    if (::unshare(CLONE_NEWNS) != 0 && ::unshare(CLONE_NEWNS | CLONE_NEWUSER) != 0) return 77;
    if (::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) return 77;
    if (::mount("tmpfs", "/dev/shm", "tmpfs", 0, "size=64m") != 0) return 77;
    auto compete = [](int rank) {
      for (int i = 0; i < 60; ++i) {
        try {
          Segment segment = Segment::create(segment_name("last", rank), 36 << 20);
          std::memset(segment.data(), 1, segment.size());
        } catch (const StatusError&) {
        }
      }
    };
    pid_t pid = ::fork();
    compete(pid == 0 ? 1 : 0);
    if (pid == 0) ::_exit(0);
    int status = 0;
    ::waitpid(pid, &status, 0);
    return WIFEXITED(status) ? 0 : 1;
  });
  if (rc == 77) {
    MESSAGE("skipped: no right to mount");
  } else {
    CHECK(rc == 0);
  }
}

TEST_CASE("sweepers at work never take a segment away from its creator") {
  auto sweep = [] {
    while (true) sweep_stale_segments();
  };
  Background sweeper_a(sweep), sweeper_b(sweep), sweeper_c(sweep);
  std::string name = unique_name("race");
  bool all_there = true;
  for (int i = 0; i < 2000 && all_there; ++i) {
    Segment owner = Segment::create(name, 4096);
    owner.data()[0] = std::byte{static_cast<unsigned char>(i)};
    Segment mate = Segment::open(name, 4096);
    all_there = exists(name) && mate.data()[0] == owner.data()[0];
  }
  CHECK(all_there);
  CHECK_FALSE(exists(name));
}

TEST_CASE("names are plain file names and differ by key, rank and role") {
  CHECK(segment_name("ab-1", 3) == "moe_efa-ab-1-3-region");
  std::string odd = segment_name("a/b\n../c", 3);
  CHECK(odd.find('/') == std::string::npos);
  CHECK(odd.find('\n') == std::string::npos);
  std::set<std::string> names{odd,
                              segment_name("a/b", 3),
                              segment_name("", 3),
                              segment_name(std::string(300, 'k'), 3),
                              segment_name("ab", 3),
                              segment_name("ab", 4),
                              segment_name("ab", 3, "inbox")};
  CHECK(names.size() == 7);
  for (const std::string& name : names) CHECK(name.size() < 128);
}
