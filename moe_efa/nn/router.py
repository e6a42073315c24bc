"""The router: a linear map to logits, a routing rule, and what keeps the experts evenly loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_efa import routing
from moe_efa.nn.autocast import autocast_dtype
from moe_efa.nn.initialization import draw_seed, normal_
from moe_efa.routing import Routing

_SCORE_FUNCTIONS = ("softmax", "sigmoid")


class Router(nn.Module):
    """Selects ``top_k`` of ``num_experts`` experts for each token. Replicated: all ranks have the same parameters.

    Args:
        score_function: "softmax" (:func:`moe_efa.routing.softmax_topk`) or "sigmoid"
            (:func:`moe_efa.routing.sigmoid_group_topk`, with a correction bias).
        n_group, topk_group: groups of experts, for "sigmoid".
        norm_topk_prob, routed_scaling_factor: as in the routing functions.
        aux_loss_coef: if not 0, :attr:`aux_loss` is this times :func:`moe_efa.routing.balance_loss`.
        compute_dtype: the logits are computed in it, under autocast too; None takes the input's dtype, or that of
            autocast, as Mixtral and Qwen do.
        initializer_range, seed: as in :class:`SwiGLUExperts`.

    Attributes:
        weight: [E, H].
        e_score_correction_bias: [E] fp32 whatever dtype the module is cast to; None for "softmax".
        aux_loss: of the last forward, to be added to the loss; None without a coefficient and in a copy. Under
            reentrant activation checkpointing, whose forward has no graph, it has no gradient. A checkpoint inside a
            compiled function has no way out for it: torch refuses to compile a router with a coefficient there.
    """

    aux_loss: Tensor | None
    e_score_correction_bias: Tensor | None
    _counts: Tensor

    def __init__(
        self,
        *,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        score_function: str = "softmax",
        n_group: int = 1,
        topk_group: int = 1,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
        aux_loss_coef: float = 0.0,
        compute_dtype: torch.dtype | None = torch.float32,
        initializer_range: float = 0.02,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if score_function not in _SCORE_FUNCTIONS:
            raise ValueError(f"score_function must be one of {', '.join(_SCORE_FUNCTIONS)}, not {score_function!r}")
        if score_function == "softmax" and (n_group, topk_group) != (1, 1):
            raise ValueError('n_group and topk_group need score_function="sigmoid"')
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must be in [1, {num_experts}]")
        routing.check_groups(num_experts, top_k, n_group, topk_group)
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.score_function = score_function
        self.n_group, self.topk_group = n_group, topk_group
        self.norm_topk_prob, self.routed_scaling_factor = norm_topk_prob, routed_scaling_factor
        self.aux_loss_coef = aux_loss_coef
        self.compute_dtype = compute_dtype
        self.initializer_range = initializer_range
        self.seed = draw_seed(seed)
        self.aux_loss = None
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        with_bias = score_function == "sigmoid"
        bias = torch.empty(num_experts, device=device, dtype=torch.float32) if with_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        counts = torch.empty(num_experts, device=device, dtype=torch.int64)
        self.register_buffer("_counts", counts, persistent=False)  # since the last update of the bias
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values again, the same ones. Does nothing on the meta device."""
        normal_(self.weight.detach(), std=self.initializer_range, seed=self.seed, name="router")
        self._counts.zero_()
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias.zero_()

    def forward(self, x: Tensor, topk_idx: Tensor | None = None) -> Routing:
        """Select experts.

        Args:
            x: [..., S, H]; the dimension S is one sequence for the balance loss.
            topk_idx: [..., S, K] int64, pins the selection (to replay a recorded one); weights are computed as ever.

        Returns:
            :class:`moe_efa.routing.Routing`.
        """
        logits = self._logits(x)
        pinned = topk_idx is not None
        if self.score_function == "softmax":
            routed = routing.softmax_topk(
                logits,
                self.top_k,
                norm_topk_prob=self.norm_topk_prob,
                routed_scaling_factor=self.routed_scaling_factor,
                topk_idx=topk_idx,
            )
        else:
            routed = routing.sigmoid_group_topk(
                logits,
                self.top_k,
                e_score_correction_bias=self.e_score_correction_bias,
                n_group=self.n_group,
                topk_group=self.topk_group,
                norm_topk_prob=self.norm_topk_prob,
                routed_scaling_factor=self.routed_scaling_factor,
                topk_idx=topk_idx,
            )
        if self.aux_loss_coef:
            self.aux_loss = self.aux_loss_coef * routing.balance_loss(routed.scores, routed.topk_idx)
        elif self.aux_loss is not None:  # torch.compile refuses a store inside a checkpoint, even one of None
            self.aux_loss = None
        if not pinned and self.e_score_correction_bias is not None and routed.topk_weights.requires_grad:
            self._count_in_backward(routed)
        return routed

    def update_bias(self, rate: float = 1e-3, group: dist.ProcessGroup | None = None) -> None:
        """Move the correction bias against the imbalance since the last update, then count anew.

        To be called once per optimizer step, after the backward passes. A forward counts when a backward runs through
        its routing weights: once however often it is recomputed, in each pass of gradient accumulation, and not in
        evaluation. So a second backward through one graph (``retain_graph=True``) counts again, and nothing counts
        where the weights need no gradient: a frozen router whose input needs none, or a pinned selection.

        Args:
            rate: the size of the step.
            group: all ranks among which the router is replicated; their counts are added. Collective. None for one.

        Raises:
            ValueError: if there is no bias, with score_function="softmax".
        """
        if self.e_score_correction_bias is None:
            raise ValueError('there is no bias to update with score_function="softmax"')
        if group is not None:
            dist.all_reduce(self._counts, group=group)
        self.e_score_correction_bias.copy_(routing.corrected_bias(self.e_score_correction_bias, self._counts, rate))
        self._counts.zero_()

    def extra_repr(self) -> str:
        """For print(module)."""
        groups = f", {self.topk_group} of {self.n_group} groups" if self.n_group > 1 else ""
        return f"{self.score_function}, top {self.top_k} of {self.num_experts}{groups}, hidden_size={self.hidden_size}"

    def _logits(self, x: Tensor) -> Tensor:
        if self.compute_dtype is None:
            return torch.nn.functional.linear(x, self.weight.to(x.dtype))
        x, weight = x.to(self.compute_dtype), self.weight.to(self.compute_dtype)
        if not autocast_dtype(x):
            return torch.nn.functional.linear(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return torch.nn.functional.linear(x, weight)

    def _count_in_backward(self, routed: Routing) -> None:
        topk_idx = routed.topk_idx

        def count(_: Tensor) -> None:
            self._counts.add_(routing.tokens_per_expert(topk_idx, self.num_experts))

        routed.topk_weights.register_hook(count)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Casts spare the bias: steps of 1e-3 would vanish in bf16."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(moved.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """``assign=True`` brings tensors of any dtype; the bias stays in fp32."""
        super()._load_from_state_dict(*args, **kwargs)
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias = self.e_score_correction_bias.float()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the loss belongs to a graph that they have no part in."""
        return {**self.__dict__, "aux_loss": None}
