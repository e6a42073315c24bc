"""Router scores, the choice of experts and their weights, one token a program: ``moe_efa.routing`` in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_efa.routing import Routing, check_groups

from .checks import ASSERTING, FLOATS, check_devices, check_ids, check_number, check_positive, check_tensor

MAX_EXPERTS = 4096
SCORE_FUNCTIONS = ("softmax", "sigmoid")
SIGMOID_EPSILON = 1e-20  # as in moe_efa.routing
_NOTHING = tl.constexpr(-(1 << 63))


@triton.jit
def ranked(x, idx, exists):  # type: ignore[no-untyped-def]
    """int64 keys that order as (x descending, idx ascending) when sorted downwards; NaN is above all, as in torch."""
    bits = x.to(tl.int32, bitcast=True)  # never -0.0: no score is
    ordered = tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(exists, (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - idx).to(tl.int64), _NOTHING)


@triton.jit
def value_of(keys):  # type: ignore[no-untyped-def]
    """The numbers that :func:`ranked` packed."""
    ordered = (keys >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def router_topk_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    bias_ptr,  # None: 0
    pinned_idx_ptr,  # None: the experts are chosen here
    topk_idx_ptr,
    topk_weights_ptr,
    scores_ptr,
    softmax: tl.constexpr,  # or sigmoid
    num_experts: tl.constexpr,
    n_group: tl.constexpr,
    topk_group: tl.constexpr,
    top_k: tl.constexpr,
    norm_topk_prob: tl.constexpr,
    epsilon: tl.constexpr,
    routed_scaling_factor: tl.constexpr,
    padded_groups: tl.constexpr,
    padded_group_size: tl.constexpr,
    padded_top_k: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group_size: tl.constexpr = num_experts // n_group
    group, member = tl.arange(0, padded_groups), tl.arange(0, padded_group_size)
    expert = group[:, None] * group_size + member[None, :]
    exists = (group < n_group)[:, None] & (member < group_size)[None, :]
    logits = tl.load(logits_ptr + token * num_experts + expert, mask=exists, other=float("-inf")).to(tl.float32)
    if softmax:
        exponentials = tl.exp(logits - tl.max(tl.max(logits, axis=1), axis=0))
        total = tl.zeros_like(exponentials) + tl.sum(tl.sum(exponentials, axis=1), axis=0)
        scores = tl.div_rn(exponentials, total)
    else:
        scores = tl.div_rn(tl.full(logits.shape, 1.0, tl.float32), 1.0 + tl.exp(-logits))
    tl.store(scores_ptr + token * num_experts + expert, scores, mask=exists)

    if pinned_idx_ptr is None:
        choice = scores
        if bias_ptr is not None:
            choice = scores + tl.load(bias_ptr + expert, mask=exists, other=0.0)
        keys = ranked(choice, expert, exists)
        if topk_group < n_group:  # a group is worth its two best together
            best = tl.max(keys, axis=1)
            second = tl.max(tl.where(keys == best[:, None], _NOTHING, keys), axis=1)
            group_keys = ranked(value_of(best) + value_of(second), group, group < n_group)
            stays = group < 0
            for _ in tl.static_range(topk_group):
                best_group = tl.max(group_keys, axis=0)
                stays = stays | (group_keys == best_group)
                group_keys = tl.where(group_keys == best_group, _NOTHING, group_keys)
            keys = tl.where(stays[:, None], keys, _NOTHING)

    topk_pos = tl.arange(0, padded_top_k)
    weights = tl.zeros((padded_top_k,), tl.float32)
    chosen = tl.full((padded_top_k,), -1, tl.int64)
    weight_sum = 0.0
    for k in tl.static_range(top_k):
        if pinned_idx_ptr is None:
            key = tl.max(tl.max(keys, axis=1), axis=0)
            keys = tl.where(keys == key, _NOTHING, keys)
            idx = 0x7FFFFFFF - (key & 0x7FFFFFFF)
        else:
            idx = tl.load(pinned_idx_ptr + token * top_k + k)
            tl.device_assert((idx >= -1) & (idx < num_experts), "topk_idx outside [-1, num_experts)")
        if pinned_idx_ptr is None and bias_ptr is None:
            weight = value_of(key)
        else:
            # Ids of padding may be those of experts of the next group, but their scores are 0.
            weight = tl.sum(tl.sum(tl.where(expert == idx, scores, 0.0), axis=1), axis=0)
        weight_sum = weight if k == 0 else weight_sum + weight
        weights = tl.where(topk_pos == k, weight, weights)
        chosen = tl.where(topk_pos == k, idx, chosen)
    if norm_topk_prob:
        if softmax:  # nothing selected: weights are zeros
            weight_sum = tl.where(tl.max(chosen, axis=0) < 0, 1.0, weight_sum)
        else:
            weight_sum += epsilon
        weights = tl.div_rn(weights, tl.zeros_like(weights) + weight_sum)
    weights = weights * routed_scaling_factor
    tl.store(topk_weights_ptr + token * top_k + topk_pos, weights, mask=topk_pos < top_k)
    tl.store(topk_idx_ptr + token * top_k + topk_pos, chosen, mask=topk_pos < top_k)


def router_topk(
    logits: Tensor,
    top_k: int,
    *,
    score_function: str = "softmax",
    e_score_correction_bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    topk_idx: Tensor | None = None,
) -> Routing:
    """:func:`moe_efa.routing.softmax_topk` or :func:`moe_efa.routing.sigmoid_group_topk`; the arguments are theirs.

    Selections are in descending order of what they were selected by. Ties go to the smaller id, of experts and of
    groups (``torch.topk``, and with it ``moe_efa.routing``, leaves them open), and NaN is above all numbers.

    Bitwise equal to ``reference.router_topk`` where exp is (the interpreter of the tests), but for softmax, whose sum
    over experts has an order of its own, the same in every run: scores and weights are within ``num_experts * 2**-23``
    relative. On a GPU exp is within ``2 + |x|`` ulps. Either way the selection is that of the scores as returned.

    Args:
        logits: ``[num_tokens, num_experts]`` bf16 or fp32, contiguous, on a CUDA device (on the CPU only under
            ``TRITON_INTERPRET=1``); at most 4096 experts.
        score_function: ``"softmax"`` or ``"sigmoid"``; bias and groups go with the latter.
        e_score_correction_bias: ``[num_experts]`` fp32; None is zero.
        topk_idx: ``[num_tokens, top_k]`` int64, a pinned selection: only weights are computed. -1 entries get weight 0.

    Returns:
        A :class:`moe_efa.routing.Routing`: topk_idx ``[num_tokens, top_k]`` int64, topk_weights ``[num_tokens, top_k]``
        fp32, scores ``[num_tokens, num_experts]`` fp32.

    Raises:
        ValueError: shape, dtype, layout, device or a number is not supported, or (on the CPU) a pinned id is outside
            [-1, num_experts); on a GPU that is a device-side assertion.

    Example (a test reuses it): expert 3 is the best but its group is not: 0.9 + 0.1 < 0.6 + 0.5.

        >>> logits = torch.logit(torch.tensor([[0.6, 0.5, 0.1, 0.9]]))
        >>> r = router_topk(logits, 2, score_function="sigmoid", n_group=2, topk_group=1)
        >>> r.topk_idx.tolist(), r.topk_weights.cpu()  # 0.6 / 1.1 and 0.5 / 1.1
        ([[0, 1]], tensor([[0.5455, 0.4545]]))
        >>> router_topk(torch.zeros(1, 4), 3).topk_idx.tolist()  # a tie
        [[0, 1, 2]]
    """
    check_tensor("logits", logits, shape=("num_tokens", "num_experts"), dtypes=FLOATS)
    num_tokens, num_experts = logits.shape
    if score_function not in SCORE_FUNCTIONS:
        raise ValueError(f"score_function must be one of {SCORE_FUNCTIONS}, got {score_function!r}")
    if score_function == "softmax" and (e_score_correction_bias is not None or n_group != 1):
        raise ValueError("a bias and groups go with score_function='sigmoid'")
    check_positive(top_k=top_k, n_group=n_group, topk_group=topk_group)
    check_number("routed_scaling_factor", routed_scaling_factor)
    if num_experts > MAX_EXPERTS or top_k > num_experts:
        raise ValueError(f"top_k={top_k} of {num_experts} experts is not supported (at most {MAX_EXPERTS} experts)")
    check_groups(num_experts, top_k, n_group, topk_group)
    if e_score_correction_bias is not None:
        check_tensor("e_score_correction_bias", e_score_correction_bias, shape=(num_experts,), dtypes=(torch.float32,))
    if topk_idx is not None:
        check_tensor("topk_idx", topk_idx, shape=(num_tokens, top_k), dtypes=(torch.int64,))
    check_devices(router_topk_kernel, logits, e_score_correction_bias, topk_idx)
    if topk_idx is not None:
        check_ids(topk_idx, num_experts)

    chosen = torch.empty((num_tokens, top_k), dtype=torch.int64, device=logits.device)
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device)
    scores = torch.empty((num_tokens, num_experts), dtype=torch.float32, device=logits.device)
    if num_tokens == 0:
        return Routing(chosen, weights, scores)
    padded_groups, padded_group_size = tile(num_experts, n_group)
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        router_topk_kernel[(num_tokens,)](
            logits,
            e_score_correction_bias,
            topk_idx,
            chosen,
            weights,
            scores,
            softmax=score_function == "softmax",
            num_experts=num_experts,
            n_group=n_group,
            topk_group=topk_group,
            top_k=top_k,
            norm_topk_prob=norm_topk_prob,
            epsilon=SIGMOID_EPSILON,
            routed_scaling_factor=float(routed_scaling_factor),
            padded_groups=padded_groups,
            padded_group_size=padded_group_size,
            padded_top_k=triton.next_power_of_2(top_k),
            num_warps=num_warps(padded_groups * padded_group_size),
            enable_fp_fusion=False,
            **ASSERTING,
        )
    return Routing(chosen, weights, scores)


def tile(num_experts: int, n_group: int) -> tuple[int, int]:
    """Groups and experts of a group, each padded to a power of two."""
    return triton.next_power_of_2(n_group), triton.next_power_of_2(num_experts // n_group)


def num_warps(padded_experts: int) -> int:
    """One up to 512 experts: reductions stay within a warp."""
    return max(1, padded_experts // 512)
