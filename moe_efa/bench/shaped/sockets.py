"""What plain sockets make of a link: the bytes of a phase over one TCP connection per pair of rail peers, both ways."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from moe_efa.bench.timing import gather

_PIECE_BYTES = 1 << 20
_TIMEOUT_S = 120.0


class PlainSockets:
    """Connections of this rank to the ranks of equal local rank on other nodes. Construction is collective.

    Args:
        group: of all ranks.
        address: IPv4 address of this rank's node.
        node_size: ranks per node.
    """

    def __init__(self, group: dist.ProcessGroup, *, address: str, node_size: int) -> None:
        rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.peers = [peer for peer in range(rank % node_size, num_ranks, node_size) if peer != rank]
        self._rank = rank
        self._sockets: dict[int, socket.socket] = {}
        self._source = bytes(_PIECE_BYTES)
        with socket.create_server((address, 0), backlog=num_ranks) as listener:
            listener.settimeout(_TIMEOUT_S)
            doors = gather(group, listener.getsockname()[:2])
            for peer in self.peers:
                if peer > rank:
                    connection = socket.create_connection(doors[peer], timeout=_TIMEOUT_S)
                    connection.sendall(rank.to_bytes(4, "little"))
                    self._sockets[peer] = connection
            while len(self._sockets) < len(self.peers):
                connection, _ = listener.accept()
                connection.settimeout(_TIMEOUT_S)
                self._sockets[int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "little")] = connection
        self._threads = ThreadPoolExecutor(2 * len(self.peers))

    def exchange(self, bytes_to_peer: Sequence[int]) -> None:
        """Send every peer as many bytes as ``bytes_to_peer[this rank]`` says, and receive theirs. Collective.

        Args:
            bytes_to_peer: for every rank, the bytes it sends to each of its peers.
        """
        jobs = [self._threads.submit(self._receive, peer, bytes_to_peer[peer]) for peer in self.peers]
        jobs += [self._threads.submit(self._send, peer, bytes_to_peer[self._rank]) for peer in self.peers]
        for job in jobs:
            job.result()

    def _send(self, peer: int, count: int) -> None:
        view = memoryview(self._source)
        while count > 0:
            self._sockets[peer].sendall(view[: min(count, _PIECE_BYTES)])
            count -= _PIECE_BYTES

    def _receive(self, peer: int, count: int) -> None:
        target = memoryview(bytearray(_PIECE_BYTES))
        while count > 0:
            got = self._sockets[peer].recv_into(target, min(count, _PIECE_BYTES))
            if got == 0:
                raise ConnectionError(f"rank {peer} closed its plain socket")
            count -= got

    def close(self) -> None:
        self._threads.shutdown()
        for connection in self._sockets.values():
            connection.close()
