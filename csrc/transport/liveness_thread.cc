// The thread of Liveness: sleeps in poll(), moves bytes, sends heartbeats, judges silence and EOF. Never throws, never
// blocks on a peer, never spins. A peer is judged only after everything that it sent has been read.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>

#include "common/log.h"
#include "transport/liveness.h"

namespace moe_efa::transport {
namespace {

constexpr std::chrono::milliseconds kRetryDelay{100};
constexpr std::chrono::milliseconds kTurnedAwayDelay{1000};
constexpr std::chrono::seconds kDialAttempt{5};
constexpr std::chrono::seconds kGreetingTime{5};  // for an accepted connection to say who it is
constexpr std::chrono::milliseconds kAcceptPause{100};
constexpr std::chrono::milliseconds kFinalFlush{200};
constexpr std::chrono::milliseconds kFinalStep{2};
constexpr std::size_t kSpareStrangers = 64;
constexpr int kReadsPerWake = 16;

}  // namespace

void Liveness::run() {
  pthread_setname_np(pthread_self(), "moe_efa-alive");
  try {
    std::unique_lock<std::mutex> lock(mutex_);
    loop(lock);
  } catch (const std::exception& error) {
    std::lock_guard<std::mutex> lock(mutex_);
    record({common::StatusCode::kInternal, config_.rank, -1, -1, -1,
            std::string("failure detector stopped: ") + error.what()},
           nullptr);
  }
}

void Liveness::loop(std::unique_lock<std::mutex>& lock) {
  last_wake_ = next_beat_ = accept_after_ = Clock::now();
  for (Link& link : links_) {
    if (link.state == LinkState::kIdle) dial(link, last_wake_);
  }
  while (!stopping_) {
    auto before = Clock::now();
    std::vector<pollfd> fds = poll_set(before);
    int timeout_ms = poll_timeout_ms(before);
    lock.unlock();
    (void)::poll(fds.data(), fds.size(), timeout_ms);  // an error is a wake-up like any other
    lock.lock();
    auto now = Clock::now();
    // Nobody heard from us and we heard from nobody while this process was stopped: that is our pause, not theirs.
    bool was_paused = now - last_wake_ > 2 * interval_;
    last_wake_ = now;
    std::uint64_t count;
    [[maybe_unused]] ssize_t drained = ::read(wake_fd_, &count, sizeof count);
    for (Link& link : links_) {
      if (link.fd >= 0) read(link, now);
      if (link.state == LinkState::kUp && !link.out.empty()) flush(link);
      if (link.state == LinkState::kIdle && now >= link.retry_at) dial(link, now);
      if (was_paused) link.last_heard = now;
    }
    accept_strangers(now);
    beat(now);
    judge(now);
    changed_.notify_all();
  }
  final_flush();
}

std::vector<pollfd> Liveness::poll_set(Clock::time_point now) const {
  std::vector<pollfd> fds{{wake_fd_, POLLIN, 0}};
  if (listen_fd_ >= 0 && now >= accept_after_) fds.push_back({listen_fd_, POLLIN, 0});
  for (const Link& link : links_) {
    if (link.fd < 0) continue;
    bool writes = link.state == LinkState::kConnecting || !link.out.empty();
    bool reads = link.state != LinkState::kConnecting;
    fds.push_back({link.fd, static_cast<short>((reads ? POLLIN : 0) | (writes ? POLLOUT : 0)), 0});
  }
  for (const Stranger& stranger : strangers_) fds.push_back({stranger.fd, POLLIN, 0});
  return fds;
}

int Liveness::poll_timeout_ms(Clock::time_point now) const {
  Clock::time_point next = next_beat_;
  for (const Link& link : links_) {
    if (link.state == LinkState::kIdle) next = std::min(next, link.retry_at);
    if (link.state == LinkState::kConnecting) next = std::min(next, link.dial_deadline);
  }
  if (listen_fd_ >= 0 && accept_after_ > now) next = std::min(next, accept_after_);
  if (next <= now) return 0;
  return static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>(next - now).count());
}

void Liveness::accept_strangers(Clock::time_point now) {
  std::erase_if(strangers_, [&](Stranger& stranger) { return !greet(stranger, now); });
  while (listen_fd_ >= 0 && now >= accept_after_) {
    int fd = accept_from(listen_fd_);
    if (fd >= 0) {
      if (strangers_.size() >= links_.size() + kSpareStrangers) {
        close_socket(strangers_.front().fd);
        strangers_.erase(strangers_.begin());
      }
      strangers_.push_back({fd, {}, now + kGreetingTime});
      if (!greet(strangers_.back(), now)) strangers_.pop_back();
    } else if (errno != EINTR && errno != ECONNABORTED) {
      // Out of descriptors: the listening socket stays readable, so look away for a while rather than spin.
      if (errno != EAGAIN && errno != EWOULDBLOCK) accept_after_ = now + kAcceptPause;
      break;
    }
  }
  if (listen_fd_ >= 0 && all_up()) {
    close_socket(listen_fd_);
    listen_fd_ = -1;
    for (Stranger& stranger : strangers_) close_socket(stranger.fd);
    strangers_.clear();
  }
}

bool Liveness::greet(Stranger& stranger, Clock::time_point now) {
  IoResult result = receive_some(stranger.fd, stranger.in);
  ControlFrame frame;
  FrameResult parsed = take_frame(stranger.in, frame);
  if (parsed == FrameResult::kPartial && now < stranger.deadline &&
      (result == IoResult::kOk || result == IoResult::kWouldBlock)) {
    return true;
  }
  ControlHello hello;
  if (parsed == FrameResult::kFrame && frame.type == ControlType::kHello && decode_hello(frame.payload, hello)) {
    auto link = std::find_if(links_.begin(), links_.end(), [&](const Link& candidate) {
      return candidate.peer.rank == hello.rank && candidate.state == LinkState::kAwaited;
    });
    if (hello.version == kControlVersion && hello.job_key == config_.job_key && link != links_.end()) {
      link->fd = stranger.fd;
      link->in = std::move(stranger.in);
      bring_up(*link, now);
      return false;
    }
    std::string reason =
        hello.version != kControlVersion
            ? "it speaks version " + std::to_string(hello.version) + ", we " + std::to_string(kControlVersion)
            : (hello.job_key != config_.job_key ? "wrong job key" : "not an expected peer");
    common::log_line("warning", config_.rank,
                     "dropped a control connection of rank " + std::to_string(hello.rank) + ": " + reason);
  }
  close_socket(stranger.fd);
  return false;
}

void Liveness::dial(Link& link, Clock::time_point now) {
  link.fd = start_dial(link.addresses[link.next_address % link.addresses.size()]);
  if (link.fd < 0) return retry(link, std::strerror(errno), now);
  link.state = LinkState::kConnecting;
  // Only TCP's part is bounded. A peer that has accepted answers when it enters connect(), and a second connection from
  // us would make it take the end of the first for our death.
  link.dial_deadline = now + kDialAttempt;
}

void Liveness::retry(Link& link, const std::string& trouble, Clock::time_point now) {
  if (link.fd >= 0) close_socket(link.fd);
  link.fd = -1;
  link.in.clear();
  link.out.clear();
  link.broken = false;
  link.trouble = trouble;
  link.state = LinkState::kIdle;
  link.retry_at = now + (link.turned_away ? kTurnedAwayDelay : kRetryDelay);
  ++link.next_address;
}

void Liveness::read(Link& link, Clock::time_point now) {
  if (link.state == LinkState::kConnecting) {
    pollfd ready{link.fd, POLLOUT, 0};
    if (::poll(&ready, 1, 0) == 0) {
      if (now >= link.dial_deadline) retry(link, "connection timed out", now);
      return;
    }
    if (int error = dial_error(link.fd); error != 0) return retry(link, std::strerror(error), now);
    link.state = LinkState::kGreeting;
    send(link, encode_hello({kControlVersion, config_.rank, config_.job_key}));
  }
  for (int i = 0; i < kReadsPerWake && link.fd >= 0; ++i) {
    IoResult result = receive_some(link.fd, link.in);
    int error = errno;
    if (result == IoResult::kWouldBlock) return;
    if (result == IoResult::kOk) {
      take_frames(link, now);
    } else {
      end(link, result == IoResult::kClosed ? "closed" : std::string("broken: ") + std::strerror(error), now);
    }
  }
}

void Liveness::take_frames(Link& link, Clock::time_point now) {
  link.last_heard = now;
  while (link.fd >= 0) {
    ControlFrame frame;
    FrameResult parsed = take_frame(link.in, frame);
    if (parsed == FrameResult::kPartial) return;
    bool valid = parsed == FrameResult::kFrame;
    if (link.state == LinkState::kGreeting) {
      ControlHello hello;
      valid = valid && frame.type == ControlType::kHello && decode_hello(frame.payload, hello) &&
              hello.version == kControlVersion && hello.rank == link.peer.rank && hello.job_key == config_.job_key;
      if (!valid) {
        link.turned_away = true;
        return retry(link, "something else answers there: another job, rank or version", now);
      }
      bring_up(link, now);
      continue;
    }
    common::Status status;
    if (valid && frame.type == ControlType::kAbort && decode_abort(frame.payload, status)) {
      record(status, &link);
    } else if (valid && frame.type == ControlType::kGoodbye &&
               decode_goodbye(frame.payload, link.progress, link.reason)) {
      link.said_goodbye = true;
      any_goodbye_.store(true, std::memory_order_relaxed);
    } else if (valid && frame.type == ControlType::kFarewell) {
      link.said_farewell = true;
    } else if (!valid || frame.type != ControlType::kHeartbeat || !decode_heartbeat(frame.payload, link.suspect)) {
      record({common::StatusCode::kProtocol, link.peer.rank, -1, -1, -1,
              "rank " + std::to_string(link.peer.rank) + " sent a malformed control message"},
             nullptr);
      return end(link, "given up", now);
    }
  }
}

void Liveness::end(Link& link, const std::string& reason, Clock::time_point now) {
  if (link.state == LinkState::kGreeting) {
    link.turned_away = true;
    return retry(link, "it " + reason + " the connection without a greeting: another job or version, or it died", now);
  }
  close_socket(link.fd);
  link.fd = -1;
  link.out.clear();
  link.state = LinkState::kGone;
  if (link.said_goodbye || departed_) return;
  record({common::StatusCode::kPeerLost, link.peer.rank, -1, -1, -1,
          "rank " + std::to_string(link.peer.rank) + " died (control connection " + reason + ")"},
         &link);
}

void Liveness::bring_up(Link& link, Clock::time_point now) {
  bool accepted = link.addresses.empty();
  link.state = LinkState::kUp;
  link.last_heard = now;
  ++num_up_;
  if (accepted) send(link, encode_hello({kControlVersion, config_.rank, config_.job_key}));
  if (failed()) send(link, encode_abort(failure_));
  if (departed_) send(link, encode_goodbye(progress_, reason_));
  if (accepted) take_frames(link, now);  // what came with its greeting
}

void Liveness::beat(Clock::time_point now) {
  if (now < next_beat_) return;
  next_beat_ = now + interval_;
  std::string bytes = encode_heartbeat(known_suspect(now));
  for (Link& link : links_) {
    // Unsent bytes say that we live as soon as they arrive; more of them would only fill our memory.
    if (link.state == LinkState::kUp && link.out.empty()) send(link, bytes);
  }
}

void Liveness::judge(Clock::time_point now) {
  if (failed() || departed_) return;
  for (const Link& link : links_) {
    if (link.state != LinkState::kUp || link.said_goodbye || now - link.last_heard <= timeout_) continue;
    char text[96];
    std::snprintf(text, sizeof text, "rank %d silent for %.1f s", link.peer.rank,
                  std::chrono::duration<double>(now - link.last_heard).count());
    // The silent rank is told too: should it wake up, it must not wait for a group that has given it up.
    return record({common::StatusCode::kPeerLost, link.peer.rank, -1, -1, -1, text}, nullptr);
  }
}

void Liveness::final_flush() {
  bool had_news = failed() || departed_;
  auto deadline = Clock::now() + kFinalFlush;
  // Closing a socket that still has unread bytes resets it, and a reset overtakes what must be resent. So read on until
  // the peer's kernel has acknowledged our last words.
  auto pending = [this, had_news](Link& link) {
    if (link.state != LinkState::kUp) return false;
    flush(link);
    IoResult result = IoResult::kOk;
    for (int i = 0; i < kReadsPerWake && result == IoResult::kOk; ++i) {
      std::string ignored;
      result = receive_some(link.fd, ignored);
    }
    if (link.broken || result == IoResult::kClosed || result == IoResult::kError) return false;
    return had_news && (!link.out.empty() || unacknowledged_bytes(link.fd) > 0);
  };
  while (std::count_if(links_.begin(), links_.end(), pending) > 0 && Clock::now() < deadline) {
    (void)::poll(nullptr, 0, static_cast<int>(kFinalStep.count()));
  }
}

}  // namespace moe_efa::transport
