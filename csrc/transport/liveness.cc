// What a caller does: construct, connect, ask, abort, say goodbye. The thread's part is in liveness_thread.cc.
#include "transport/liveness.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <set>

#include "common/check.h"

namespace moe_efa::transport {
namespace {

constexpr std::chrono::milliseconds kFlushDeadline{200};
constexpr double kMaxSeconds = 1e8;
constexpr std::size_t kMaxNamed = 8;
constexpr std::chrono::milliseconds kPollEvery{100};

std::chrono::steady_clock::duration to_duration(double seconds) {
  double bounded = std::clamp(std::isnan(seconds) ? 0.0 : seconds, 0.0, kMaxSeconds);
  return std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(bounded));
}

[[noreturn]] void fail(const std::string& text) {
  throw common::StatusError({common::StatusCode::kConfig, -1, -1, -1, -1, text});
}

// Signals are for the application's threads (Python runs its handlers on the main one). Those that a fault of the
// thread itself raises stay open, so that a crash is reported as such.
class BlockSignals {
 public:
  BlockSignals() {
    sigset_t all;
    sigfillset(&all);
    for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT}) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~BlockSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

}  // namespace

Liveness::Liveness(const LivenessConfig& config)
    : config_(config),
      timeout_(to_duration(config.heartbeat_timeout_s)),
      interval_(std::min<Clock::duration>(timeout_ / 4, std::chrono::seconds(1))) {
  if (timeout_ < std::chrono::milliseconds(20)) fail("heartbeat_timeout_s must be at least 0.02");
  if (config.job_key.size() > kMaxJobKey) fail("the job key is longer than " + std::to_string(kMaxJobKey) + " bytes");
  listen_fd_ = listen_on(config.listen_host, port_);
  wake_fd_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (wake_fd_ < 0) {
    close_socket(listen_fd_);
    fail("cannot create an eventfd");
  }
}

Liveness::~Liveness() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake();
  if (thread_.joinable()) thread_.join();
  for (Link& link : links_) {
    if (link.fd >= 0) close_socket(link.fd);
  }
  for (Stranger& stranger : strangers_) close_socket(stranger.fd);
  if (listen_fd_ >= 0) close_socket(listen_fd_);
  ::close(wake_fd_);
}

void Liveness::connect(const std::vector<Peer>& peers, double timeout_s, const std::function<void()>& poll) {
  auto now = Clock::now();
  auto deadline = now + to_duration(timeout_s);
  std::vector<Link> links;
  std::set<int> ranks;
  for (const Peer& peer : peers) {
    MOE_EFA_CHECK(peer.rank >= 0 && peer.rank != config_.rank && ranks.insert(peer.rank).second,
                  "bad or repeated peer rank " << peer.rank);
    Link link;
    link.peer = peer;
    link.retry_at = now;
    if (peer.rank > config_.rank) {
      link.addresses = resolve(peer.host, peer.port, false);
    } else {
      link.state = LinkState::kAwaited;
    }
    links.push_back(std::move(link));
  }
  std::unique_lock<std::mutex> lock(mutex_);
  MOE_EFA_CHECK(!connect_called_, "connect() is called once");
  connect_called_ = true;
  if (failed()) throw common::StatusError(failure_);
  if (links.empty()) return;
  links_ = std::move(links);
  {
    BlockSignals block;  // inherited by the thread
    thread_ = std::thread(&Liveness::run, this);
  }
  auto met = [this] { return failed() || all_up(); };
  if (poll) {
    while (!changed_.wait_until(lock, std::min(deadline, Clock::now() + kPollEvery), met) && Clock::now() < deadline) {
      lock.unlock();  // it may call us
      poll();
      lock.lock();
    }
  } else {
    changed_.wait_until(lock, deadline, met);
  }
  if (!failed() && !all_up()) {
    record(missing_peers(timeout_s), nullptr);  // those that we did reach must not wait for a group that will not be
    wait_flushed(lock);
  }
  if (failed()) throw common::StatusError(failure_);
}

common::Status Liveness::missing_peers(double timeout_s) const {
  common::Status status{common::StatusCode::kPeerTimeout, -1, -1, -1, -1, {}};
  std::string names;
  std::size_t missing = 0;
  for (const Link& link : links_) {
    if (link.state == LinkState::kUp || link.state == LinkState::kGone) continue;
    if (status.rank < 0) status.rank = link.peer.rank;
    if (link.turned_away) status.code = common::StatusCode::kConfig;
    if (++missing > kMaxNamed) continue;
    names += (missing > 1 ? "; rank " : "rank ") + std::to_string(link.peer.rank) + " at " + link.peer.host + ":" +
             std::to_string(link.peer.port) + ": ";
    if (link.addresses.empty()) {
      names += "it has not connected to us";
    } else {
      names += link.trouble.empty() ? "no answer" : link.trouble;
    }
  }
  if (missing > kMaxNamed) names += "; and " + std::to_string(missing - kMaxNamed) + " more";
  char seconds[32];
  std::snprintf(seconds, sizeof seconds, "%.1f", timeout_s);
  status.message = "no control connection to " + std::to_string(missing) + " of " + std::to_string(links_.size()) +
                   " peers after " + seconds + " s: " + names;
  return status;
}

common::Status Liveness::failure() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return failure_;
}

void Liveness::abort(const common::Status& status) {
  MOE_EFA_CHECK(!status.ok(), "abort() without an error");
  std::unique_lock<std::mutex> lock(mutex_);
  record(status, nullptr);
  wait_flushed(lock);
}

void Liveness::goodbye(std::uint64_t progress, const std::string& reason) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (departed_) return;
  departed_ = true;
  progress_ = progress;
  reason_ = reason;
  for (Link& link : links_) {
    if (link.state == LinkState::kUp) send(link, encode_goodbye(progress_, reason_));
  }
}

std::optional<std::uint64_t> Liveness::goodbye_of(int rank) const {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Link& link : links_) {
    if (link.peer.rank == rank && link.said_goodbye) return link.progress;
  }
  return std::nullopt;
}

std::string Liveness::reason_of(int rank) const {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Link& link : links_) {
    if (link.peer.rank == rank && link.said_goodbye) return link.reason;
  }
  return {};
}

common::Status Liveness::missing_goodbye() const {
  std::lock_guard<std::mutex> lock(mutex_);
  auto now = Clock::now();
  common::Status missing;
  for (const Link& link : links_) {
    if (link.said_goodbye) continue;
    std::string name = "rank " + std::to_string(link.peer.rank);
    bool gone = link.state == LinkState::kGone;
    if (gone || now - link.last_heard > timeout_) {
      return {common::StatusCode::kPeerLost,
              link.peer.rank,
              -1,
              -1,
              -1,
              name + (gone ? " died (control connection closed)" : " fell silent")};
    }
    if (missing.ok()) missing = {common::StatusCode::kPeerTimeout, link.peer.rank, -1, -1, -1, name + " is missing"};
  }
  return missing;
}

void Liveness::farewell() {
  std::unique_lock<std::mutex> lock(mutex_);
  if (said_farewell_) return;
  said_farewell_ = true;
  for (Link& link : links_) {
    if (link.state == LinkState::kUp) send(link, encode_empty(ControlType::kFarewell));
  }
}

bool Liveness::wait_farewells(double timeout_s) {
  auto all_said = [this] {
    return std::all_of(links_.begin(), links_.end(),
                       [](const Link& link) { return link.said_farewell || link.state == LinkState::kGone; });
  };
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_until(lock, Clock::now() + to_duration(timeout_s), [&] { return failed() || all_said(); });
  return all_said();
}

int Liveness::silent_peer(Clock::time_point now) const {
  for (const Link& link : links_) {
    if (link.state == LinkState::kUp && !link.said_goodbye && is_long(now - link.last_heard)) return link.peer.rank;
  }
  return -1;
}

int Liveness::away_peer() const {
  for (const Link& link : links_) {
    if (link.suspect == link.peer.rank) return link.suspect;
  }
  return -1;
}

// What the heartbeats say: seen here, or told by the rank itself.
int Liveness::known_suspect(Clock::time_point now) const {
  if (int rank = silent_peer(now); rank >= 0) return rank;
  if (away_since_ && is_long(now - *away_since_)) return config_.rank;
  return away_peer();
}

void Liveness::set_away(bool away) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (away) {
    away_since_ = Clock::now();
  } else {
    away_since_.reset();
  }
}

int Liveness::suspect() const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (int rank = silent_peer(Clock::now()); rank >= 0) return rank;
  if (int rank = away_peer(); rank >= 0) return rank;
  for (const Link& link : links_) {
    bool heard_here =
        std::any_of(links_.begin(), links_.end(), [&](const Link& other) { return other.peer.rank == link.suspect; });
    if (link.suspect >= 0 && link.suspect != config_.rank && !heard_here) return link.suspect;
  }
  return -1;
}

bool Liveness::wait_goodbyes(double timeout_s) {
  auto all_left = [this] {
    return std::all_of(links_.begin(), links_.end(),
                       [](const Link& link) { return link.said_goodbye || link.state == LinkState::kGone; });
  };
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_until(lock, Clock::now() + to_duration(timeout_s), [&] { return failed() || all_left(); });
  return all_left();
}

void Liveness::record(const common::Status& status, const Link* source) {
  if (failed()) return;  // the first error wins (I6)
  failure_ = status;
  // Release: publishes failure_ to the acquire in failed().
  failed_.store(true, std::memory_order_release);
  std::string bytes = encode_abort(failure_);
  for (Link& link : links_) {
    if (&link != source && link.state == LinkState::kUp) send(link, bytes);
  }
  changed_.notify_all();
}

void Liveness::send(Link& link, const std::string& bytes) {
  link.out += bytes;
  flush(link);
  if (!link.out.empty()) wake();  // the thread must ask poll() for room
}

void Liveness::flush(Link& link) {
  IoResult result = link.broken ? IoResult::kError : send_some(link.fd, link.out);
  if (result == IoResult::kError) {
    // Not a verdict: the peer's last words (an abort, a goodbye) may still be unread. The read side decides.
    link.broken = true;
    link.out.clear();
  }
}

bool Liveness::all_flushed() const {
  return std::all_of(links_.begin(), links_.end(),
                     [](const Link& link) { return link.state != LinkState::kUp || link.out.empty(); });
}

void Liveness::wait_flushed(std::unique_lock<std::mutex>& lock) {
  changed_.wait_until(lock, Clock::now() + kFlushDeadline, [this] { return all_flushed(); });
}

void Liveness::wake() {
  std::uint64_t one = 1;
  // A full counter means that a wake-up is pending already.
  [[maybe_unused]] ssize_t written = ::write(wake_fd_, &one, sizeof one);
}

}  // namespace moe_efa::transport
