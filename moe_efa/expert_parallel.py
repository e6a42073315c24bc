"""ExpertParallel, what a model talks to: checks arguments (I17), calls the ops, wraps their results."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from moe_efa import device as device_of
from moe_efa import group_registry, ops, overlap
from moe_efa.config import ExpertParallelConfig
from moe_efa.errors import ClosedError, ConfigError
from moe_efa.handle import DispatchResult, Handle, PendingCombine, PendingDispatch
from moe_efa.late_gradients import LateGradients
from moe_efa.op_kernels import Dispatched

_DTYPES = (torch.bfloat16, torch.float32)
_MAX_ROWS = 2**31 - 1  # offsets are int32
_LEAST_MOST_WAVES = 64  # may always be asked for, however few tokens there are


class ExpertParallel:
    """Dispatch and combine among the ranks of a group. Construction is collective.

    Rank r of R owns the experts ``[r * E / R, (r + 1) * E / R)``. All ranks issue the same calls in the same order; the
    number of tokens may differ and be zero. Calls return finished results. Objects of equal group and configuration
    share one native group, so a model may build one object per layer.

    Backward passes are collective as well: whether x and topk_weights require gradients must be the same on all ranks,
    and the results must reach the loss also on ranks without tokens or rows. There are no second derivatives.

    Calls may stand in functions for ``torch.compile(fullgraph=True)``; what is then wrong with dtypes and layouts shows
    when torch traces, and everything else when the graph runs. For torch.utils.checkpoint see
    :func:`moe_efa.checkpoint_context`.

    Args:
        group: torch.distributed process group of any backend, for the rendezvous only (no reference is kept), or None
            for a single rank.
        device: where tensors are: "cpu" or "cuda", the same on all ranks; None takes MOE_EFA_DEVICE, otherwise the
            current GPU, where torch has one and this build has the kernels for it, otherwise the CPU. On a GPU calls
            are queued on the current stream, as torch's are (see :meth:`synchronize`), and a wrong expert id is found
            by the kernel: it fails the group on all ranks.
        others: see :class:`ExpertParallelConfig`.

    Raises:
        ConfigError: on every rank, if the configuration cannot work or differs between ranks.
        TransportError: on every rank, if the ranks cannot reach each other.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        *,
        num_experts: int,
        hidden_size: int,
        top_k: int,
        max_tokens_per_rank: int,
        wire_dtype: str = "auto",
        combine_dtype: str = "auto",
        grad_wire_dtype: str = "auto",
        fp8_scale: str = "fp32",
        node_size: int | None = None,
        transport: str = "auto",
        provider: str | None = None,
        num_nics: int | None = None,
        timeout_s: float = 600.0,
        heartbeat_timeout_s: float = 20.0,
        memory_budget_bytes: int = 1 << 30,
        device: torch.device | str | None = None,
        buffers: str = "auto",
        chunk_rows: int = 0,
        slots: int = 0,
    ) -> None:
        config: ExpertParallelConfig | ConfigError
        try:
            config = ExpertParallelConfig(
                num_experts=num_experts,
                hidden_size=hidden_size,
                top_k=top_k,
                max_tokens_per_rank=max_tokens_per_rank,
                wire_dtype=wire_dtype,
                combine_dtype=combine_dtype,
                grad_wire_dtype=grad_wire_dtype,
                fp8_scale=fp8_scale,
                node_size=node_size,
                transport=transport,
                provider=provider,
                num_nics=num_nics,
                timeout_s=timeout_s,
                heartbeat_timeout_s=heartbeat_timeout_s,
                memory_budget_bytes=memory_budget_bytes,
                device=device_of.resolve(device),
                buffers=buffers,
                chunk_rows=chunk_rows,
                slots=slots,
            )
        except ConfigError as error:
            config = error  # raised by acquire, after the other ranks have heard of it
        self._native = group_registry.acquire(group, config)
        self._group = self._native.name
        self._closed = False

    @property
    def config(self) -> ExpertParallelConfig:
        """The configuration as given."""
        return self._native.config

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self._native.rank

    @property
    def num_ranks(self) -> int:
        """Ranks in the group."""
        return self._native.num_ranks

    @property
    def node_size(self) -> int:
        """Ranks per node, as found or given."""
        return self._native.node_size

    @property
    def device(self) -> torch.device:
        """Where tensors are."""
        return self._native.device

    @property
    def num_local_experts(self) -> int:
        """Experts that this rank owns, the first of which is ``rank * num_local_experts``."""
        return self.config.num_experts // self.num_ranks

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        handle: Handle | None = None,
        expert_alignment: int = 1,
        output: str = "same",
        capacity: int | None = None,
    ) -> DispatchResult:
        """Send every token to the ranks that own the experts it selected. Collective; so is its backward.

        Args:
            x: [T, H] bf16 or fp32, contiguous, on this object's device; T may differ between ranks and be 0.
            topk_idx: [T, K] int64 global expert ids, -1 for none. Equal ids in a row give separate rows.
            topk_weights: [T, K] fp32; those of -1 selections are ignored and get gradient 0.
            handle: repeat an earlier dispatch with other values: same T, no topk_idx, no topk_weights. Offsets, weights
                and alignment are the earlier ones.
            expert_alignment: every expert's rows are padded with zeros to a multiple of this.
            output: "same" gives rows in x's dtype; "fp8" hands the rows and scales of an FP8 wire through as they are
                (``wire_dtype="fp8"``), for an x that needs no gradient: an FP8 tensor cannot carry one.
            capacity: static mode: this rank gets exactly so many rows, padding included, whatever the routing says, and
                sizes stay on x's device. All ranks give one, each its own, or none does. What does not fit is not an
                error here: it is left out, adds nothing to results and gets gradients of 0, and ``overflow`` of the
                result says so on this rank and, from combine on, on every rank whose tokens it concerns. A replay keeps
                the handle's capacity.

        Returns:
            :class:`DispatchResult` with the rows of this rank's experts, in an order that depends on the routing alone.

        Raises:
            ValueError: for arguments that do not fit, before anything is sent: a corrected call may follow.
            ClosedError: if this object was closed.
            TransportError: if the exchange failed; every later call raises the same.
        """
        self._check_dispatch(x, topk_idx, topk_weights, handle, expert_alignment, output, capacity)
        if handle is not None:
            if output == "fp8":
                rows, scales = ops.replay_fp8(x, handle.plan, group=self._group, rows=handle.rows)
                return _result(rows, handle, scales)
            return _result(ops.replay(x, handle.plan, group=self._group, rows=handle.rows), handle)
        assert topk_idx is not None
        assert topk_weights is not None
        received = ops.dispatch(
            x,
            topk_idx,
            topk_weights,
            group=self._group,
            expert_alignment=expert_alignment,
            output=output,
            capacity=capacity,
        )
        handle = self._make_handle(received, x.shape[0], expert_alignment, capacity)
        return _result(received.rows, handle, received.scales if output == "fp8" else None)

    def combine(self, y: Tensor, handle: Handle, *, weighted: bool = True) -> Tensor:
        """Bring the experts' rows back to their tokens and add them. Collective; so is its backward.

        Args:
            y: [rows, H] bf16 or fp32, contiguous, in the order of the dispatched rows. Padding rows are never read.
            handle: of the dispatch.
            weighted: multiply rows by the dispatched weights; False for a caller who did so already.

        Returns:
            [T, H] in y's dtype: ``sum over k of topk_weights[t, k] * y[row(t, k)]``; zeros where nothing was selected.

        Raises:
            ValueError, ClosedError, TransportError: as :meth:`dispatch`.
        """
        self._check_combine(y, handle)
        weights = handle.weights if weighted else None
        return ops.combine(y, weights, handle.plan, group=self._group, num_tokens=handle.num_tokens)

    def dispatch_start(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        handle: Handle | None = None,
        expert_alignment: int = 1,
        output: str = "same",
        capacity: int | None = None,
    ) -> PendingDispatch:
        """Start a :meth:`dispatch` and return at once; ``finish()`` of the result waits for it. Collective.

        In between the exchange goes on in the background, while x, topk_idx and topk_weights stay as they are. Any
        number of calls may be pending, of which one dispatch and one combine move at a time, in call order. Finish each
        of them once, in any order. The order of starting is a part of the order that all ranks share; that of finishing
        is not. Backward starts where forward finished, and finishes where forward started. A call that nobody finishes,
        as after an error in between, runs out by itself, also in :meth:`close`, and its results are dropped.

        Not inside functions for torch.compile, which cannot see the halves of a call.

        Args, raises:
            as :meth:`dispatch`; what goes wrong on the way is raised by ``finish()``, or by any call before it.
        """
        self._check_dispatch(x, topk_idx, topk_weights, handle, expert_alignment, output, capacity)
        _check_not_compiling("dispatch_start")
        plan = None if handle is None else handle.plan
        halves = overlap.DispatchHalves(
            self._group, plan=plan, expert_alignment=expert_alignment, output=output, capacity=capacity
        )
        num_tokens = x.shape[0]
        ticket = overlap.start_dispatch(halves, x, topk_idx, topk_weights)

        def finish() -> DispatchResult:
            self._check_open()
            received = overlap.finish_dispatch(halves, ticket)
            known = handle or self._make_handle(received, num_tokens, expert_alignment, capacity)
            return _result(received.rows, known, received.scales if output == "fp8" else None)

        return PendingDispatch(finish)

    def combine_start(self, y: Tensor, handle: Handle, *, weighted: bool = True) -> PendingCombine:
        """Start a :meth:`combine` and return at once; ``finish()`` of the result waits for it. Collective.

        In between y stays as it is. For the rest see :meth:`dispatch_start`.
        """
        self._check_combine(y, handle)
        _check_not_compiling("combine_start")
        out = self._native.empty(handle.num_tokens, self.config.hidden_size, dtype=y.dtype)
        halves = overlap.CombineHalves(self._group, handle.plan, out)
        ticket = overlap.start_combine(halves, y, handle.weights if weighted else None)

        def finish() -> Tensor:
            self._check_open()
            return overlap.finish_combines([halves], out, [ticket])

        return PendingCombine(finish)

    def moe(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        experts: Callable[[Tensor, Tensor], Tensor],
        *,
        expert_alignment: int = 1,
        waves: int | None = None,
    ) -> Tensor:
        """Dispatch, experts and combine in one call. Collective; so is its backward.

        The tokens are cut into waves of consecutive tokens. Experts compute a wave while later ones come in and the
        results of earlier ones leave; in backward the same happens in the opposite order. The result and the gradients
        of x and topk_weights are those of one wave, bit by bit, if the experts' rows do not depend on how many there
        are. Gradients of the experts' weights are sums over waves, in the dtype of the weights.

        Inside functions for torch.compile, and under modes that watch operators such as those of
        :func:`moe_efa.checkpoint_context`, a round is one wave.

        Args:
            x, topk_idx, topk_weights, expert_alignment: as in :meth:`dispatch`.
            experts: ``experts(rows, offsets) -> rows`` with rows [rows, H] and offsets [E_local + 1] int32 (see
                :class:`DispatchResult`). It must act row by row, accept zero rows, and is called once per wave.
            waves: how many; equal on all ranks, at most ``max_tokens_per_rank`` or 64. None takes 1 where there is one
                node, and otherwise as many, up to 8, as leave a full wave of a rank 4 MiB to send, at
                ``max_tokens_per_rank`` tokens that go to ``min(top_k, nodes - 1)`` nodes each.

        Returns:
            [T, H] in the dtype of the experts' result.

        Raises:
            ValueError, ClosedError, TransportError: as :meth:`dispatch`. What experts raise passes through, forward and
                backward. If they raise on all ranks, and all catch it, the next call works as ever.
        """
        waves = self.num_waves(waves, dtype=x.dtype)
        if waves == 1:
            received = self.dispatch(x, topk_idx, topk_weights, expert_alignment=expert_alignment)
            y = ops.results_of(experts, received.x, received.offsets)
            return self.combine(y, received.handle)
        return self.moe_waves(
            x,
            topk_idx,
            topk_weights,
            lambda received: ops.results_of(experts, received.x, received.offsets),
            waves=waves,
            expert_alignment=expert_alignment,
        )

    def num_waves(self, waves: int | None, *, dtype: torch.dtype) -> int:
        """Waves of a round of tokens in this dtype: 1 where that must be, else ``waves``, else as :meth:`moe` says."""
        if waves is None:
            num_nodes = self.num_ranks // self.node_size
            waves = 1 if num_nodes == 1 else overlap.default_waves(self.config, num_nodes=num_nodes, dtype=dtype)
        else:
            _check_waves(waves, self.config.max_tokens_per_rank)
        return 1 if ops.is_watched() else waves

    def moe_waves(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        compute: Callable[[DispatchResult], Tensor],
        *,
        waves: int,
        weighted: bool = True,
        expert_alignment: int = 1,
        late: LateGradients | None = None,
    ) -> Tensor:
        """:meth:`moe` for layers with experts of their own kind. Collective; so is its backward. Not to be compiled.

        Args:
            x, topk_idx, topk_weights, expert_alignment: as in :meth:`dispatch`.
            compute: gives the experts' results [rows, H] for what came in a wave; for the rest see ``experts`` of
                :meth:`moe`.
            waves: as :meth:`num_waves` gives it.
            weighted: as in :meth:`combine`.
            late: gradients of weights, queued by the backward of compute, which are computed while backward waits for
                gradients of tokens, and thus keep no wave from leaving; see ``late_gradients.py``.

        Returns:
            [T, H] in the dtype of the results.

        Raises:
            ValueError, ClosedError, TransportError: as :meth:`moe`.
        """
        self._check_dispatch(x, topk_idx, topk_weights, None, expert_alignment, "same", None)
        _check_not_compiling("moe_waves")
        _check_waves(waves, self.config.max_tokens_per_rank)

        def results(received: Dispatched, num_tokens: int) -> Tensor:
            handle = self._make_handle(received, num_tokens, expert_alignment, None)
            y = compute(_result(received.rows, handle))
            if not isinstance(y, Tensor):
                raise ValueError(f"compute must return a tensor [rows, H], not {type(y).__name__}")
            return ops.tie(y.contiguous(), received.rows)

        return overlap.moe(
            x,
            topk_idx,
            topk_weights,
            results,
            native=self._native,
            expert_alignment=expert_alignment,
            waves=waves,
            weighted=weighted,
            late=late,
        )

    def synchronize(self) -> None:
        """Wait until the results of all finished calls are there, or raise why they never will be.

        On a GPU calls return when they are queued: what goes wrong later, such as a lost rank, leaves results undefined
        and is raised by the next call. So this comes before whatever must not see such results: a step of the
        optimizer, a checkpoint. On the CPU there is nothing to wait for. Not collective.

        Raises:
            ClosedError, TransportError: as :meth:`dispatch`.
        """
        self._check_open()
        self._native.synchronize()

    def stats(self) -> dict[str, Any]:
        """Counters since construction, of all objects that share the native group.

        At least ``rounds`` (combines finished), ``wire_bytes`` (sent to other nodes, everything included),
        ``wire_floor_bytes`` (rows x row bytes, deduplicated per node) and ``seconds`` per phase; ``nics`` has the
        ``writes`` and ``bytes`` that each NIC took.
        """
        self._check_open()
        return self._native.stats()

    def info(self) -> dict[str, Any]:
        """Facts of the native group, such as provider, chunk_rows, slots and bytes of memory.

        With tensors on a GPU, ``buffers`` says where rings are, and ``flags`` where its kernels look for what has
        arrived in them: "device" or "host".
        """
        self._check_open()
        return self._native.info()

    def close(self) -> None:
        """Give up this object; the last one of its native group closes that. Collective; repeated calls do nothing."""
        if not self._closed:
            self._closed = True
            self._native.release()

    def __enter__(self) -> ExpertParallel:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; after an exception leave the group instead: ranks that need this one get an error that names it.

        A rank that has, or comes to, an exception of its own before it needs this one keeps its own.
        """
        if error is None:
            self.close()
        elif not self._closed:
            self._closed = True
            self._native.leave(error)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParallel:
        """Another object of the same native group, to be closed by itself. Every rank copies, or none does."""
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        if not self._closed:
            self._native.retain()
        return copied

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an ExpertParallel cannot be pickled, nor a module that holds one: its connections belong to this process. "
            "Save module.state_dict(), build the module anew and load it"
        )

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"ExpertParallel(rank {self.rank} of {self.num_ranks}, node_size {self.node_size}{state})"

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this ExpertParallel was closed")

    def _make_handle(
        self, received: Dispatched, num_tokens: int, expert_alignment: int, capacity: int | None
    ) -> Handle:
        return Handle(
            plan=received.plan,
            weights=received.weights,
            tokens_per_expert=received.tokens_per_expert,
            offsets=received.offsets,
            overflow=received.overflow,
            num_tokens=num_tokens,
            expert_alignment=expert_alignment,
            top_k=self.config.top_k,
            capacity=capacity,
            group=self._group,
        )

    def _check_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        handle: Handle | None,
        expert_alignment: int,
        output: str,
        capacity: int | None,
    ) -> None:
        self._check_open()
        _check_tensor("x", x, _DTYPES, self.device)
        self._check_output(output, x)
        if handle is not None:
            self._check_handle(handle)
            if topk_idx is not None or topk_weights is not None:
                raise ValueError("topk_idx and topk_weights are not allowed with a handle, which has its own")
            if capacity is not None:
                raise ValueError("capacity is not allowed with a handle, which has its own or none")
            if expert_alignment not in (1, handle.expert_alignment):
                raise ValueError(
                    f"expert_alignment={expert_alignment} differs from the handle's {handle.expert_alignment}"
                )
            return
        if topk_idx is None or topk_weights is None:
            raise ValueError("dispatch needs topk_idx and topk_weights, or a handle")
        _check_tensor("topk_idx", topk_idx, (torch.int64,), self.device)
        _check_tensor("topk_weights", topk_weights, (torch.float32,), self.device)
        if isinstance(expert_alignment, bool) or not isinstance(expert_alignment, int) or expert_alignment < 1:
            raise ValueError(f"expert_alignment must be a positive integer, not {expert_alignment!r}")
        if capacity is not None:
            if isinstance(capacity, bool) or not isinstance(capacity, int) or not 0 <= capacity <= _MAX_ROWS:
                raise ValueError(f"capacity must be an integer from 0 to {_MAX_ROWS}, not {capacity!r}")
            if expert_alignment > _MAX_ROWS:
                raise ValueError(f"expert_alignment={expert_alignment} is more than {_MAX_ROWS}")
            return
        most_rows = self.num_ranks * self.config.max_tokens_per_rank * self.config.top_k
        if expert_alignment > 1 and most_rows + self.num_local_experts * (expert_alignment - 1) > _MAX_ROWS:
            raise ValueError(f"expert_alignment={expert_alignment} could pad the rows of a rank beyond {_MAX_ROWS}")

    def _check_combine(self, y: Tensor, handle: Handle) -> None:
        self._check_open()
        self._check_handle(handle)
        _check_tensor("y", y, _DTYPES, self.device)

    def _check_output(self, output: str, x: Tensor) -> None:
        if output not in ("same", "fp8"):
            raise ValueError(f"output must be 'same' or 'fp8', not {output!r}")
        if output == "same":
            return
        if self.config.wire_dtype != "fp8":
            raise ValueError(f"output='fp8' needs wire_dtype='fp8', not {self.config.wire_dtype!r}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "output='fp8' is for an x without gradient, since autograd would round gradients of FP8 rows to FP8: "
                "detach x, or take output='same'"
            )

    def _check_handle(self, handle: Handle) -> None:
        if not isinstance(handle, Handle):
            hint = ": pass its .handle" if isinstance(handle, DispatchResult) else ""
            raise ValueError(f"handle must be the handle of a DispatchResult, not a {type(handle).__name__}{hint}")
        if handle.group != self._group:
            raise ValueError("the handle belongs to another ExpertParallel (another group or configuration)")


def refuse(group: dist.ProcessGroup | None, error: ValueError) -> NoReturn:
    """Instead of a construction that cannot be: raises on all ranks, so that none waits for this one."""
    if group is not None:
        group_registry.acquire(group, error if isinstance(error, ConfigError) else ConfigError(str(error)))
    raise error


def _check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, not a {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(str(dtype) for dtype in dtypes)}, not {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but this ExpertParallel was made for device='{device}'")
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous (strides are {_strides(tensor)}); call .contiguous()")


def _check_waves(waves: int, max_tokens_per_rank: int) -> None:
    if isinstance(waves, bool) or not isinstance(waves, int) or waves < 1:
        raise ValueError(f"waves must be a positive integer, not {waves!r}")
    most = max(_LEAST_MOST_WAVES, max_tokens_per_rank)
    if waves > most:
        raise ValueError(
            f"waves={waves} is more than {most}: a rank has at most {max_tokens_per_rank} tokens to divide"
        )


def _check_not_compiling(name: str) -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{name} cannot be compiled: call it outside, or dispatch, combine and moe inside")


def _strides(tensor: Tensor) -> object:
    return tensor.stride() if tensor.layout == torch.strided else tensor.layout


def _result(rows: Tensor, handle: Handle, scales: Tensor | None = None) -> DispatchResult:
    is_static = handle.capacity is not None
    return DispatchResult(
        x=rows,
        tokens_per_expert=None if is_static else handle.tokens_per_expert,
        offsets=handle.offsets,
        weights=handle.weights,
        handle=handle,
        scales=scales,
        counts=handle.tokens_per_expert if is_static else None,
        overflow=handle.overflow if is_static else None,
    )
