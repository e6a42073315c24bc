// TCP helpers. All sockets are close-on-exec, non-blocking, without Nagle's delay and with keep-alive probes.
#include "transport/control_socket.h"

#include <fcntl.h>
#include <linux/sockios.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>

#include "common/status.h"

namespace moe_efa::transport {
namespace {

// Open sockets, as fd + 1; 0 is a free place. Atomics, so that the handler may run in a child of a threaded process.
constexpr int kMaxOpen = 4096;
std::atomic<int> open_sockets[kMaxOpen];

void close_all_in_child() {
  for (std::atomic<int>& place : open_sockets) {
    int fd = place.exchange(0) - 1;
    if (fd >= 0) ::close(fd);
  }
}

int track(int fd) {
  static const int registered = pthread_atfork(nullptr, nullptr, &close_all_in_child);
  static_cast<void>(registered);
  if (fd < 0) return fd;
  for (std::atomic<int>& place : open_sockets) {
    int free = 0;
    if (place.compare_exchange_strong(free, fd + 1)) break;
  }
  return fd;
}

constexpr int kBacklog = 4096;  // the kernel caps it; peers that dial before we accept wait here
constexpr std::size_t kReceiveBytes = 4096;

[[noreturn]] void fail(const std::string& text) {
  throw common::StatusError({common::StatusCode::kConfig, -1, -1, -1, -1, text});
}

void tune(int fd) {
  int on = 1;
  (void)::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  (void)::setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
}

}  // namespace

std::vector<SocketAddress> resolve(const std::string& host, std::uint16_t port, bool passive) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_family = AF_UNSPEC;
  hints.ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0);
  addrinfo* list = nullptr;
  int rc = ::getaddrinfo(host.empty() ? nullptr : host.c_str(), std::to_string(port).c_str(), &hints, &list);
  if (rc != 0) fail("cannot resolve host '" + host + "' for the control connections: " + ::gai_strerror(rc));
  std::vector<SocketAddress> addresses;
  for (addrinfo* item = list; item != nullptr; item = item->ai_next) {
    SocketAddress address;
    if (item->ai_addrlen > sizeof address.storage) continue;
    std::memcpy(&address.storage, item->ai_addr, item->ai_addrlen);
    address.length = item->ai_addrlen;
    addresses.push_back(address);
  }
  ::freeaddrinfo(list);
  if (addresses.empty()) fail("host '" + host + "' has no address");
  return addresses;
}

int listen_on(const std::string& host, std::uint16_t& port) {
  int error = 0;
  for (const SocketAddress& address : resolve(host, 0, true)) {
    int fd = ::socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) {
      error = errno;
      continue;
    }
    SocketAddress bound;
    bound.length = sizeof bound.storage;
    if (::bind(fd, reinterpret_cast<const sockaddr*>(&address.storage), address.length) == 0 &&
        ::listen(fd, kBacklog) == 0 &&
        ::getsockname(fd, reinterpret_cast<sockaddr*>(&bound.storage), &bound.length) == 0) {
      port = bound.storage.ss_family == AF_INET6
                 ? ntohs(reinterpret_cast<const sockaddr_in6*>(&bound.storage)->sin6_port)
                 : ntohs(reinterpret_cast<const sockaddr_in*>(&bound.storage)->sin_port);
      return track(fd);
    }
    error = errno;
    ::close(fd);
  }
  fail("cannot listen on '" + host + "' for the control connections: " + std::strerror(error));
}

int accept_from(int listen_fd) {
  int fd = ::accept4(listen_fd, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
  if (fd >= 0) tune(fd);
  return track(fd);
}

int start_dial(const SocketAddress& address) {
  int fd = ::socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  tune(fd);
  if (::connect(fd, reinterpret_cast<const sockaddr*>(&address.storage), address.length) == 0 || errno == EINPROGRESS) {
    return track(fd);
  }
  int error = errno;
  ::close(fd);
  errno = error;
  return -1;
}

void close_socket(int fd) {
  for (std::atomic<int>& place : open_sockets) {
    int mine = fd + 1;
    if (place.compare_exchange_strong(mine, 0)) break;
  }
  ::close(fd);
}

int dial_error(int fd) {
  int error = 0;
  socklen_t length = sizeof error;
  return ::getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) == 0 ? error : errno;
}

IoResult send_some(int fd, std::string& bytes) {
  while (!bytes.empty()) {
    ssize_t sent = ::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent >= 0) {
      bytes.erase(0, static_cast<std::size_t>(sent));
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      return IoResult::kWouldBlock;
    } else if (errno != EINTR) {
      return IoResult::kError;
    }
  }
  return IoResult::kOk;
}

IoResult receive_some(int fd, std::string& bytes) {
  char chunk[kReceiveBytes];
  while (true) {
    ssize_t received = ::recv(fd, chunk, sizeof chunk, MSG_DONTWAIT);
    if (received > 0) {
      bytes.append(chunk, static_cast<std::size_t>(received));
      return IoResult::kOk;
    }
    if (received == 0) return IoResult::kClosed;
    if (errno == EAGAIN || errno == EWOULDBLOCK) return IoResult::kWouldBlock;
    if (errno != EINTR) return IoResult::kError;
  }
}

int unacknowledged_bytes(int fd) {
  int bytes = 0;
  return ::ioctl(fd, SIOCOUTQ, &bytes) == 0 ? bytes : 0;
}

}  // namespace moe_efa::transport
