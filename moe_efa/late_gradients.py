"""Gradients of weights that several calls share, computed late: while backward waits for something else.

A node of autograd stands between the weights and the calls. The backward of a call queues what gives its part of the
gradients and goes on; whoever waits runs some of the queue; the node, which autograd runs once all calls have queued,
runs the rest and passes on the sums. Parts are added in the order in which they were queued, whenever that happens, so
the sums have the bits that autograd's own would have. To hooks of the weights, to what accumulates their gradients and
to torch.autograd.grad nothing has changed. What is queued keeps its memory until it has run.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Parts = Callable[[], Sequence[Tensor | None]]


class LateGradients:
    """Weights for the calls of one forward pass.

    Attributes:
        weights: those given, behind the node.
        queue: for the contexts of the calls. They must not keep the weights' node, which keeps them.
    """

    def __init__(self, *weights: Tensor) -> None:
        self.queue = Queue([weight.dtype for weight in weights], [weight.requires_grad for weight in weights])
        self.weights: tuple[Tensor, ...] = _Weights.apply(self.queue, *weights)  # type: ignore[no-untyped-call]


class Queue:
    """What is still to be computed, separately for each pass over the graph."""

    def __init__(self, dtypes: list[torch.dtype], needed: list[bool]) -> None:
        self.dtypes, self.needed = dtypes, needed
        self._passes: dict[int, _Pass] = {}

    def add(self, parts: Parts) -> None:
        """In a backward: ``parts()`` gives a new tensor for each weight that is ``needed``, and None for the others."""
        current = torch._C._current_graph_task_id()
        if current not in self._passes:
            self._passes.clear()  # what a pass left that ended with an error
            self._passes[current] = _Pass(len(self.dtypes))
        self._passes[current].queued.append(parts)

    def run_while(self, waiting: Callable[[], bool]) -> None:
        """In a backward: run what is queued, one part after the other, as long as there is any and ``waiting()``.

        What fails is raised by :meth:`take_sums`: ranks run different numbers of parts here, and an error must not
        make them issue different calls.
        """
        found = self._passes.get(torch._C._current_graph_task_id())
        while found is not None and found.queued and found.error is None and waiting():
            try:
                found.run_next(self.dtypes)
            except Exception as error:
                found.error = error

    def take_sums(self) -> list[Tensor | None]:
        """Run what is left. The sums, in the weights' dtypes. Raises what a part raised."""
        found = self._passes.pop(torch._C._current_graph_task_id(), None)
        if found is None:
            return [None] * len(self.dtypes)
        if found.error is not None:
            raise found.error
        while found.queued:
            found.run_next(self.dtypes)
        return found.sums


class _Pass:
    def __init__(self, num_weights: int) -> None:
        self.queued: collections.deque[Parts] = collections.deque()
        self.sums: list[Tensor | None] = [None] * num_weights
        self.error: Exception | None = None

    def run_next(self, dtypes: list[torch.dtype]) -> None:
        parts = self.queued.popleft()()
        for at, (part, dtype) in enumerate(zip(parts, dtypes, strict=True)):
            total = self.sums[at]
            if part is not None:
                self.sums[at] = part.to(dtype) if total is None else total.add_(part)


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queue: Queue, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.queue = queue
        ctx.set_materialize_grads(False)
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        sums = ctx.queue.take_sums()
        for at, grad in enumerate(grads):  # of calls that do not queue
            if grad is not None:
                sums[at] = grad if sums[at] is None else sums[at] + grad
        return None, *sums
