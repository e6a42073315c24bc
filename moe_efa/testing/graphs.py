"""Graphs of calls: torch's on a GPU, and what stands for them where a library plays the GPU (tests/csrc/device)."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch

from moe_efa import env


class Graph:
    """Captured once, replayed as often as one likes.

    Where a GPU is played only what the library runs is captured: calls of a group, and no operators of torch.
    """

    def __init__(self) -> None:
        library = env.device_library()
        self._library = None if library is None else ctypes.CDLL(library)
        self._graph = torch.cuda.CUDAGraph() if library is None else None
        self._number = -1

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """What is called inside goes into the graph."""
        if self._graph is not None:
            with torch.cuda.graph(self._graph):
                yield
            return
        assert self._library is not None
        self._library.emulated_begin_capture()
        try:
            yield
        finally:
            self._number = self._library.emulated_end_capture()

    def wait(self) -> None:
        """Until everything that was replayed on the current stream has run."""
        if self._library is None:
            torch.cuda.current_stream().synchronize()
        else:
            self._library.emulated_synchronize()

    def replay(self) -> None:
        """On the current stream; returns before it has run."""
        if self._graph is not None:
            self._graph.replay()
        else:
            assert self._library is not None
            self._library.emulated_replay(self._number)
