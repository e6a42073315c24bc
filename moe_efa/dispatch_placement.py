"""Memory for the results of dispatches on a device: before they begin in static mode, otherwise once it is known how
much, from whichever thread steps the calls.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_efa import _C
from moe_efa.pointer import pointer
from moe_efa.quantization import BLOCK_SIZE


class DispatchRows(NamedTuple):
    """What a dispatch gives."""

    plan: _C.Plan
    rows: Tensor
    scales: Tensor | None  # of FP8 rows
    weights: Tensor | None  # of a fresh dispatch


class DispatchOutput(NamedTuple):
    """Where a dispatch on a device puts its rows."""

    rows: Tensor
    scales: Tensor | None  # of FP8 rows
    weights: Tensor | None  # of a fresh dispatch


class UnplacedDispatch(NamedTuple):
    """A dispatch on a device whose results have no place yet."""

    dtype: torch.dtype  # of its rows
    is_replay: bool
    stream: Any  # where its kernels run; None without a GPU
    plan_memory: tuple[Tensor, ...]
    results: DispatchOutput | None  # in static mode, memory that is there already


class DispatchPlacement:
    """Gives dispatches of one native group their memory, by ticket.

    Args:
        own_stream: the address of the stream where kernels of started dispatches run.
    """

    def __init__(self, hidden_size: int, device: torch.device, own_stream: int) -> None:
        self.error: Exception | None = None  # why a dispatch got no memory
        self._hidden_size, self._device, self._own_stream = hidden_size, device, own_stream
        self._starting = threading.Lock()  # held until _unplaced knows what was started
        self._unplaced: dict[int, UnplacedDispatch] = {}
        self._placed: dict[int, tuple[DispatchRows, Tensor | None]] = {}  # with new memory of their plans

    def results(self, num_rows: int, dtype: torch.dtype, *, with_weights: bool) -> DispatchOutput:
        """Memory for so many rows, now."""
        rows, scales, weights = self._empty(num_rows, self._hidden_size, dtype=dtype), None, None
        if dtype == torch.float8_e4m3fn:
            scales = self._empty(num_rows, -(-self._hidden_size // BLOCK_SIZE), dtype=torch.float32)
        if with_weights:
            weights = self._empty(num_rows, dtype=torch.float32)
        return DispatchOutput(rows, scales, weights)

    def static_results(self, capacity: int, dtype: torch.dtype) -> DispatchOutput:
        """Before anything is sent: a capacity that is too much memory is this rank's error alone."""
        try:
            return self.results(capacity, dtype, with_weights=True)
        except RuntimeError as error:  # torch's word for no memory
            raise MemoryError(f"no memory for capacity={capacity}: {error}") from error

    def stream_of_kernels(self, *, alone: bool) -> Any:
        """Of a dispatch that is started now; None without a GPU."""
        if self._device.type != "cuda":
            return None
        own: Any = torch.cuda.ExternalStream
        return torch.cuda.current_stream(self._device) if alone else own(self._own_stream, device=self._device)

    def start(self, start: Callable[[], int], unplaced: UnplacedDispatch) -> int:
        """Start it, and know it before its sizes can be known. -> ticket"""
        with self._starting:
            ticket = start()
            self._unplaced[ticket] = unplaced
        return ticket

    def allocate(self, ticket: int, plan: _C.Plan, plan_bytes: int) -> tuple[int, int, int, int]:
        """Addresses of rows, weights, scales and of plan_bytes for the plan.

        Called by whichever thread steps the calls, while another may hold the native group's lock and wait for this
        one.
        """
        with self._starting:
            unplaced = self._unplaced.pop(ticket)
        pulls = None
        try:
            # Plain tensors, whatever the thread that happens to be here does otherwise.
            with self._allocating_on(unplaced.stream), torch.inference_mode(False):
                rows, scales, weights = unplaced.results or self.results(
                    plan.rows, unplaced.dtype, with_weights=not unplaced.is_replay
                )
                if not unplaced.is_replay:
                    pulls = self._empty(plan_bytes, dtype=torch.uint8)
                    plan.memory = (*unplaced.plan_memory, pulls)
        except Exception as error:
            self.error = error
            raise
        self._placed[ticket] = DispatchRows(plan, rows, scales, weights), pulls
        return pointer(rows), pointer(weights), pointer(scales), pointer(pulls)

    def memory_of(self, ticket: int) -> tuple[Tensor | None, ...]:
        """What the dispatch was given."""
        if ticket not in self._placed:
            return ()
        (_, *results), pulls = self._placed[ticket]
        return (*results, pulls)

    def take(self, ticket: int) -> DispatchRows:
        """The results, once."""
        return self._placed.pop(ticket)[0]

    def forget(self, ticket: int) -> None:
        """Drop the results, if there are any."""
        self._placed.pop(ticket, None)

    def clear(self) -> None:
        """Forget all, once no thread steps them any more."""
        self._unplaced.clear()
        self._placed.clear()

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    @contextlib.contextmanager
    def _allocating_on(self, stream: Any) -> Iterator[None]:
        """For memory that kernels on this stream write: not what another stream may still use."""
        if stream is None:
            yield
            return
        # A thread of ours begins on the first GPU, where torch.cuda.stream would leave it, with a context there.
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            yield
