"""MoELayer: router, dispatch, experts, combine and shared experts as one module."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_efa import device as device_of
from moe_efa import routing
from moe_efa.config import ExpertParallelConfig
from moe_efa.expert_parallel import ExpertParallel, refuse
from moe_efa.handle import DispatchResult
from moe_efa.nn.compiling import may_store
from moe_efa.nn.experts import SwiGLUExperts
from moe_efa.nn.initialization import draw_seed
from moe_efa.nn.router import Router
from moe_efa.nn.shared import SharedExperts

_PLACEMENTS = ("before_down_proj", "at_combine")


class MoELayer(nn.Module):
    """A Mixture-of-Experts feed-forward layer over the ranks of a group. Forward and backward are collective.

    Every rank holds ``num_experts / R`` of the experts; router and shared experts are replicated. So a trainer reduces
    the gradients of all parameters over the group except those of ``layer.experts``, which are sums over the tokens of
    all ranks already. With a loss that is the sum of the ranks' losses nothing is scaled; where the trainer averages
    gradients over R ranks, it divides those of ``layer.experts`` by R.

    ``copy.deepcopy`` shares the native group, and every copy is closed by itself; to save a layer, save its state_dict.
    Under autocast the experts follow it, the router keeps router_dtype, and what travels and comes back has x's dtype.
    In a checkpoint inside a compiled function torch allows no stores: topk_idx and tokens_per_expert then stay as they
    were, and an aux_loss_coef is refused; a compiled function around a layer without one has all of them.

    Args:
        group: torch.distributed process group to build an :class:`ExpertParallel` from (collective); None for one rank.
        expert_parallel: an existing one instead of a group, from which num_experts, hidden_size and top_k are taken.
        num_experts, hidden_size, top_k: E of all ranks, H, K.
        intermediate_size: of one expert.
        max_tokens_per_rank: most tokens of one forward on one rank.
        score_function, n_group, topk_group, norm_topk_prob, routed_scaling_factor, aux_loss_coef, router_dtype: see
            :class:`Router` (router_dtype is its compute_dtype).
        num_shared_experts: shared experts of ``intermediate_size`` each, added to the result.
        shared_expert_intermediate_size: their size together, if it is not ``num_shared_experts * intermediate_size``.
        shared_expert_gate: multiply them by a learned sigmoid, as Qwen2-MoE.
        recompute: see :class:`SwiGLUExperts`; the rows are kept, so nothing is sent again.
        apply_weights: "before_down_proj", or "at_combine", after the experts as Hugging Face does; that one keeps the
            experts' results for backward.
        expert_alignment: see :meth:`ExpertParallel.dispatch`.
        waves: see :meth:`ExpertParallel.moe`. With several waves, the gradients of the experts' parameters are computed
            while backward waits for gradients of tokens.
        capacity: static mode, as in :meth:`ExpertParallel.dispatch`: this rank's experts get so many rows, sizes stay
            on the device, and a CUDA graph may hold the layer. One wave. What did not fit shows in ``overflow``.
        initializer_range, seed: see :class:`SwiGLUExperts`. One seed serves all parts.
        device, dtype: of the parameters, and ``device`` of the tokens: None is where torch makes tensors.
        options: further arguments of :class:`ExpertParallel`, such as ``wire_dtype``; not with ``expert_parallel``.

    Attributes:
        capacity: may be changed between calls, on all ranks, but not from or to None.
        waves: may be changed between calls, on all ranks; with a capacity it is None or 1.
        router, experts, shared_experts: the parts; shared_experts may be None.
        tokens_per_expert: [E_local] int64 on the CPU, rows that this rank's experts got in the last forward. With a
            capacity on x's device, and of those that fit.
        overflow: with a capacity, that of the last forward's :class:`DispatchResult`; None before, and without one.
        topk_idx: [..., K], the last selection, as forward takes it to replay it; None before.
        aux_loss: the router's, of the last forward.

    Raises:
        ValueError: for arguments that do not fit. ConfigError is one.

    >>> layer = MoELayer(num_experts=4, hidden_size=8, intermediate_size=16, top_k=2, max_tokens_per_rank=32)
    >>> layer(torch.randn(2, 16, 8)).shape
    torch.Size([2, 16, 8])
    >>> int(layer.tokens_per_expert.sum())
    64
    """

    topk_idx: Tensor | None
    tokens_per_expert: Tensor
    overflow: Tensor | None

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        intermediate_size: int,
        expert_parallel: ExpertParallel | None = None,
        num_experts: int | None = None,
        hidden_size: int | None = None,
        top_k: int | None = None,
        max_tokens_per_rank: int | None = None,
        score_function: str = "softmax",
        n_group: int = 1,
        topk_group: int = 1,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
        aux_loss_coef: float = 0.0,
        router_dtype: torch.dtype | None = torch.float32,
        num_shared_experts: int = 0,
        shared_expert_intermediate_size: int | None = None,
        shared_expert_gate: bool = False,
        recompute: bool = False,
        apply_weights: str = "before_down_proj",
        expert_alignment: int = 1,
        waves: int | None = None,
        capacity: int | None = None,
        initializer_range: float = 0.02,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "num_experts": num_experts,
            "hidden_size": hidden_size,
            "top_k": top_k,
            "max_tokens_per_rank": max_tokens_per_rank,
        }
        # All that can be wrong with the arguments shows before the group is built, which the other ranks take part in.
        try:
            if apply_weights not in _PLACEMENTS:
                raise ValueError(f"apply_weights must be one of {', '.join(_PLACEMENTS)}, not {apply_weights!r}")
            counts = {"intermediate_size": intermediate_size, "expert_alignment": expert_alignment, "waves": waves}
            for name, value in counts.items():
                if name == "waves" and value is None:
                    continue
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ValueError(f"{name} must be a positive integer, not {value!r}")
            if capacity is not None:
                if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 0:
                    raise ValueError(f"capacity must be an integer from 0 on, not {capacity!r}")
                _check_one_wave(waves)
            config = _config(group, expert_parallel, sizes, options)
            if expert_parallel is None:
                device_of.resolve(_where_tokens_are(device))
            common: dict[str, Any] = {
                "hidden_size": config.hidden_size,
                "initializer_range": initializer_range,
                "seed": draw_seed(seed),
                "device": device,
                "dtype": dtype,
            }
            router = Router(
                num_experts=config.num_experts,
                top_k=config.top_k,
                score_function=score_function,
                n_group=n_group,
                topk_group=topk_group,
                norm_topk_prob=norm_topk_prob,
                routed_scaling_factor=routed_scaling_factor,
                aux_loss_coef=aux_loss_coef,
                compute_dtype=router_dtype,
                **common,
            )
            shared_size = shared_expert_intermediate_size or num_shared_experts * intermediate_size
            shared_experts = (
                SharedExperts(intermediate_size=shared_size, gated=shared_expert_gate, **common)
                if shared_size
                else None
            )
        except ValueError as error:
            if expert_parallel is None:
                refuse(group, error)
            raise
        self._owns_expert_parallel = expert_parallel is None
        if expert_parallel is None:
            with torch.device("cpu"):  # a layer may be built on the meta device, the exchange of addresses may not
                expert_parallel = ExpertParallel(group, **sizes, device=_where_tokens_are(device), **options)
        self.expert_parallel = expert_parallel
        local = expert_parallel.num_local_experts
        self.apply_weights, self.expert_alignment, self.waves = apply_weights, expert_alignment, waves
        self.capacity = capacity
        self.topk_idx = self.overflow = None
        self.tokens_per_expert = torch.zeros(local, dtype=torch.int64, device="cpu")
        self.router = router
        try:
            self.experts = SwiGLUExperts(
                num_experts=config.num_experts,
                intermediate_size=intermediate_size,
                num_local_experts=local,
                first_expert=expert_parallel.rank * local,
                recompute=recompute,
                **common,
            )
        except BaseException as error:  # no memory: the others would wait for this rank
            if self._owns_expert_parallel:
                expert_parallel.__exit__(type(error), error, None)
            raise
        self.shared_experts = shared_experts

    @property
    def aux_loss(self) -> Tensor | None:
        """Balance loss of the last forward times aux_loss_coef, to be added to the loss; None without a coefficient."""
        return self.router.aux_loss

    def forward(self, x: Tensor, topk_idx: Tensor | None = None, topk_weights: Tensor | None = None) -> Tensor:
        """Collective, as its backward is.

        Args:
            x: [..., H] bf16 or fp32. The number of tokens may differ between ranks and be 0.
            topk_idx: [..., K] int64, pins the selection; the router still gives the weights. -1 selects nothing.
            topk_weights: [..., K] fp32, instead of the router's, which is not called then.

        Returns:
            [..., H] in x's dtype.
        """
        hidden_size = self.expert_parallel.config.hidden_size
        if x.shape[-1:] != (hidden_size,) or x.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"x must be [..., {hidden_size}] in bf16 or fp32, not {list(x.shape)} in {x.dtype}")
        if self.capacity is not None:
            _check_one_wave(self.waves)
        if topk_weights is None:
            topk_idx, topk_weights, _ = self.router(x, topk_idx)
        elif topk_idx is None:
            raise ValueError("topk_weights need topk_idx")
        records = may_store()
        if records:
            self.topk_idx = topk_idx.detach()
        tokens = x.reshape(-1, x.shape[-1]).contiguous()
        top_k = topk_idx.shape[-1]
        routing = topk_idx.reshape(-1, top_k).contiguous(), topk_weights.reshape(-1, top_k).contiguous()
        waves = 1 if self.capacity is not None else self.expert_parallel.num_waves(self.waves, dtype=x.dtype)
        overflow = None
        if waves > 1:
            out, tokens_per_expert = self._in_waves(waves, tokens, *routing)
        else:
            received = self.expert_parallel.dispatch(
                tokens, *routing, expert_alignment=self.expert_alignment, capacity=self.capacity
            )
            counts = received.tokens_per_expert if self.capacity is None else received.counts
            assert counts is not None
            tokens_per_expert, overflow = counts, received.overflow
            early = self.apply_weights == "before_down_proj"
            options = {"static": True} if self.capacity is not None and type(self.experts) is SwiGLUExperts else {}
            y = self.experts(received.x, received.offsets, received.weights if early else None, **options)
            out = self.expert_parallel.combine(y, received.handle, weighted=not early)
        if records:
            self.tokens_per_expert, self.overflow = tokens_per_expert, overflow
        if self.shared_experts is not None:
            out = out + self.shared_experts(tokens).to(out.dtype)
        return out.reshape(x.shape)

    def _in_waves(self, waves: int, tokens: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
        """-> out [T, H], tokens per expert of all waves."""
        early = self.apply_weights == "before_down_proj"
        late = self.experts.late_gradients() if type(self.experts) is SwiGLUExperts else None
        tokens_per_expert = torch.zeros_like(self.tokens_per_expert)

        def compute(received: DispatchResult) -> Tensor:
            assert received.tokens_per_expert is not None
            tokens_per_expert.add_(received.tokens_per_expert)
            options = {} if late is None else {"late": late}
            y: Tensor = self.experts(received.x, received.offsets, received.weights if early else None, **options)
            return y

        out = self.expert_parallel.moe_waves(
            tokens,
            topk_idx,
            topk_weights,
            compute,
            waves=waves,
            weighted=not early,
            expert_alignment=self.expert_alignment,
            late=late,
        )
        return out, tokens_per_expert

    def update_bias(self, rate: float = 1e-3, group: dist.ProcessGroup | None = None) -> None:
        """See :meth:`Router.update_bias`: once per optimizer step, with the group over which the router is replicated.

        Raises:
            ValueError: without a group where there are several ranks.
        """
        if group is None and self.expert_parallel.num_ranks > 1:
            raise ValueError("update_bias needs the group: ranks with biases of their own would route differently")
        self.router.update_bias(rate, group)

    def selections_per_expert(self) -> Tensor:
        """[E] int64: how often this rank's tokens selected each expert of the layer in the last forward."""
        if self.topk_idx is None:
            return torch.zeros(self.router.num_experts, dtype=torch.int64, device=self.expert_parallel.device)
        return routing.tokens_per_expert(self.topk_idx, self.router.num_experts)

    def reset_parameters(self) -> None:
        """Initial values again, the same ones on any number of ranks. Does nothing on the meta device."""
        self.router.reset_parameters()
        self.experts.reset_parameters()
        if self.shared_experts is not None:
            self.shared_experts.reset_parameters()

    def close(self) -> None:
        """Close the ExpertParallel that this layer built. Collective; one that was passed in stays open."""
        if self._owns_expert_parallel:
            self.expert_parallel.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> MoELayer:
        """A layer with parameters of its own; to be closed by itself if this one built its ExpertParallel."""
        if not self._owns_expert_parallel:
            memo.setdefault(id(self.expert_parallel), self.expert_parallel)
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
        return copied


def _check_one_wave(waves: int | None) -> None:
    if waves not in (None, 1):
        raise ValueError(f"waves={waves} with a capacity, which is of one wave")


def _where_tokens_are(device: torch.device | str | None) -> torch.device | str | None:
    """Where the parameters are to be; None where that is nowhere yet."""
    where = torch.get_default_device() if device is None else device
    return None if str(where) == "meta" else where


def _config(
    group: dist.ProcessGroup | None,
    existing: ExpertParallel | None,
    sizes: dict[str, Any],
    options: dict[str, Any],
) -> ExpertParallelConfig:
    """That of the existing one, if the sizes are its own, or of the one to be built."""
    if existing is None:
        missing = [name for name, size in sizes.items() if size is None]
        if missing:
            raise ValueError(f"{', '.join(missing)} must be given, or an expert_parallel that has them")
        return ExpertParallelConfig(**sizes, **options)
    if group is not None or options:
        given = ", ".join((["group"] if group is not None else []) + sorted(options))
        raise ValueError(f"an existing expert_parallel has its own {given}")
    for name, size in sizes.items():
        if size is not None and size != getattr(existing.config, name):
            raise ValueError(f"{name}={size} differs from the expert_parallel's {getattr(existing.config, name)}")
    return existing.config
