// Non-blocking TCP for the control connections: listen, dial, send, receive. Knows no frames and no peers.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <vector>

namespace moe_efa::transport {

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t length = 0;
};

// Every address of host:port. Throws StatusError(kConfig) with the resolver's text. `passive`: empty host = any.
std::vector<SocketAddress> resolve(const std::string& host, std::uint16_t port, bool passive);

// A listening socket on an ephemeral port, which is returned. Throws StatusError(kConfig).
int listen_on(const std::string& host, std::uint16_t& port);

// Next waiting connection, ready for use; -1 and errno when there is none.
int accept_from(int listen_fd);

// Starts to connect; -1 and errno on failure. The outcome is known when the socket becomes writable: dial_error().
int start_dial(const SocketAddress& address);
int dial_error(int fd);

// Closes a socket made here. Sockets that are still open are closed in every child that this process forks: a child
// that outlives its parent must not keep the parent's death from its peers.
void close_socket(int fd);

enum class IoResult { kOk, kWouldBlock, kClosed, kError };

// Sends what fits and removes it from `bytes`; kOk when all is with the kernel. Never blocks, never raises SIGPIPE.
IoResult send_some(int fd, std::string& bytes);
// Appends up to kReceiveBytes to `bytes`; kOk when something came.
IoResult receive_some(int fd, std::string& bytes);
// Bytes that the peer's kernel has not acknowledged.
int unacknowledged_bytes(int fd);

}  // namespace moe_efa::transport
