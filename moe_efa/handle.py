"""What dispatch and the halves of calls return. It does not know how anything is sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Handle:
    """The routing of one dispatch, for combine, for backward and for replays. Opaque: its fields may change.

    Any number of handles may be alive, and used in any order that is the same on all ranks. A handle keeps at most 16
    bytes per dispatched row, and through ``weights`` the autograd graph of the dispatch that made it. It may enter and
    leave compiled functions. A copy, as of copy.deepcopy, works while the original lives.
    """

    plan: Tensor = field(repr=False)  # see plan_tensor.py
    weights: Tensor = field(repr=False)  # [rows] fp32, connected to topk_weights
    tokens_per_expert: Tensor = field(repr=False)
    offsets: Tensor = field(repr=False)
    overflow: Tensor = field(repr=False)  # [] int64 in static mode, otherwise [0]
    num_tokens: int  # that this rank dispatched
    expert_alignment: int
    top_k: int
    capacity: int | None  # of static mode
    group: str = field(repr=False)  # name of the native group whose plan this is

    @property
    def rows(self) -> int:
        """Rows that this rank received, padding included."""
        return self.weights.shape[0]


@dataclass(frozen=True, eq=False)
class DispatchResult:
    """The rows that this rank's experts got.

    In static mode (``capacity=C``) x, weights and scales have C rows whatever came. Behind ``offsets[-1]`` they are as
    padding. Of more rows than fit, in the order of x, those whose place is not below C, rounded down to a multiple of
    ``expert_alignment``, are not there, and ``counts`` and ``offsets`` are those of the others.

    Attributes:
        x: [rows, H] in the dispatched dtype, or float8_e4m3fn for ``output="fp8"``, expert-major: by expert, then
            source rank, then source token, then top-k position. Padding rows are zeros. In static mode [C, H].
        tokens_per_expert: [E_local] int64 on the CPU, true counts without padding. None in static mode.
        offsets: [E_local + 1] int32, padded starts, each a multiple of ``expert_alignment``; ``offsets[-1] == rows``
            (in static mode: <= C), and ``offsets[1:]`` fits ``torch.nn.functional.grouped_mm``.
        weights: [rows] fp32 routing weights, 0 on padding, differentiable.
        handle: for :meth:`ExpertParallel.combine` and for replays.
        scales: [rows, ceil(H / 128)] fp32 for ``output="fp8"``, 1 on padding: the values of a row are x times the scale
            of their block of 128. None otherwise.
        counts: in static mode [E_local] int64 on x's device: the rows of each expert that are in x, without padding.
        overflow: in static mode [] int64 on x's device. 0 while nothing is known to be lost; otherwise the capacity
            that would have been enough for the ranks concerned: this one, if its experts had more rows than its
            capacity, as is known after dispatch, and every rank that lost rows of this rank's tokens, as is known after
            combine, or after backward. A live word that those calls write, so read it when they are done; operations
            on it inside a compiled function may run before.
    """

    x: Tensor
    tokens_per_expert: Tensor | None
    offsets: Tensor
    weights: Tensor
    handle: Handle
    scales: Tensor | None = None
    counts: Tensor | None = None
    overflow: Tensor | None = None


class PendingDispatch:
    """A dispatch under way. Made by :meth:`ExpertParallel.dispatch_start`."""

    def __init__(self, finish: Callable[[], DispatchResult]) -> None:
        self._finish: Callable[[], DispatchResult] | None = finish

    def finish(self) -> DispatchResult:
        """Wait for the rows of this rank's experts. Once; ValueError if it was called before."""
        finish, self._finish = self._finish, None
        if finish is None:
            raise ValueError("this dispatch was finished before")
        return finish()


class PendingCombine:
    """A combine under way. Made by :meth:`ExpertParallel.combine_start`."""

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish: Callable[[], Tensor] | None = finish

    def finish(self) -> Tensor:
        """Wait for the tokens' results. Once; ValueError if it was called before."""
        finish, self._finish = self._finish, None
        if finish is None:
            raise ValueError("this combine was finished before")
        return finish()
