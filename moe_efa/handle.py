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
    num_tokens: int  # that this rank dispatched
    expert_alignment: int
    top_k: int
    group: str = field(repr=False)  # name of the native group whose plan this is

    @property
    def rows(self) -> int:
        """Rows that this rank received, padding included."""
        return self.weights.shape[0]


@dataclass(frozen=True, eq=False)
class DispatchResult:
    """The rows that this rank's experts got.

    Attributes:
        x: [rows, H] in the dispatched dtype, or float8_e4m3fn for ``output="fp8"``, expert-major: by expert, then
            source rank, then source token, then top-k position. Padding rows are zeros.
        tokens_per_expert: [E_local] int64 on the CPU, true counts without padding.
        offsets: [E_local + 1] int32, padded starts, each a multiple of ``expert_alignment``; ``offsets[-1] == rows``,
            and ``offsets[1:]`` fits ``torch.nn.functional.grouped_mm``.
        weights: [rows] fp32 routing weights, 0 on padding, differentiable.
        handle: for :meth:`ExpertParallel.combine` and for replays.
        scales: [rows, ceil(H / 128)] fp32 for ``output="fp8"``, 1 on padding: the values of a row are x times the scale
            of their block of 128. None otherwise.
    """

    x: Tensor
    tokens_per_expert: Tensor
    offsets: Tensor
    weights: Tensor
    handle: Handle
    scales: Tensor | None = None


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
