"""What can be timed: an exchange brings rows to the experts' ranks, and their results back."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from moe_efa.bench.inputs import Inputs
from moe_efa.expert_parallel import ExpertParallel
from moe_efa.handle import DispatchResult


class Exchange(Protocol):
    """Dispatch and combine as :class:`moe_efa.ExpertParallel` defines them, for selections without -1."""

    def dispatch(self, inputs: Inputs) -> tuple[Tensor, Any]:
        """The rows [rows, H] of this rank's experts, by expert, source rank, token; and what combine needs."""

    def combine(self, y: Tensor, handle: Any) -> Tensor:
        """y [rows, H] -> the weighted sums [T, H] of this rank's tokens, in y's dtype."""


class MoeEfaExchange:
    """The library itself."""

    def __init__(self, ep: ExpertParallel) -> None:
        self._ep = ep

    def dispatch(self, inputs: Inputs) -> tuple[Tensor, DispatchResult]:
        d = self._ep.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights)
        return d.x, d

    def combine(self, y: Tensor, handle: DispatchResult) -> Tensor:
        return self._ep.combine(y, handle.handle)
