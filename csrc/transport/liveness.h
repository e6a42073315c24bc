// Failure detector: a control TCP connection to each rail peer and node mate, judged by one sleeping thread that needs
// no GIL. Knows nothing of rails or the protocol. Keeps I5 (every wait is bounded and names a rank) and I6 (the first
// error wins, is sticky, reaches every rank).
#pragma once

#include <poll.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "common/status.h"
#include "transport/control_socket.h"
#include "transport/control_wire.h"

namespace moe_efa::transport {

struct LivenessConfig {
  int rank = 0;
  std::string listen_host;  // "" = every interface
  std::string job_key;      // must be the same on every rank
  double heartbeat_timeout_s = 20.0;
};

class Liveness {
 public:
  struct Peer {
    int rank = -1;
    std::string host;
    std::uint16_t port = 0;
  };

  explicit Liveness(const LivenessConfig& config);  // binds and listens on an ephemeral port
  ~Liveness();  // hands pending aborts and goodbyes to the kernel (<= 200 ms), then closes; never hangs
  Liveness(const Liveness&) = delete;
  Liveness& operator=(const Liveness&) = delete;

  std::uint16_t port() const { return port_; }

  // Once. `poll` is called ten times a second while it waits and may throw.
  // Dials the peers of greater rank and accepts the others; returns when all are authenticated. Throws the first
  // failure: kPeerTimeout (or kConfig, when a peer turned us away) naming a missing rank, kPeerLost, or a peer's abort.
  void connect(const std::vector<Peer>& peers, double timeout_s, const std::function<void()>& poll = {});

  // Lock-free, for hot wait loops.
  bool failed() const {
    // Acquire: pairs with the release in record(); whoever sees true finds failure_ written.
    return failed_.load(std::memory_order_acquire);
  }
  common::Status failure() const;  // the first failure; ok() when there is none

  // Records the failure unless there is one, and tells every peer, who tell theirs. Waits <= 200 ms until the kernel
  // has the bytes, so that the process may exit right after. Any thread.
  void abort(const common::Status& status);

  // Says that this rank needs its peers no more: from now on their silence and EOF are normal, as is ours to them.
  // For the peers: how far the caller came, and what made it leave, if that is an error.
  void goodbye(std::uint64_t progress = 0, const std::string& reason = {});
  bool peer_said_goodbye(int rank) const { return goodbye_of(rank).has_value(); }
  std::optional<std::uint64_t> goodbye_of(int rank) const;  // the progress that the peer left with
  std::string reason_of(int rank) const;                    // and why; "" where it had nothing to tell
  bool any_goodbye() const { return any_goodbye_.load(std::memory_order_relaxed); }  // lock-free
  // True when every peer said goodbye or is gone; false on timeout, or at once after a failure.
  bool wait_goodbyes(double timeout_s);
  // Whose goodbye is missing, and why: kPeerLost where it died or has been silent for too long, else kPeerTimeout; ok()
  // where none is. For a caller who has said goodbye and wants theirs.
  common::Status missing_goodbye() const;
  // Says that every peer's goodbye is here; wait_farewells() is true when every peer has said so or is gone. In a grid
  // of nodes and rails, where a path has at most two steps, it means that every rank has said goodbye.
  void farewell();
  bool wait_farewells(double timeout_s);

  // The caller has left a call unfinished, in the belief that it will be back at once; or is back.
  void set_away(bool away);
  // A rank that has been away or silent for long, though not long enough to be lost: as heard here, or by a peer; -1 if
  // none.
  int suspect() const;

 private:
  using Clock = std::chrono::steady_clock;
  // kIdle: dial at retry_at.  kAwaited: the peer dials us.  kConnecting, kGreeting: we dialled, and wait for TCP or for
  // its HELLO.  kUp: authenticated.  kGone: was up, is closed.
  enum class LinkState { kIdle, kAwaited, kConnecting, kGreeting, kUp, kGone };
  struct Link {
    Peer peer;
    std::vector<SocketAddress> addresses;  // empty where the peer dials
    std::size_t next_address = 0;
    LinkState state = LinkState::kIdle;
    int fd = -1;
    bool broken = false;  // a send failed; what the peer sent before is still read
    bool said_goodbye = false, said_farewell = false;
    std::uint64_t progress = 0;  // with its goodbye
    std::string reason;          // also
    int suspect = -1;            // with its last heartbeat
    bool turned_away = false;
    std::string in, out, trouble;
    Clock::time_point last_heard, retry_at, dial_deadline;
  };
  struct Stranger {  // accepted, not authenticated
    int fd = -1;
    std::string in;
    Clock::time_point deadline;
  };

  // The thread. All but run() expect mutex_ held.
  void run();
  void loop(std::unique_lock<std::mutex>& lock);
  std::vector<pollfd> poll_set(Clock::time_point now) const;
  int poll_timeout_ms(Clock::time_point now) const;
  void accept_strangers(Clock::time_point now);
  bool greet(Stranger& stranger, Clock::time_point now);  // false: not waiting for its HELLO any more
  void dial(Link& link, Clock::time_point now);
  void retry(Link& link, const std::string& trouble, Clock::time_point now);
  void read(Link& link, Clock::time_point now);
  void take_frames(Link& link, Clock::time_point now);
  void end(Link& link, const std::string& reason, Clock::time_point now);
  void bring_up(Link& link, Clock::time_point now);
  void beat(Clock::time_point now);
  void judge(Clock::time_point now);
  void final_flush();

  // Any thread, mutex_ held.
  void record(const common::Status& status, const Link* source);
  void send(Link& link, const std::string& bytes);
  void flush(Link& link);
  bool is_long(Clock::duration time) const { return 2 * time > 5 * interval_; }  // two heartbeats are missing
  int silent_peer(Clock::time_point now) const;
  int away_peer() const;
  int known_suspect(Clock::time_point now) const;
  bool all_up() const { return num_up_ == links_.size(); }
  bool all_flushed() const;
  void wait_flushed(std::unique_lock<std::mutex>& lock);
  common::Status missing_peers(double timeout_s) const;
  void wake();

  const LivenessConfig config_;
  const Clock::duration timeout_;
  const Clock::duration interval_;
  int listen_fd_ = -1;
  int wake_fd_ = -1;
  std::uint16_t port_ = 0;

  // Everything below is guarded by mutex_, which the thread drops only while it sleeps in poll(). Only the thread opens
  // and closes connections; callers may send on them.
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Link> links_;
  std::vector<Stranger> strangers_;
  std::size_t num_up_ = 0;  // ever
  common::Status failure_;
  bool connect_called_ = false;
  bool departed_ = false;  // goodbye() was called
  bool said_farewell_ = false;
  std::optional<Clock::time_point> away_since_;
  std::uint64_t progress_ = 0;
  std::string reason_;
  bool stopping_ = false;
  Clock::time_point next_beat_, last_wake_, accept_after_;

  std::atomic<bool> failed_{false}, any_goodbye_{false};
  std::thread thread_;
};

}  // namespace moe_efa::transport
