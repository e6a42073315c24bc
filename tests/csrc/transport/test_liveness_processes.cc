// Liveness between processes that are killed, stopped and woken. Forks: no thread of the parent is alive then.
#include <doctest/doctest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "liveness_testing.h"

using namespace moe_efa::transport;

namespace {

constexpr int kMaxRanks = 16;

// Memory that forked ranks share: ports, progress, and what each rank saw.
struct Board {
  std::atomic<int> port[kMaxRanks];
  std::atomic<int> connected;
  std::atomic<int> go;
  std::atomic<int> saw[kMaxRanks];  // 1: the texts below are valid
  struct Seen {
    int code, rank, phase;
    std::int64_t epoch, chunk;
    double seconds;
    char message[256];
  } seen[kMaxRanks];
};

class World {
 public:
  World() {
    void* memory = ::mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    board_ = new (memory) Board{};
  }
  ~World() {
    for (pid_t pid : pids_) {
      if (pid > 0) ::kill(pid, SIGKILL);
      if (pid > 0) ::waitpid(pid, nullptr, 0);
    }
    ::munmap(board_, sizeof(Board));
  }
  Board& board() { return *board_; }
  void spawn(const std::function<int(Board&)>& body) {
    pid_t pid = ::fork();
    if (pid == 0) {
      int rc = 99;
      try {
        rc = body(*board_);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "child: %s\n", error.what());
      }
      ::_exit(rc);
    }
    pids_.push_back(pid);
  }
  pid_t pid(std::size_t index) const { return pids_[index]; }
  int join(std::size_t index) {
    int status = 0;
    pid_t pid = pids_[index];
    if (!wait_for([&] { return ::waitpid(pid, &status, WNOHANG) == pid; }, 30.0)) return -1;
    pids_[index] = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 100 + WTERMSIG(status);
  }

 private:
  Board* board_;
  std::vector<pid_t> pids_;
};

// Publishes the own port, waits for the others', connects.
void join_world(Board& board, Liveness& liveness, int rank, const std::vector<int>& peers) {
  board.port[rank] = liveness.port();
  std::vector<Liveness::Peer> list;
  for (int peer : peers) {
    if (!wait_for([&] { return board.port[peer] != 0; })) throw std::runtime_error("no port");
    list.push_back({peer, "127.0.0.1", static_cast<std::uint16_t>(board.port[peer].load())});
  }
  liveness.connect(list, kConnectTimeout);
  ++board.connected;
}
void report(Board& board, int rank, const Status& status, double seconds) {
  Board::Seen& seen = board.seen[rank];
  seen.code = static_cast<int>(status.code);
  seen.rank = status.rank;
  seen.phase = status.phase;
  seen.epoch = status.epoch;
  seen.chunk = status.chunk;
  seen.seconds = seconds;
  std::strncpy(seen.message, status.message.c_str(), sizeof seen.message - 1);
  board.saw[rank] = 1;
}
// Connects, waits for a failure and reports it; 0 when one came.
int watch(Board& board, int rank, const std::vector<int>& peers, double heartbeat_timeout_s) {
  Liveness liveness(config_of(rank, heartbeat_timeout_s));
  join_world(board, liveness, rank, peers);
  wait_for([&] { return board.go != 0; }, 20.0);
  auto start = Clock::now();
  if (!wait_for([&] { return liveness.failed(); }, 15.0)) return 1;
  report(board, rank, liveness.failure(), seconds_since(start));
  return 0;
}

}  // namespace

TEST_CASE("a killed rank is named by every peer within a moment") {
  World world;
  for (int rank = 0; rank < 3; ++rank) {
    world.spawn([rank](Board& board) { return watch(board, rank, others(rank, 3), 10.0); });
  }
  REQUIRE(wait_for([&] { return world.board().connected == 3; }));
  world.board().go = 1;
  ::kill(world.pid(1), SIGKILL);
  CHECK(world.join(1) == 100 + SIGKILL);
  for (int rank : {0, 2}) {
    CHECK(world.join(rank) == 0);
    const Board::Seen& seen = world.board().seen[rank];
    CHECK(seen.code == static_cast<int>(StatusCode::kPeerLost));
    CHECK(seen.rank == 1);
    CHECK(seen.seconds < 2.0);
    CHECK(std::string(seen.message).find("rank 1 died (control connection") == 0);
  }
}

TEST_CASE("a stopped rank is silent, is told so when it wakes, and blames nobody") {
  World world;
  for (int rank = 0; rank < 2; ++rank) {
    world.spawn([rank](Board& board) { return watch(board, rank, others(rank, 2), 1.5); });
  }
  REQUIRE(wait_for([&] { return world.board().connected == 2; }));
  world.board().go = 1;
  ::kill(world.pid(1), SIGSTOP);
  REQUIRE(wait_for([&] { return world.board().saw[0] == 1; }));
  const Board::Seen& seen = world.board().seen[0];
  CHECK(seen.code == static_cast<int>(StatusCode::kPeerLost));
  CHECK(seen.rank == 1);
  CHECK(seen.seconds > 1.0);
  CHECK(seen.seconds < 8.0);
  CHECK(std::string(seen.message).find("rank 1 silent for ") == 0);
  ::kill(world.pid(1), SIGCONT);
  CHECK(world.join(0) == 0);
  CHECK(world.join(1) == 0);
  CHECK(world.board().seen[1].rank == 1);
  CHECK(std::string(world.board().seen[1].message) == seen.message);
}

TEST_CASE("a pause of everybody, or one shorter than the timeout, is no failure") {
  World world;
  for (int rank = 0; rank < 3; ++rank) {
    world.spawn([rank](Board& board) {
      Liveness liveness(config_of(rank, 2.0));
      join_world(board, liveness, rank, others(rank, 3));
      wait_for([&] { return board.go != 0; }, 20.0);
      liveness.goodbye();
      liveness.wait_goodbyes(10.0);
      if (liveness.failed()) std::fprintf(stderr, "rank %d: %s\n", rank, liveness.failure().message.c_str());
      return liveness.failed() ? 1 : 0;
    });
  }
  REQUIRE(wait_for([&] { return world.board().connected == 3; }));
  ::kill(world.pid(2), SIGSTOP);
  nap(0.8);
  ::kill(world.pid(2), SIGCONT);
  nap(0.5);
  for (int rank = 0; rank < 3; ++rank) ::kill(world.pid(rank), SIGSTOP);
  nap(4.0);
  for (int rank = 0; rank < 3; ++rank) {  // a staggered awakening: the first must not blame the last
    ::kill(world.pid(rank), SIGCONT);
    nap(0.5);
  }
  nap(0.5);
  world.board().go = 1;
  for (int rank = 0; rank < 3; ++rank) CHECK(world.join(rank) == 0);
}

TEST_CASE("goodbye makes a later end normal") {
  World world;
  for (int rank = 0; rank < 3; ++rank) {
    world.spawn([rank](Board& board) {
      Liveness liveness(config_of(rank, 1.5));
      join_world(board, liveness, rank, others(rank, 3));
      if (rank == 2) {  // leaves early, without waiting
        liveness.goodbye();
        return 0;
      }
      if (!wait_for([&] { return liveness.peer_said_goodbye(2); })) return 1;
      nap(2.5);  // longer than the timeout: neither its end nor its silence matters
      if (liveness.failed() || liveness.peer_said_goodbye(1 - rank)) return 2;
      ++board.go;
      wait_for([&] { return board.go == 2; });
      liveness.goodbye();
      if (!liveness.wait_goodbyes(10.0)) return 3;
      return liveness.failed() ? 4 : 0;
    });
  }
  for (int rank = 0; rank < 3; ++rank) CHECK(world.join(rank) == 0);
}

TEST_CASE("an abort reaches a rank of a 2x2 grid that has no connection to its origin") {
  World world;
  for (int rank = 0; rank < 4; ++rank) {
    std::vector<int> peers = {rank ^ 1, rank ^ 2};  // row and column
    world.spawn([rank, peers](Board& board) {
      if (rank != 3) return watch(board, rank, peers, 10.0);
      Liveness liveness(config_of(rank, 10.0));
      join_world(board, liveness, rank, peers);
      wait_for([&] { return board.go != 0; });
      liveness.abort({StatusCode::kProtocol, 2, 1, 77, 123456789012, "chunk of epoch 76"});
      liveness.abort({StatusCode::kInternal, 0, -1, -1, -1, "a later one"});
      ::_exit(0);  // at once, without the destructor: the abort is with the kernel already
    });
  }
  REQUIRE(wait_for([&] { return world.board().connected == 4; }));
  world.board().go = 1;
  CHECK(world.join(3) == 0);
  for (int rank : {0, 1, 2}) {
    CHECK(world.join(rank) == 0);
    const Board::Seen& seen = world.board().seen[rank];
    CHECK(seen.code == static_cast<int>(StatusCode::kProtocol));
    CHECK(seen.rank == 2);
    CHECK(seen.phase == 1);
    CHECK(seen.epoch == 77);
    CHECK(seen.chunk == 123456789012);
    CHECK(std::string(seen.message) == "chunk of epoch 76");
  }
}

TEST_CASE("a killed rank of a 3x3 grid is named by every rank") {
  World world;
  for (int rank = 0; rank < 9; ++rank) {
    std::vector<int> peers;
    for (int other : others(rank, 9)) {
      if (other / 3 == rank / 3 || other % 3 == rank % 3) peers.push_back(other);
    }
    world.spawn([rank, peers](Board& board) { return watch(board, rank, peers, 10.0); });
  }
  REQUIRE(wait_for([&] { return world.board().connected == 9; }));
  world.board().go = 1;
  ::kill(world.pid(4), SIGKILL);
  for (int rank : others(4, 9)) {
    CHECK(world.join(rank) == 0);
    CHECK(world.board().seen[rank].rank == 4);
    CHECK(world.board().seen[rank].code == static_cast<int>(StatusCode::kPeerLost));
  }
}

TEST_CASE("a rank that exits without goodbye has died") {
  World world;
  world.spawn([](Board& board) { return watch(board, 0, {1}, 10.0); });
  world.spawn([](Board& board) {
    Liveness liveness(config_of(1, 10.0));
    join_world(board, liveness, 1, {0});
    wait_for([&] { return board.go != 0; });
    return 0;
  });
  REQUIRE(wait_for([&] { return world.board().connected == 2; }));
  world.board().go = 1;
  CHECK(world.join(0) == 0);
  CHECK(world.board().seen[0].rank == 1);
}

TEST_CASE("a silent rank is suspected before it is lost, also by ranks that have no connection to it") {
  World world;
  for (int rank = 0; rank < 4; ++rank) {  // a 2x2 grid; rank 1 stops, 2 has no connection to it
    std::vector<int> peers = {rank ^ 1, rank ^ 2};
    world.spawn([rank, peers](Board& board) {
      Liveness liveness(config_of(rank, 4.0));
      join_world(board, liveness, rank, peers);
      if (liveness.suspect() != -1) return 1;
      if (rank == 1) wait_for([] { return false; }, 20.0);
      if (!wait_for([&] { return liveness.suspect() == 1; })) return 2;
      if (liveness.failed()) return 3;
      ++board.go;
      wait_for([&] { return board.go == 3; });
      return 0;
    });
  }
  REQUIRE(wait_for([&] { return world.board().connected == 4; }));
  nap(0.3);
  ::kill(world.pid(1), SIGSTOP);
  for (int rank : {0, 2, 3}) CHECK(world.join(rank) == 0);
}
