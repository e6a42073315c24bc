"""Dispatch and combine between the ranks of one node, without the native extension: Triton around torch's exchange.

It knows nothing of how rows travel: ``torch.distributed.all_to_all_single`` of the user's group moves them, over NVLink
where that is NCCL. Results and gradients have the bits of ``ExpertParallel`` whose one node is the group, but for
gradients of weights, which are within the bound of :mod:`.unpermute_backward`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from moe_efa.errors import ConfigError

from . import intra_node_ops as ops
from .checks import FLOATS, check_tensor
from .reference import SCALE_FORMATS

WIRE_DTYPES = ("auto", "bf16", "fp32", "fp8")
COMBINE_DTYPES = ("auto", "bf16", "fp32")
_FIELDS = ("num_experts", "hidden_size", "top_k", "wire_dtype", "combine_dtype", "fp8_scale")


@dataclass(frozen=True, eq=False)
class Handle:
    """The routing of one dispatch, for combine and for replays. Opaque; any number of them may be alive."""

    plan: ops.Plan = field(repr=False)
    weights: Tensor = field(repr=False)  # [rows] fp32, connected to topk_weights
    tokens_per_expert: Tensor = field(repr=False)
    num_tokens: int  # that this rank dispatched
    expert_alignment: int
    sizes: tuple[int, int, int] = field(repr=False)  # num_experts, hidden_size, top_k
    options: ops.Options = field(repr=False)

    @property
    def rows(self) -> int:
        """Rows that this rank received, padding included."""
        return self.weights.shape[0]


@dataclass(frozen=True, eq=False)
class DispatchResult:
    """The rows that this rank's experts got.

    Attributes:
        x: [rows, H] in the dispatched dtype, by expert, then source rank, then source token, then top-k position.
            Padding rows are zeros.
        tokens_per_expert: [E_local] int64 on the CPU, true counts without padding.
        offsets: [E_local + 1] int32, padded starts, each a multiple of ``expert_alignment``; ``offsets[-1] == rows``.
        weights: [rows] fp32 routing weights, 0 on padding, differentiable.
        handle: for :meth:`IntraNode.combine` and for replays.
    """

    x: Tensor
    tokens_per_expert: Tensor
    offsets: Tensor
    weights: Tensor
    handle: Handle


class IntraNode:
    """Dispatch and combine among the ranks of a group. Construction is collective, and so are the calls.

    The calls are those of :class:`moe_efa.ExpertParallel`, of which this is a part: no waves, halves, static sizes or
    FP8 results, no bound on waiting but the group's own. A row travels once for each (token, rank); a dispatch is three
    exchanges (counts, routing, rows; in FP8 a fourth of scales) and waits for the device once, to learn how many rows
    come; replays, combines and backward passes wait for nothing. Nothing here needs the ranks to be on one host.

    All ranks issue the same calls in the same order, with tensors of the same dtypes; the number of tokens may differ
    and be zero. Whether x and topk_weights require gradients is the same on all ranks, and every rank's results reach
    its loss. Calls may stand in functions for ``torch.compile(fullgraph=True)``. There are no second derivatives.

    Args:
        group: torch.distributed process group, whose backend moves tensors of their device (no reference is kept), or
            None for a single rank.
        num_experts: of the group, at most 4096; rank r of R owns ``[r * E / R, (r + 1) * E / R)``.
        hidden_size: elements of a token, H.
        top_k: selections of a token, K.
        wire_dtype: what dispatch sends: "auto" (x's dtype), "bf16", "fp32", or "fp8", quantized once for each token in
            blocks of 1x128. Gradients of combine travel in it too, but for "fp8" in their own dtype.
        combine_dtype: what a rank publishes its sums in, and what the sum over ranks is rounded to: "auto" (y's dtype),
            "bf16" or "fp32". Gradients of dispatch travel in it too.
        fp8_scale: "fp32", or "ue8m0" for powers of two.

    Raises:
        ConfigError: on every rank, if the configuration cannot work or differs between ranks.

    Example (a test runs it): a single rank with three experts, of which expert 1 gets both tokens.

        >>> node = IntraNode(None, num_experts=3, hidden_size=2, top_k=2)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> topk_idx, topk_weights = torch.tensor([[1, -1], [0, 1]]), torch.tensor([[0.5, 9.0], [0.25, 2.0]])
        >>> d = node.dispatch(x, topk_idx, topk_weights, expert_alignment=2)
        >>> d.x.tolist(), d.weights.tolist()
        ([[3.0, 4.0], [0.0, 0.0], [1.0, 2.0], [3.0, 4.0]], [0.25, 0.0, 0.5, 2.0])
        >>> d.tokens_per_expert.tolist(), d.offsets.tolist()
        ([1, 2, 0], [0, 2, 4, 4])
        >>> node.combine(10 * d.x, d.handle).tolist()
        [[5.0, 10.0], [67.5, 90.0]]
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        *,
        num_experts: int,
        hidden_size: int,
        top_k: int,
        wire_dtype: str = "auto",
        combine_dtype: str = "auto",
        fp8_scale: str = "fp32",
    ) -> None:
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise ConfigError("group must be a torch.distributed process group of which this rank is a member, or None")
        config = (num_experts, hidden_size, top_k, wire_dtype, combine_dtype, fp8_scale)
        self.rank, self.num_ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if group is not None:  # whatever is wrong is seen, and raised, by all ranks
            configs = [config] * self.num_ranks
            dist.all_gather_object(configs, config, group=group)
            for rank, other in enumerate(configs):
                for name, mine, first in zip(_FIELDS, other, configs[0], strict=True):
                    if mine != first:
                        raise ConfigError(f"rank {rank} was configured with {name}={mine!r}, rank 0 with {first!r}")
        for name, value in (("num_experts", num_experts), ("hidden_size", hidden_size), ("top_k", top_k)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, not {value!r}")
        if num_experts % self.num_ranks:
            raise ConfigError(f"num_experts={num_experts} is not a multiple of the group's {self.num_ranks} ranks")
        if num_experts > 4096:
            raise ConfigError(f"num_experts={num_experts} is not supported: at most 4096")
        if top_k > num_experts:
            raise ConfigError(f"top_k={top_k} is more than num_experts={num_experts}")
        for name, word, words in (
            ("wire_dtype", wire_dtype, WIRE_DTYPES),
            ("combine_dtype", combine_dtype, COMBINE_DTYPES),
            ("fp8_scale", fp8_scale, SCALE_FORMATS),
        ):
            if word not in words:
                raise ConfigError(f"{name}={word!r} is unknown; use one of {', '.join(words)}")
        self.num_experts, self.hidden_size, self.top_k = num_experts, hidden_size, top_k
        name = "" if group is None else group.group_name
        self._sizes = num_experts, hidden_size, top_k
        self._options = ops.Options(name, wire_dtype, combine_dtype, fp8_scale)

    @property
    def num_local_experts(self) -> int:
        """Experts that this rank owns, the first of which is ``rank * num_local_experts``."""
        return self.num_experts // self.num_ranks

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        handle: Handle | None = None,
        expert_alignment: int = 1,
    ) -> DispatchResult:
        """Send every token to the ranks that own the experts it selected. Collective; so is its backward.

        Args:
            x: [T, H] bf16 or fp32, contiguous, on a CUDA device (on the CPU only under ``TRITON_INTERPRET=1``); T may
                differ between ranks and be 0.
            topk_idx: [T, K] int64 global expert ids, -1 for none. Equal ids in a row give separate rows.
            topk_weights: [T, K] fp32; those of -1 selections are ignored and get gradient 0.
            handle: repeat an earlier dispatch with other values: same T, no topk_idx, no topk_weights. Offsets, weights
                and alignment are the earlier ones.
            expert_alignment: every expert's rows are padded with zeros to a multiple of this.

        Returns:
            :class:`DispatchResult` with the rows of this rank's experts, in an order that depends on the routing alone.

        Raises:
            ValueError: for arguments that do not fit, before anything is sent, or (on the CPU) an id outside
                [-1, num_experts); on a GPU that is a device-side assertion. On all ranks, if dtypes of x differ.
        """
        check_tensor("x", x, shape=("num_tokens", self.hidden_size), dtypes=FLOATS)
        num_tokens = x.shape[0]
        if handle is not None:
            self._check_handle(handle)
            if topk_idx is not None or topk_weights is not None:
                raise ValueError("topk_idx and topk_weights are not allowed with a handle, which has its own")
            if expert_alignment not in (1, handle.expert_alignment):
                raise ValueError(
                    f"expert_alignment={expert_alignment} differs from the handle's {handle.expert_alignment}"
                )
            if num_tokens != handle.num_tokens:
                raise ValueError(f"x has {num_tokens} tokens, but the handle's dispatch had {handle.num_tokens}")
            rows = ops.replay(
                x,
                handle.plan,
                expert_alignment=handle.expert_alignment,
                num_rows=handle.rows,
                options=self._options,
            )
            return _result(rows, handle)
        if topk_idx is None or topk_weights is None:
            raise ValueError("dispatch needs topk_idx and topk_weights, or a handle")
        check_tensor("topk_idx", topk_idx, shape=(num_tokens, self.top_k), dtypes=(torch.int64,))
        check_tensor("topk_weights", topk_weights, shape=(num_tokens, self.top_k), dtypes=(torch.float32,))
        for name, tensor in (("topk_idx", topk_idx), ("topk_weights", topk_weights)):
            if tensor.device != x.device:
                raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
        received = ops.dispatch(
            x,
            topk_idx,
            topk_weights,
            num_experts=self.num_experts,
            expert_alignment=expert_alignment,
            options=self._options,
        )
        handle = Handle(
            plan=received.plan,
            weights=received.weights,
            tokens_per_expert=received.tokens_per_expert,
            num_tokens=num_tokens,
            expert_alignment=expert_alignment,
            sizes=self._sizes,
            options=self._options,
        )
        return _result(received.rows, handle)

    def combine(self, y: Tensor, handle: Handle, *, weighted: bool = True) -> Tensor:
        """Bring the experts' rows back to their tokens and add them. Collective; so is its backward.

        Args:
            y: [rows, H] bf16 or fp32, contiguous, in the order of the dispatched rows. Padding rows are never read.
            handle: of the dispatch.
            weighted: multiply rows by the dispatched weights; False for a caller who did so already.

        Returns:
            [T, H] in y's dtype: ``sum over k of topk_weights[t, k] * y[row(t, k)]``; zeros where nothing was selected.

        Raises:
            ValueError: for arguments that do not fit, before anything is sent.
        """
        self._check_handle(handle)
        check_tensor("y", y, shape=("rows", self.hidden_size), dtypes=FLOATS)
        return ops.combine(
            y,
            handle.weights if weighted else None,
            handle.plan,
            expert_alignment=handle.expert_alignment,
            num_rows=handle.rows,
            options=self._options,
        )

    def _check_handle(self, handle: Handle) -> None:
        if not isinstance(handle, Handle):
            hint = ": pass its .handle" if isinstance(handle, DispatchResult) else ""
            raise ValueError(f"handle must be the handle of a DispatchResult, not a {type(handle).__name__}{hint}")
        if (handle.sizes, handle.options) != (self._sizes, self._options):
            raise ValueError("the handle belongs to another group or configuration")


def _result(rows: Tensor, handle: Handle) -> DispatchResult:
    return DispatchResult(rows, handle.tokens_per_expert, handle.plan.offsets, handle.weights, handle)
