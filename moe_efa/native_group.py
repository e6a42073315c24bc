"""A native group, serialised by a lock (I16). Tensors in, tensors out; arguments have been checked.

It knows nothing of autograd.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_efa import _C, device, host_memory, nvtx, rendezvous
from moe_efa._version import __version__
from moe_efa.config import ExpertParallelConfig
from moe_efa.dispatch_placement import DispatchOutput, DispatchPlacement, DispatchRows, UnplacedDispatch
from moe_efa.errors import ClosedError, TransportError
from moe_efa.pointer import pointer
from moe_efa.quantization import BLOCK_SIZE

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_LEAVE_TIMEOUT_S = 2.0  # for the lock


class StartedCall:
    """One call between its halves. What it reads and writes is kept, and must not change, until it is done.

    One that is dropped before it was finished, as after an error between the halves, goes on all the same, since the
    other ranks count on it; nobody gets its results.
    """

    def __init__(self, dtype: torch.dtype, dropped: collections.deque[int]) -> None:
        self.dtype = dtype  # of its result
        self.ticket: int | None = None
        self._dropped = dropped

    def __del__(self) -> None:
        if self.ticket is not None:
            self._dropped.append(self.ticket)  # at any time in any thread: no lock, no call


class _Dispatch(NamedTuple):
    """A call's arguments, and on a device what there is of the memory of its plan."""

    args: _C.DispatchArgs
    memory: tuple[Tensor, ...]
    is_replay: bool
    alone: bool  # its kernels run on the caller's stream


class PlanTables(NamedTuple):
    """What replays of a graph make of a plan, on the device. The plan's own are those of the last replay."""

    counts: Tensor  # [E_local] int64
    offsets: Tensor  # [E_local + 1] int32


class NativeGroup:
    """A native group with its lock. Calls may come from any thread; they wait for each other.

    Args:
        on_close: called once, before the native group closes and with the lock held: it must not call back.
    """

    def __init__(
        self,
        native: _C.Group,
        config: ExpertParallelConfig,
        agreement: rendezvous.Agreement,
        *,
        on_close: Callable[[NativeGroup], None] | None = None,
    ) -> None:
        self.config = config
        self.name = _name_of(config, agreement)
        self.rank = agreement.rank
        self.num_ranks = agreement.num_ranks
        self.node_size = agreement.node_size
        self.job_key = agreement.job_key
        self.device = device.of_tensors(config.device)
        self.on_device = bool(native.info()["device"])  # what runs the kernels there, and not on the CPU
        self.references = 0
        self._references_lock = threading.Lock()  # held for a moment only
        self.usable = True  # False after a transport error and after closing
        self._native = native
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._on_close = on_close
        self._closed: Exception | None = None  # what calls raise once the native group is closed
        self._kept: dict[int, tuple[Tensor | None, ...]] = {}  # by ticket: what started calls read and write
        self._dropped: collections.deque[int] = collections.deque()  # tickets of those that nobody will finish
        self._has_recorded = False  # calls in graphs, which may be replayed whenever their owners like
        own_stream = native.own_stream() if self.on_device else 0
        self._placement = DispatchPlacement(config.hidden_size, self.device, own_stream)
        if self.on_device:
            native.set_allocate(self._placement.allocate)
        self._ending = False  # no new calls: the process waits for the lock

    @nvtx.annotated("dispatch")
    def dispatch(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, expert_alignment: int, capacity: int | None = None
    ) -> tuple[_C.Plan, Tensor, Tensor]:
        """x [T, H] -> (plan, rows [rows, H] in x's dtype, weights [rows] fp32). Collective.

        In static mode, with a capacity on every rank, rows is that.
        """
        plan, rows, _, weights = self._fresh(x, topk_idx, topk_weights, expert_alignment, capacity)
        return plan, rows, weights

    @nvtx.annotated("dispatch")
    def dispatch_fp8(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, expert_alignment: int, capacity: int | None = None
    ) -> tuple[_C.Plan, Tensor, Tensor, Tensor]:
        """x [T, H] -> (plan, rows [rows, H] e4m3, scales [rows, ceil(H / 128)] fp32, weights [rows] fp32). Collective.

        The rows of the wire as they are, so ``wire_dtype`` must be "fp8".
        """
        plan, rows, scales, weights = self._fresh(
            x, topk_idx, topk_weights, expert_alignment, capacity, fp8_output=True
        )
        assert scales is not None
        return plan, rows, scales, weights

    def _fresh(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        expert_alignment: int,
        capacity: int | None,
        *,
        fp8_output: bool = False,
    ) -> tuple[_C.Plan, Tensor, Tensor | None, Tensor]:
        """(plan, rows, scales of FP8 rows, weights)."""
        if self.is_capturing():
            return self._record_dispatch(
                x, topk_idx, topk_weights, expert_alignment, capacity=capacity, fp8_output=fp8_output
            )
        if self.on_device:
            started = self.start_dispatch(
                x, topk_idx, topk_weights, expert_alignment, capacity=capacity, fp8_output=fp8_output, alone=True
            )
            plan, rows, scales, weights = self.finish_dispatch(started)
            assert weights is not None
            return plan, rows, scales, weights
        call = self._fresh_args(x, topk_idx, topk_weights, expert_alignment, capacity, fp8_output=fp8_output)
        return self._dispatch(call, _dtype_of_rows(x, fp8_output), with_weights=True, capacity=capacity)

    @nvtx.annotated("dispatch")
    def replay(self, x: Tensor, plan: _C.Plan, *, gradient: bool = False) -> Tensor:
        """x [T, H] -> rows [rows, H] of a plan, in x's dtype; a gradient travels in its own wire dtype. Collective."""
        return self._replay(x, plan, gradient=gradient)[0]

    @nvtx.annotated("dispatch")
    def replay_fp8(self, x: Tensor, plan: _C.Plan) -> tuple[Tensor, Tensor]:
        """x [T, H] -> rows [rows, H] e4m3 and scales [rows, ceil(H / 128)] fp32 of a plan. Collective."""
        rows, scales = self._replay(x, plan, fp8_output=True)
        assert scales is not None
        return rows, scales

    def _replay(
        self, x: Tensor, plan: _C.Plan, *, gradient: bool = False, fp8_output: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(rows, scales of FP8 rows)."""
        results: tuple[Any, ...]
        if self.is_capturing():
            results = self._record_replay(x, plan, gradient=gradient, fp8_output=fp8_output)
        elif self.on_device:
            started = self.start_replay(x, plan, gradient=gradient, fp8_output=fp8_output, alone=True)
            results = self.finish_dispatch(started)
        else:
            call = self._replay_args(x, plan, gradient=gradient, fp8_output=fp8_output)
            results = self._dispatch(call, _dtype_of_rows(x, fp8_output), with_weights=False)
        return results[1], results[2]

    @nvtx.annotated("combine")
    def combine(
        self,
        y: Tensor,
        plan: _C.Plan,
        *,
        weights: Tensor | None = None,
        weight_grads: Tensor | None = None,
        gradient: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """y [rows, H] -> (out [T, H] in y's dtype, gradients of topk_weights [T, K] fp32 or None). Collective.

        Args:
            weights: [rows] fp32 factors of the rows, None for the plain sum.
            weight_grads: [rows] fp32, moved to where the weights came from; all ranks pass them or none does.
            gradient: y is one, and travels in ``grad_combine_dtype``.
        """
        out = self.empty(plan.num_tokens, self.config.hidden_size, dtype=y.dtype)
        topk_weight_grads = None
        if weight_grads is not None:
            topk_weight_grads = torch.empty(plan.num_tokens, self.config.top_k, dtype=torch.float32, device=self.device)
        options: dict[str, Any] = {
            "weights": weights,
            "weight_grads": weight_grads,
            "out": out,
            "topk_weight_grads": topk_weight_grads,
            "gradient": gradient,
        }
        if self.is_capturing():
            args = self._combine_args(y, plan, **options)
            memory = (y, weights, weight_grads, out, topk_weight_grads)
            self._record(lambda: self._native.record_combine(args), *memory, plan=plan)
        elif self.on_device:
            self.finish(self.start_combine(y, plan, **options, alone=True))
        else:
            with self._call():
                self._native.combine(self._combine_args(y, plan, **options))
        return out, topk_weight_grads

    def is_capturing(self) -> bool:
        """Whether calls on the current stream go into a graph, to happen at every replay of it and not now."""
        if not self.on_device:
            return False
        with self._call():
            return self._native.capturing(device.current_stream(self.device))

    def _check_halves(self, alone: bool) -> None:
        if not alone and self.is_capturing():
            raise RuntimeError("calls in halves and rounds in waves cannot be captured: call dispatch and combine")

    def _record_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        expert_alignment: int,
        *,
        capacity: int | None,
        fp8_output: bool,
    ) -> tuple[_C.Plan, Tensor, Tensor | None, Tensor]:
        """:meth:`_fresh` into a graph. Counts and offsets of the plan are tensors there, which replays write."""
        if capacity is None:
            raise ValueError(
                "a dispatch in a CUDA graph needs a capacity, or a handle: its sizes are those of all replays"
            )
        call = self._fresh_args(x, topk_idx, topk_weights, expert_alignment, capacity, fp8_output=fp8_output)
        rows, scales, weights = self._placement.static_results(capacity, _dtype_of_rows(x, fp8_output))
        experts = self.config.num_experts // self.num_ranks
        counts = torch.empty(experts, dtype=torch.int64, device=self.device)
        offsets = torch.empty(experts + 1, dtype=torch.int32, device=self.device)
        with self._call():
            plan_bytes = self._native.device_plan_bytes(capacity)
        plan_memory = self.empty(plan_bytes, dtype=torch.uint8)
        assert weights is not None
        plan = self._record(
            lambda: self._native.record_dispatch(
                call.args,
                out_ptr=pointer(rows),
                weights_ptr=pointer(weights),
                scales_ptr=pointer(scales),
                plan_memory_ptr=pointer(plan_memory),
                counts_ptr=pointer(counts),
                offsets_ptr=pointer(offsets),
            ),
            *(x, topk_idx, topk_weights, rows, scales, weights, counts, offsets, plan_memory, *call.memory),
        )
        plan.memory, plan.tables = (*call.memory, plan_memory), PlanTables(counts, offsets)
        return plan, rows, scales, weights

    def _record_replay(
        self, x: Tensor, plan: _C.Plan, *, gradient: bool, fp8_output: bool
    ) -> tuple[_C.Plan, Tensor, Tensor | None]:
        call = self._replay_args(x, plan, gradient=gradient, fp8_output=fp8_output)
        rows, scales, _ = self._placement.results(plan.rows, _dtype_of_rows(x, fp8_output), with_weights=False)
        self._record(
            lambda: self._native.record_dispatch(call.args, out_ptr=pointer(rows), scales_ptr=pointer(scales)),
            *(x, rows, scales),
            plan=plan,
        )
        return plan, rows, scales

    def _record(self, record: Callable[[], Any], *memory: Tensor | None, plan: _C.Plan | None = None) -> Any:
        """Put a call into the graph. Its memory is of the graph's pool; that of a plan from outside is kept here.

        Where a device is played nobody else keeps any.
        """
        with self._call():
            recorded = record()
            self._has_recorded = True
            if plan is not None and not hasattr(plan, "tables"):
                _kept_for_graphs.append(plan.memory)
            if self.device.type == "cpu":
                _kept_for_graphs.append(memory)
            return recorded

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory for results, where the tensors of this group are."""
        if self.on_device:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return host_memory.empty(*shape, dtype=dtype)

    @nvtx.annotated("start dispatch")
    def start_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        expert_alignment: int,
        *,
        capacity: int | None = None,
        fp8_output: bool = False,
        alone: bool = False,
    ) -> StartedCall:
        """The first half of :meth:`dispatch`, or of :meth:`dispatch_fp8`; ``finish_dispatch`` is the second.

        Args:
            alone: the caller does nothing in between, so that on a device the kernels go to its stream.
        """
        self._check_halves(alone)
        args = self._fresh_args(
            x, topk_idx, topk_weights, expert_alignment, capacity, fp8_output=fp8_output, alone=alone
        )
        dtype = _dtype_of_rows(x, fp8_output)
        results = None
        if self.on_device and capacity is not None:
            results = self._placement.static_results(capacity, dtype)
        return self._start_dispatch(args, dtype, x, topk_idx, topk_weights, results=results)

    @nvtx.annotated("start dispatch")
    def start_replay(
        self, x: Tensor, plan: _C.Plan, *, gradient: bool = False, fp8_output: bool = False, alone: bool = False
    ) -> StartedCall:
        """The first half of :meth:`replay`, or of :meth:`replay_fp8`; ``finish_dispatch`` is the second."""
        self._check_halves(alone)
        args = self._replay_args(x, plan, gradient=gradient, fp8_output=fp8_output, alone=alone)
        return self._start_dispatch(args, _dtype_of_rows(x, fp8_output), x)

    @nvtx.annotated("start combine")
    def start_combine(
        self,
        y: Tensor,
        plan: _C.Plan,
        *,
        out: Tensor,
        weights: Tensor | None = None,
        weight_grads: Tensor | None = None,
        topk_weight_grads: Tensor | None = None,
        gradient: bool = False,
        alone: bool = False,
    ) -> StartedCall:
        """The first half of :meth:`combine`, into ``out`` [T, H] of y's dtype; ``finish`` is the second."""
        self._check_halves(alone)
        args = self._combine_args(
            y,
            plan,
            out=out,
            weights=weights,
            weight_grads=weight_grads,
            topk_weight_grads=topk_weight_grads,
            gradient=gradient,
            alone=alone,
        )
        memory = (y, weights, weight_grads, out, topk_weight_grads, *getattr(plan, "memory", ()))
        return self._start(y.dtype, memory, lambda: self._native.combine_start(args))

    @nvtx.annotated("finish")
    def finish(self, started: StartedCall) -> _C.DispatchBuffers:
        """Wait for the second half of a call. Once."""
        if started.ticket is None:
            raise ValueError("this call is finished: finish() once")
        ticket, started.ticket = started.ticket, None
        with self._call():
            try:
                return self._finish(ticket)
            finally:  # done, or given up by all threads
                self._kept.pop(ticket, None)

    def _finish(self, ticket: int) -> _C.DispatchBuffers:
        """Wait for the call. On a GPU the stream that is current now goes on behind it, and has its memory."""
        buffers = self._native.finish(ticket, device.current_stream(self.device))
        self._record_streams((*self._kept.get(ticket, ()), *self._placement.memory_of(ticket)))
        return buffers

    def _record_streams(self, memory: Iterable[Tensor | None]) -> None:
        """Torch gives memory back to the stream that it is from: not before the current one is done with it."""
        if self.device.type == "cuda":
            current = torch.cuda.current_stream(self.device)
            for tensor in memory:
                if tensor is not None:
                    tensor.record_stream(current)

    @nvtx.annotated("synchronize")
    def synchronize(self) -> None:
        """Until what finished calls have queued on a GPU is done. Raises what went wrong meanwhile."""
        if self.is_capturing():
            raise RuntimeError("synchronize() waits for the stream, which is being captured")
        with self._call():
            self._native.synchronize(device.current_stream(self.device))

    def has_ended(self, started: StartedCall) -> bool:
        """Whether :meth:`finish` would give, or raise, at once."""
        with self._call():
            return started.ticket is None or self._native.ended(started.ticket)

    @nvtx.annotated("finish dispatch")
    def finish_dispatch(self, started: StartedCall) -> DispatchRows:
        """(plan, rows, scales of FP8 rows, weights of a fresh dispatch), as the calls in one."""
        if self.on_device:
            return self._finish_on_device(started)
        buffers = self.finish(started)
        plan, hidden_size = buffers.plan, self.config.hidden_size
        rows = host_memory.over(buffers.x, plan.rows, hidden_size, dtype=started.dtype)
        scales = weights = None
        if buffers.scales is not None:
            scales = host_memory.over(buffers.scales, plan.rows, -(-hidden_size // BLOCK_SIZE), dtype=torch.float32)
        if buffers.weights is not None:
            weights = host_memory.over(buffers.weights, plan.rows, dtype=torch.float32)
        return DispatchRows(plan, rows, scales, weights)

    def _finish_on_device(self, started: StartedCall) -> DispatchRows:
        """Wait until the rows are ready on the current stream."""
        if started.ticket is None:
            raise ValueError("this call is finished: finish() once")
        ticket, started.ticket = started.ticket, None
        with self._call():
            try:
                self._finish(ticket)
                return self._placement.take(ticket)
            finally:
                self._placement.forget(ticket)
                self._kept.pop(ticket, None)

    def _start_dispatch(
        self, call: _Dispatch, dtype: torch.dtype, *memory: Tensor, results: DispatchOutput | None = None
    ) -> StartedCall:
        stream = self._placement.stream_of_kernels(alone=call.alone)
        unplaced = UnplacedDispatch(dtype, call.is_replay, stream, call.memory, results) if self.on_device else None
        return self._start(
            dtype, (*memory, *call.memory), lambda: self._native.dispatch_start(call.args, self._pool()), unplaced
        )

    def _pool(self) -> _C.HostPool | None:
        return None if self.on_device else host_memory.pool()

    def _start(
        self,
        dtype: torch.dtype,
        memory: tuple[Tensor | None, ...],
        start: Callable[[], int],
        unplaced: UnplacedDispatch | None = None,
    ) -> StartedCall:
        started = StartedCall(dtype, self._dropped)
        with self._call():
            self._record_streams(memory)
            if self._has_recorded:
                self._native.catch_up(device.current_stream(self.device))  # before what others wait for is held

            def begin() -> int:
                started.ticket = ticket = start()
                self._kept[ticket] = memory
                return ticket

            if unplaced is None:
                begin()
            else:
                self._placement.start(begin, unplaced)
        return started

    def _forget_dropped(self) -> None:
        for _ in range(len(self._dropped)):
            ticket = self._dropped.popleft()
            if self._native.forget(ticket):
                self._kept.pop(ticket, None)
                self._placement.forget(ticket)
            else:
                self._dropped.append(ticket)

    def stats(self) -> dict[str, Any]:
        """Counters since construction."""
        with self._call():
            return self._native.stats()

    def info(self) -> dict[str, Any]:
        """Facts of the native group: provider, chunk_rows, slots, bytes."""
        with self._call():
            return self._native.info()

    def retain(self) -> None:
        """Count one more reference, for a copy of somebody who has one."""
        self._check_process()
        with self._references_lock:
            self.references += 1

    def release(self) -> None:
        """Drop one reference; the last one closes the native group together with its peers. Collective."""
        self._check_process()
        with self._references_lock:
            self.references -= 1
            if self.references > 0:
                return
        with self._lock:
            if self._closed is None:
                collective = self.usable
                native = self._take_native(ClosedError("the native group was closed"))
                try:
                    if collective and self._has_recorded:
                        native.synchronize(device.current_stream(self.device))  # what graphs replay as well
                    if collective:
                        native.close(collective=True, timeout_s=self.config.timeout_s)
                finally:  # also after an interrupt, or what else close() leaves open
                    rendezvous.discard(native)
                    self._forget_calls()

    def leave(self, error: BaseException) -> None:
        """Close here because of an error of the caller's: who needs this rank from now on gets an error that tells it.

        Whoever does not, such as ranks with the same error, is left alone.
        """
        self._close_here(f"left the group after {type(error).__name__}: {error}", _LEAVE_TIMEOUT_S)

    def refuse_calls(self) -> None:
        """From now on calls raise, so that threads which go on calling cannot keep :meth:`close_at_exit` waiting."""
        self._ending = True

    def close_at_exit(self, timeout_s: float) -> None:
        """Close without the peers. A call that another thread has not finished is left to the end of the process."""
        self._close_here(None, timeout_s)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ClosedError("this ExpertParallel belongs to the process that forked this one")

    def _close_here(self, reason: str | None, timeout_s: float) -> None:
        if not self._lock.acquire(timeout=timeout_s):
            return
        try:
            if self._closed is None:
                if reason is None:
                    native = self._take_native(ClosedError("the process is ending"))
                else:
                    native = self._take_native(TransportError(f"rank {self.rank} {reason}", rank=self.rank))
                rendezvous.discard(native, reason or "")
                self._forget_calls()
        finally:
            self._lock.release()

    def _forget_calls(self) -> None:
        """Once no thread steps them any more."""
        self._kept.clear()
        self._placement.clear()

    def _take_native(self, reason: Exception) -> _C.Group:
        """Mark this closed and hand out the native group, whose memory goes with the last reference to it."""
        native = self._native
        del self._native  # handles keep self alive
        self._closed = reason
        self.usable = False
        if self._on_close is not None:
            self._on_close(self)
        return native

    def _dispatch(
        self, call: _Dispatch, dtype: torch.dtype, *, with_weights: bool, capacity: int | None = None
    ) -> tuple[_C.Plan, Tensor, Tensor | None, Tensor]:
        """(plan, rows in dtype, scales if that is e4m3, weights). A capacity that is too much memory sends nothing."""
        hidden_size = self.config.hidden_size

        def memory(num_rows: int) -> tuple[Tensor, Tensor | None, Tensor]:
            rows = host_memory.empty(num_rows, hidden_size, dtype=dtype)
            scales = None
            if dtype == torch.float8_e4m3fn:
                scales = torch.empty(num_rows, -(-hidden_size // BLOCK_SIZE), dtype=torch.float32, device="cpu")
            return rows, scales, torch.empty(num_rows if with_weights else 0, dtype=torch.float32, device="cpu")

        with self._call():
            try:
                results = None if capacity is None else memory(capacity)
            except (MemoryError, RuntimeError) as error:  # torch's word for no memory
                raise MemoryError(f"no memory for capacity={capacity}: {error}") from error
            begun = False
            try:
                plan = self._native.dispatch_begin(call.args)
                begun = True
                rows, scales, weights = results or memory(plan.rows)
                self._native.dispatch_finish(pointer(rows), pointer(weights) if with_weights else 0, pointer(scales))
            except BaseException as error:
                if isinstance(error, TransportError) or (isinstance(error, ValueError) and not begun):
                    raise  # the native group knows: failed, or refused before anything was sent
                # No memory, an interrupt: the others wait for this rank's second half.
                self.usable = False
                self._native.abort(f"rank {self.rank} could not finish a dispatch: {type(error).__name__}: {error}")
                raise
        return plan, rows, scales, weights

    def _fresh_args(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        expert_alignment: int,
        capacity: int | None,
        *,
        fp8_output: bool = False,
        alone: bool = True,
    ) -> _Dispatch:
        memory: tuple[Tensor, ...] = ()
        if self.on_device:
            memory = (self.empty(self._send_bytes(x.shape[0]), dtype=torch.uint8),)
        args = _C.DispatchArgs(
            x_ptr=pointer(x),
            dtype=DTYPE_NAMES[x.dtype],
            num_tokens=x.shape[0],
            topk_idx_ptr=pointer(topk_idx),
            topk_weights_ptr=pointer(topk_weights),
            expert_alignment=expert_alignment,
            capacity=capacity,
            fp8_output=fp8_output,
            stream=device.current_stream(self.device),
            alone=alone,
            send_memory_ptr=pointer(memory[0]) if memory else 0,
        )
        return _Dispatch(args, memory, is_replay=False, alone=alone)

    def _replay_args(
        self, x: Tensor, plan: _C.Plan, *, gradient: bool = False, fp8_output: bool = False, alone: bool = True
    ) -> _Dispatch:
        args = _C.DispatchArgs(
            x_ptr=pointer(x),
            dtype=DTYPE_NAMES[x.dtype],
            num_tokens=x.shape[0],
            plan=plan,
            gradient=gradient,
            fp8_output=fp8_output,
            stream=device.current_stream(self.device),
            alone=alone,
        )
        return _Dispatch(args, getattr(plan, "memory", ()), is_replay=True, alone=alone)

    def _combine_args(
        self,
        y: Tensor,
        plan: _C.Plan,
        *,
        out: Tensor,
        weights: Tensor | None,
        weight_grads: Tensor | None,
        topk_weight_grads: Tensor | None,
        gradient: bool,
        alone: bool = True,
    ) -> _C.CombineArgs:
        return _C.CombineArgs(
            y_ptr=pointer(y),
            dtype=DTYPE_NAMES[y.dtype],
            plan=plan,
            out_ptr=pointer(out),
            weights_ptr=pointer(weights),
            weight_grads_ptr=pointer(weight_grads),
            topk_weight_grads_ptr=pointer(topk_weight_grads),
            gradient=gradient,
            stream=device.current_stream(self.device),
            alone=alone,
        )

    def _send_bytes(self, num_tokens: int) -> int:
        with self._call():
            return self._native.device_send_bytes(num_tokens)

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        """Hold the lock during a native call; after a transport error nobody new shares the native group."""
        self._check_process()
        with self._lock:
            if self._closed is not None:
                raise self._closed
            if self._ending:
                raise ClosedError("the process is ending")
            try:
                if self._dropped:
                    self._forget_dropped()
                yield
            except TransportError as error:
                self.usable = False
                cause, self._placement.error = self._placement.error, None
                if cause is None or error.rank != self.rank:
                    raise
                raise cause from error  # here, and once; the others hear of it by the TransportError


_kept_for_graphs: list[tuple[Tensor | None, ...]] = []  # see NativeGroup._record; graphs outlive groups


def _dtype_of_rows(x: Tensor, fp8_output: bool) -> torch.dtype:
    return torch.float8_e4m3fn if fp8_output else x.dtype


_serials = itertools.count()


def _name_of(config: ExpertParallelConfig, agreement: rendezvous.Agreement) -> str:
    """Unique here, and different for what gives other shapes: compiled graphs, which hold names, are cached on disk."""
    facts = repr((__version__, config, agreement.num_ranks, agreement.node_size))
    return f"moe_efa.{next(_serials)}.{hashlib.sha256(facts.encode()).hexdigest()[:12]}"
