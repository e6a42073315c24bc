"""Which experts a token selects, and with what weights: pure functions of the router's logits.

They do what the models' published code does, in the same order of operations, so that a checkpoint routes the same
tokens to the same experts. Everything is fp32. ``topk_idx`` is not differentiable, weights and scores are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """One selection per (token, k).

    Attributes:
        topk_idx: [..., K] int64 expert ids; -1 for none, which only a pinned selection holds.
        topk_weights: [..., K] fp32, 0 where nothing is selected.
        scores: [..., E] fp32, what the weights were taken from: softmax probabilities or sigmoids.
    """

    topk_idx: Tensor
    topk_weights: Tensor
    scores: Tensor


def softmax_topk(
    logits: Tensor,
    top_k: int,
    *,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    topk_idx: Tensor | None = None,
) -> Routing:
    """Softmax over all experts, then the ``top_k`` largest: Mixtral, Qwen2-MoE and Qwen3-MoE, OLMoE.

    Args:
        logits: [..., E].
        norm_topk_prob: divide the selected probabilities by their sum.
        routed_scaling_factor: multiplies the weights.
        topk_idx: [..., K] int64, a pinned selection: only weights are computed. -1 entries get weight 0.

    >>> logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    >>> softmax_topk(logits, 2).topk_idx
    tensor([[1, 3]])
    >>> softmax_topk(logits, 2).topk_weights  # 0.4 / 0.7 and 0.3 / 0.7
    tensor([[0.5714, 0.4286]])
    >>> softmax_topk(logits, 2, topk_idx=torch.tensor([[2, -1]]), norm_topk_prob=False).topk_weights
    tensor([[0.2000, 0.0000]])
    """
    scores = logits.softmax(-1, dtype=torch.float32)
    if topk_idx is None:
        weights, topk_idx = scores.topk(top_k, dim=-1)
    else:
        weights = _gather(scores, topk_idx, top_k)
    if norm_topk_prob:
        weights = weights / _total(weights, topk_idx)
    if routed_scaling_factor != 1.0:
        weights = weights * routed_scaling_factor
    return Routing(topk_idx, weights, scores)


def kept_groups(groups: Tensor, out: Tensor) -> Tensor:
    """[..., G, E / G] biased scores and [..., G] which groups are out -> [..., E], where those come after all others.

    A bias of -inf, which takes an expert out, must not put it level with those; it then counts as the lowest number.
    """
    lowest = torch.finfo(groups.dtype).min
    return groups.clamp(min=lowest).masked_fill(out[..., None], float("-inf")).flatten(-2)


def sigmoid_group_topk(
    logits: Tensor,
    top_k: int,
    *,
    e_score_correction_bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    topk_idx: Tensor | None = None,
) -> Routing:
    """Sigmoid scores, selection by score plus bias within the best groups: DeepSeek-V3, Kimi-K2, GLM-4.5.

    The experts are ``n_group`` groups of equal size. A group counts as much as its two best biased scores together, the
    ``topk_group`` best groups stay, and from these the ``top_k`` experts with the best biased scores are selected. The
    bias decides who is selected; the weights are the scores without it.

    Args:
        logits: [..., E].
        e_score_correction_bias: [E] fp32; None is zero.
        norm_topk_prob: divide the selected scores by their sum plus 1e-20.
        routed_scaling_factor: multiplies the weights.
        topk_idx: as in :func:`softmax_topk`.

    Raises:
        ValueError: if the groups do not divide the experts or cannot hold ``top_k`` of them.

    Expert 3 is the best but its group is not: 0.9 + 0.1 < 0.6 + 0.5.

    >>> scores = torch.tensor([[0.6, 0.5, 0.1, 0.9]])
    >>> logits = torch.logit(scores)
    >>> r = sigmoid_group_topk(logits, 2, n_group=2, topk_group=1)
    >>> r.topk_idx.sort().values, r.topk_weights.sort().values  # 0.5 / 1.1 and 0.6 / 1.1
    (tensor([[0, 1]]), tensor([[0.4545, 0.5455]]))
    >>> bias = torch.tensor([0.0, 0.0, 0.2, 0.0])  # 0.9 + 0.3 > 1.1; the weights do not see the bias
    >>> r = sigmoid_group_topk(logits, 2, e_score_correction_bias=bias, n_group=2, topk_group=1)
    >>> r.topk_idx.sort().values, r.topk_weights.sort().values
    (tensor([[2, 3]]), tensor([[0.1000, 0.9000]]))
    """
    check_groups(logits.shape[-1], top_k, n_group, topk_group)
    scores = logits.float().sigmoid()
    if topk_idx is None:
        with torch.no_grad():
            biased = scores if e_score_correction_bias is None else scores + e_score_correction_bias
            if topk_group < n_group:
                groups = biased.view(*biased.shape[:-1], n_group, biased.shape[-1] // n_group)
                group_scores = groups.topk(2, dim=-1).values.sum(-1)
                best = group_scores.topk(topk_group, dim=-1, sorted=False).indices
                out = torch.ones_like(group_scores, dtype=torch.bool).scatter_(-1, best, False)
                biased = kept_groups(groups, out)
            topk_idx = biased.topk(top_k, dim=-1, sorted=False).indices
        weights = scores.gather(-1, topk_idx)
    else:
        weights = _gather(scores, topk_idx, top_k)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(topk_idx, weights * routed_scaling_factor, scores)


def check_groups(num_experts: int, top_k: int, n_group: int, topk_group: int) -> None:
    """Raise ValueError unless ``top_k`` experts can come from ``topk_group`` of ``n_group`` groups."""
    if not 1 <= topk_group <= n_group or num_experts % n_group:
        raise ValueError(
            f"n_group={n_group} and topk_group={topk_group} do not fit {num_experts} experts: groups are of equal size "
            "and topk_group is in [1, n_group]"
        )
    size = num_experts // n_group
    if top_k > topk_group * size or (topk_group < n_group and size < 2):
        raise ValueError(
            f"top_k={top_k} experts cannot come from {topk_group} groups of {size} (a group has at least two experts)"
        )


def tokens_per_expert(topk_idx: Tensor, num_experts: int) -> Tensor:
    """How many selections each expert got: [E] int64. -1 entries do not count.

    >>> tokens_per_expert(torch.tensor([[0, 2], [2, -1]]), 4)
    tensor([1, 0, 2, 0])
    """
    places = topk_idx.reshape(-1) + 1  # -1 goes to place 0, which is dropped
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=topk_idx.device)
    return counts.scatter_add_(0, places, torch.ones_like(places))[1:]


def balance_loss(scores: Tensor, topk_idx: Tensor) -> Tensor:
    """How unevenly sequences load the experts: 1 where everything is even, up to E; differentiable in the scores.

    For each sequence ``E * sum over e of f_e * p_e``: f_e is the fraction of its selections that went to e, p_e the
    mean of its normalised scores of e. The result is the mean over sequences (Switch Transformer, equation 4;
    DeepSeek-V3, equation 17). [T, E] counts as one sequence. As a mean over sequences it does not depend on how these
    are spread over ranks, provided that a sequence is on one rank.

    Args:
        scores: [..., S, E].
        topk_idx: [..., S, K].

    >>> scores = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
    >>> balance_loss(scores, torch.tensor([[0], [0]]))  # 2 * (1.0 * 0.75 + 0.0 * 0.25)
    tensor(1.5000)
    >>> balance_loss(scores, torch.tensor([[0], [1]]))  # 2 * (0.5 * 0.75 + 0.5 * 0.25)
    tensor(1.)
    """
    *_, sequence_length, num_experts = scores.shape
    if scores.numel() == 0:
        return scores.sum()
    scores = scores.reshape(-1, sequence_length, num_experts)
    num_sequences = scores.shape[0]
    sequence = torch.arange(num_sequences, device=scores.device)[:, None]
    places = topk_idx.reshape(num_sequences, -1)
    places = torch.where(places < 0, -1, places + sequence * num_experts)
    counts = tokens_per_expert(places, num_sequences * num_experts).view(num_sequences, num_experts)
    fractions = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    means = (scores / scores.sum(-1, keepdim=True)).mean(1)
    return num_experts * (fractions * means).sum(-1).mean()


def corrected_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """A step against imbalance without a loss (DeepSeek-V3, section 2.1.2): up for those below the mean, else down.

    Args:
        bias: [E] fp32.
        counts: [E] selections since the last step, of all ranks.
        rate: the size of the step.

    >>> corrected_bias(torch.zeros(4), torch.tensor([4, 2, 2, 0]), 0.001)
    tensor([-0.0010,  0.0000,  0.0000,  0.0010])
    """
    # The mean may not be representable; E * count against the sum is exact.
    return bias + rate * (counts.sum() - counts * counts.numel()).sign().to(bias.dtype)


def _gather(scores: Tensor, topk_idx: Tensor, top_k: int) -> Tensor:
    expected = (*scores.shape[:-1], top_k)
    if topk_idx.shape != expected or topk_idx.dtype != torch.int64:
        raise ValueError(f"pinned topk_idx must be int64 {list(expected)}, not {topk_idx.dtype} {list(topk_idx.shape)}")
    return scores.gather(-1, topk_idx.clamp(min=0)).masked_fill(topk_idx < 0, 0.0)


def _total(weights: Tensor, topk_idx: Tensor) -> Tensor:
    """[..., 1]: the sum of the weights, and 1 where nothing is selected."""
    return weights.sum(-1, keepdim=True).masked_fill((topk_idx < 0).all(-1, keepdim=True), 1.0)
