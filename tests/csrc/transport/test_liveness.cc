// Liveness between objects of one process: meeting, strangers, words on the wire, callers of several threads.
#include <doctest/doctest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <ctime>
#include <memory>
#include <stdexcept>

#include "liveness_testing.h"

using namespace moe_efa::transport;

namespace {

// Two ranks of this process.
struct Pair {
  std::unique_ptr<Liveness> a, b;
  explicit Pair(double heartbeat_timeout_s) {
    a = std::make_unique<Liveness>(config_of(0, heartbeat_timeout_s));
    b = std::make_unique<Liveness>(config_of(1, heartbeat_timeout_s));
    std::thread other([&] { b->connect({{0, "127.0.0.1", a->port()}}, kConnectTimeout); });
    a->connect({{1, "127.0.0.1", b->port()}}, kConnectTimeout);
    other.join();
  }
};

}  // namespace

TEST_CASE("a missing rank is named when the time is up") {
  Liveness first(config_of(0, 5.0));
  Liveness second(config_of(1, 5.0));
  std::uint16_t dead_port;
  {
    Liveness gone(config_of(2, 5.0));
    dead_port = gone.port();
  }
  Status other;
  std::thread thread([&] {
    try {
      second.connect({{0, "127.0.0.1", first.port()}}, kConnectTimeout);
      wait_for([&] { return second.failed(); });
      other = second.failure();
    } catch (const StatusError& error) {
      other = error.status();
    }
  });
  Status status;
  auto start = Clock::now();
  try {
    first.connect({{1, "127.0.0.1", second.port()}, {2, "127.0.0.1", dead_port}}, 1.0);
  } catch (const StatusError& error) {
    status = error.status();
  }
  thread.join();
  CHECK(seconds_since(start) < 3.0);
  CHECK(status.code == StatusCode::kPeerTimeout);
  CHECK(status.rank == 2);
  CHECK(status.message.find("refused") != std::string::npos);
  CHECK(other.rank == 2);  // the rank that did connect learns it, too
  CHECK(other.code == StatusCode::kPeerTimeout);
}

TEST_CASE("a rank that never dials us is named") {
  Liveness liveness(config_of(3, 5.0));
  Status status;
  try {
    liveness.connect({{1, "127.0.0.1", 1}}, 0.3);
  } catch (const StatusError& error) {
    status = error.status();
  }
  CHECK(status.code == StatusCode::kPeerTimeout);
  CHECK(status.rank == 1);
  CHECK(status.message.find("has not connected") != std::string::npos);
  CHECK(liveness.failed());
}

TEST_CASE("a wrong job key is turned away on both sides") {
  Liveness a(config_of(0, 5.0, "one")), b(config_of(1, 5.0, "two"));
  Status of_a, of_b;
  auto dial = [](Liveness& self, int rank, std::uint16_t port, Status& status) {
    try {
      self.connect({{rank, "127.0.0.1", port}}, 0.7);
    } catch (const StatusError& error) {
      status = error.status();
    }
  };
  std::thread thread([&] { dial(b, 0, a.port(), of_b); });
  dial(a, 1, b.port(), of_a);
  thread.join();
  CHECK(of_a.code == StatusCode::kConfig);
  CHECK(of_a.rank == 1);
  CHECK(of_b.code == StatusCode::kPeerTimeout);
  CHECK(of_b.rank == 0);
}

TEST_CASE("strangers do not disturb the meeting") {
  Liveness a(config_of(0, 5.0)), b(config_of(1, 5.0));
  std::vector<int> strangers;
  auto knock = [&](const std::string& words) {
    int fd = ::socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(b.port());
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    REQUIRE(::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
    (void)!::send(fd, words.data(), words.size(), MSG_NOSIGNAL);
    strangers.push_back(fd);
  };
  for (int i = 0; i < 80; ++i) knock("");  // says nothing
  knock("GET / HTTP/1.1\r\n\r\n");
  knock(encode_empty(ControlType::kGoodbye));
  knock(encode_hello({kControlVersion, 0, "wrong"}));
  knock(encode_hello({kControlVersion + 1, 0, "key"}));
  knock(encode_hello({kControlVersion, 7, "key"}));  // nobody's peer
  std::thread thread([&] { b.connect({{0, "127.0.0.1", a.port()}}, kConnectTimeout); });
  a.connect({{1, "127.0.0.1", b.port()}}, kConnectTimeout);
  thread.join();
  CHECK_FALSE(a.failed());
  CHECK_FALSE(b.failed());
  for (int fd : strangers) ::close(fd);
  a.goodbye();
  b.goodbye();
}

TEST_CASE("ranks may arrive late, in any order") {
  constexpr int kRanks = 6;
  std::vector<std::unique_ptr<Liveness>> ranks;
  for (int rank = 0; rank < kRanks; ++rank) ranks.push_back(std::make_unique<Liveness>(config_of(rank, 2.0)));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kRanks; ++rank) {
    threads.emplace_back([&, rank] {
      nap(0.5 * (rank * 5 % kRanks));  // the first waits for longer than the heartbeat timeout
      std::vector<Liveness::Peer> peers;
      for (int peer : others(rank, kRanks)) peers.push_back({peer, "localhost", ranks[peer]->port()});
      ranks[rank]->connect(peers, kConnectTimeout);
      nap(0.3);
      ranks[rank]->goodbye();
      CHECK(ranks[rank]->wait_goodbyes(10.0));
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (auto& rank : ranks) CHECK_MESSAGE(!rank->failed(), rank->failure().message);
}

TEST_CASE("a goodbye tells how far its rank came, and who is missing is named with the reason") {
  Pair pair(1.0);
  CHECK_FALSE(pair.a->any_goodbye());
  CHECK_FALSE(pair.a->goodbye_of(1).has_value());
  CHECK(pair.a->missing_goodbye().code == StatusCode::kPeerTimeout);
  CHECK(pair.a->missing_goodbye().rank == 1);
  pair.b->goodbye(1234567890123, "met a b\xfcg");
  pair.b->goodbye(5);  // the first counts
  REQUIRE(wait_for([&] { return pair.a->any_goodbye(); }));
  REQUIRE(wait_for([&] { return pair.a->goodbye_of(1).has_value(); }));
  CHECK(*pair.a->goodbye_of(1) == 1234567890123);
  CHECK(pair.a->reason_of(1) == "met a b?g");
  CHECK(pair.a->reason_of(7).empty());
  CHECK_FALSE(pair.a->goodbye_of(7).has_value());
  CHECK(pair.a->missing_goodbye().ok());
  pair.a.reset();  // dies without a goodbye, which is no failure to one who has left
  REQUIRE(wait_for([&] { return pair.b->missing_goodbye().code == StatusCode::kPeerLost; }));
  CHECK(pair.b->missing_goodbye().rank == 0);
  CHECK(pair.b->missing_goodbye().message == "rank 0 died (control connection closed)");
  CHECK_FALSE(pair.b->failed());
}

TEST_CASE("farewells arrive when both have said them") {
  Pair pair(5.0);
  pair.a->goodbye();
  pair.b->goodbye();
  CHECK(pair.a->wait_goodbyes(10.0));
  CHECK(pair.b->wait_goodbyes(10.0));
  pair.a->farewell();
  CHECK_FALSE(pair.a->wait_farewells(0.1));
  CHECK(pair.b->wait_farewells(10.0));
  pair.b->farewell();
  CHECK(pair.a->wait_farewells(10.0));
  CHECK_FALSE(pair.a->failed());
}

TEST_CASE("what poll throws ends connect, and the destructor is still quick") {
  auto start = Clock::now();
  {
    Liveness liveness(config_of(0, 5.0));
    int calls = 0;
    auto poll = [&] {
      liveness.failed();
      if (++calls == 3) throw std::runtime_error("interrupted");
    };
    CHECK_THROWS_AS(liveness.connect({{1, "127.0.0.1", 1}}, 20.0, poll), std::runtime_error);
    CHECK(calls == 3);
  }
  CHECK(seconds_since(start) < 3.0);
}

TEST_CASE("the first failure is sticky and a long message is cut, not lost") {
  Pair pair(5.0);
  std::string text(100000, 'x');
  pair.a->abort({StatusCode::kTransport, 5, 0, 1, 2, "bad \x01 byte " + text});
  REQUIRE(wait_for([&] { return pair.b->failed(); }));
  Status status = pair.b->failure();
  CHECK(status.code == StatusCode::kTransport);
  CHECK(status.rank == 5);
  CHECK(status.message.find("bad ? byte xxx") == 0);
  CHECK(status.message.size() == kMaxAbortText);
  pair.b->abort({StatusCode::kInternal, 1, -1, -1, -1, "late"});
  CHECK(pair.b->failure().rank == 5);
  CHECK(pair.a->failure().message.size() > 100000);
  CHECK_FALSE(pair.a->wait_goodbyes(10.0));  // at once
}

TEST_CASE("the destructor is quick, whatever the peer does") {
  auto start = Clock::now();
  for (int i = 0; i < 20; ++i) {
    Pair pair(5.0);
    if (i % 2 == 0) {
      pair.a->goodbye();
      pair.b->goodbye();
    }
    if (i % 5 == 0) pair.a->abort({StatusCode::kInternal, 0, -1, -1, -1, "x"});
  }
  CHECK(seconds_since(start) < 15.0);
}

TEST_CASE("without peers there is no thread and an abort is only recorded") {
  Liveness liveness(config_of(0, 5.0));
  liveness.connect({}, 0.0);
  CHECK_FALSE(liveness.failed());
  CHECK(liveness.wait_goodbyes(0.0));
  liveness.abort({StatusCode::kClosed, -1, -1, -1, -1, "closed"});
  CHECK(liveness.failure().code == StatusCode::kClosed);
  liveness.goodbye();
}

TEST_CASE("callers of every thread may ask, abort and leave at once") {
  for (int i = 0; i < 20; ++i) {
    Pair pair(1.0);
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        Liveness& self = t % 2 == 0 ? *pair.a : *pair.b;
        for (int k = 0; k < 200; ++k) {
          if (self.failed()) CHECK(self.failure().rank >= 100);
          (void)self.peer_said_goodbye(t % 2 == 0 ? 1 : 0);
        }
        self.abort({StatusCode::kInternal, 100 + t, -1, -1, -1, "x"});
        self.goodbye();
        self.wait_goodbyes(1.0);
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(pair.a->failed());
    CHECK(pair.b->failed());
  }
}

TEST_CASE("an idle connection costs next to no CPU") {
  Pair pair(20.0);
  timespec before{}, after{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
  nap(2.0);
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
  double cpu_s = static_cast<double>(after.tv_sec - before.tv_sec) + (after.tv_nsec - before.tv_nsec) * 1e-9;
  CHECK(cpu_s < 0.05);
  CHECK_FALSE(pair.a->failed());
  pair.a->goodbye();
  pair.b->goodbye();
}

TEST_CASE("a peer that floods or talks nonsense is a protocol error, and never blocks us") {
  Liveness liveness(config_of(1, 5.0));
  int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(liveness.port());
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  REQUIRE(::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
  std::string hello = encode_hello({kControlVersion, 0, "key"});
  for (char byte : hello) {  // partial frames
    REQUIRE(::send(fd, &byte, 1, MSG_NOSIGNAL) == 1);
    nap(0.001);
  }
  liveness.connect({{0, "", 0}}, kConnectTimeout);
  std::string beats;
  for (int i = 0; i < 10000; ++i) beats += encode_empty(ControlType::kHeartbeat);
  REQUIRE(::send(fd, beats.data(), beats.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(beats.size()));
  nap(0.1);
  CHECK_FALSE(liveness.failed());
  std::string abort = encode_abort({StatusCode::kInternal, 0, 0, 0, 0, "text"});
  abort[4] = 99;  // no such code
  (void)!::send(fd, abort.data(), abort.size(), MSG_NOSIGNAL);
  REQUIRE(wait_for([&] { return liveness.failed(); }));
  CHECK(liveness.failure().code == StatusCode::kProtocol);
  CHECK(liveness.failure().rank == 0);
  ::close(fd);
}

TEST_CASE("frames are bounded and checked") {
  std::string buffer = encode_hello({kControlVersion, 4, "k"}) + encode_empty(ControlType::kHeartbeat).substr(0, 3);
  ControlFrame frame;
  ControlHello hello;
  CHECK(take_frame(buffer, frame) == FrameResult::kFrame);
  CHECK(decode_hello(frame.payload, hello));
  CHECK(hello.rank == 4);
  CHECK(hello.job_key == "k");
  CHECK(take_frame(buffer, frame) == FrameResult::kPartial);
  std::string unknown("\x09\0\0\0", 4), reserved("\x02\1\0\0", 4), huge("\x02\0\xff\xff", 4);
  for (std::string bad : {unknown, reserved, huge}) {
    CHECK(take_frame(bad, frame) == FrameResult::kMalformed);
  }
  CHECK_FALSE(decode_hello("", hello));
  CHECK_FALSE(decode_hello("abcdefghijklmnop", hello));
  Status status;
  CHECK_FALSE(decode_abort("short", status));
  std::string odd = encode_abort({StatusCode::kInternal, -7, 9, -5, -6, "m"});
  CHECK(take_frame(odd, frame) == FrameResult::kFrame);
  CHECK(decode_abort(frame.payload, status));
  CHECK(status.rank == -1);
  CHECK(status.phase == -1);
}
