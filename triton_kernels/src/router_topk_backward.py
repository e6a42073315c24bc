"""Gradient of the router's logits from those of the weights and, for balance losses, of the scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_efa.routing import Routing

from .checks import FLOATS, check_devices, check_ids, check_number, check_tensor
from .numerics import rounded
from .router_topk import MAX_EXPERTS, SCORE_FUNCTIONS, SIGMOID_EPSILON, num_warps


@triton.jit  # type: ignore[untyped-decorator]
def router_topk_backward_kernel(  # type: ignore[no-untyped-def]
    grad_weights_ptr,
    grad_scores_ptr,  # None: 0
    topk_idx_ptr,
    scores_ptr,
    grad_logits_ptr,
    softmax: tl.constexpr,  # or sigmoid
    num_experts: tl.constexpr,
    top_k: tl.constexpr,
    norm_topk_prob: tl.constexpr,
    epsilon: tl.constexpr,
    routed_scaling_factor: tl.constexpr,
    padded_experts: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, padded_experts)
    exists = expert < num_experts
    scores = tl.load(scores_ptr + token * num_experts + expert, mask=exists, other=0.0)
    grad = tl.zeros((padded_experts,), tl.float32)
    if grad_scores_ptr is not None:
        grad = tl.load(grad_scores_ptr + token * num_experts + expert, mask=exists, other=0.0)

    total, inner = 0.0, 0.0
    if norm_topk_prob:
        any_selected = token < 0
        for k in tl.static_range(top_k):
            idx = tl.load(topk_idx_ptr + token * top_k + k)
            any_selected = any_selected | (idx >= 0)
            total += tl.load(scores_ptr + token * num_experts + idx, mask=(idx >= 0) & (idx < num_experts), other=0.0)
        total = tl.where(any_selected, total, 1.0) if softmax else total + epsilon
        for k in tl.static_range(top_k):
            idx = tl.load(topk_idx_ptr + token * top_k + k)
            score = tl.load(scores_ptr + token * num_experts + idx, mask=(idx >= 0) & (idx < num_experts), other=0.0)
            of_weight = tl.load(grad_weights_ptr + token * top_k + k, mask=idx >= 0, other=0.0) * routed_scaling_factor
            inner += of_weight * tl.div_rn(score, total)
    for k in tl.static_range(top_k):
        idx = tl.load(topk_idx_ptr + token * top_k + k)
        of_score = tl.load(grad_weights_ptr + token * top_k + k) * routed_scaling_factor
        if norm_topk_prob:
            of_score = tl.div_rn(of_score - inner, total)
        grad = tl.where(expert == idx, grad + of_score, grad)

    grad = scores * (grad - tl.sum(grad * scores, axis=0)) if softmax else (grad * (1.0 - scores)) * scores
    dtype: tl.constexpr = grad_logits_ptr.dtype.element_ty
    tl.store(grad_logits_ptr + token * num_experts + expert, rounded(grad, dtype), mask=exists)


def router_topk_backward(
    grad_weights: Tensor,
    routing: Routing,
    *,
    grad_scores: Tensor | None = None,
    score_function: str = "softmax",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Gradient of :func:`~moe_efa.triton_kernels.router_topk.router_topk` in its logits, from the scores it returned.

    Bitwise equal to ``reference.router_topk_backward``, but for softmax, whose ``sum of grad * score`` over experts has
    an order of its own, the same in every run: within ``num_experts * 2**-23 * score * sum |grad * score|``.

    Args:
        grad_weights: ``[num_tokens, top_k]`` fp32, contiguous; those of -1 selections are ignored.
        routing: what ``router_topk`` returned.
        grad_scores: ``[num_tokens, num_experts]`` fp32, contiguous, the gradient of ``routing.scores``; None is zero.
        score_function, norm_topk_prob, routed_scaling_factor: those of the forward pass.
        dtype: that of the logits.

    Returns:
        ``[num_tokens, num_experts]`` in ``dtype``.

    Raises:
        ValueError: shape, dtype, layout, device, a number or a word is not supported, or (on the CPU) a selected id is
            outside [-1, num_experts).

    Example (a test reuses it): without renormalization, of one selected sigmoid of 1/2 the slope is 1/4.

        >>> routing = router_topk(torch.zeros(1, 4), 1, score_function="sigmoid", norm_topk_prob=False)
        >>> options = {"score_function": "sigmoid", "norm_topk_prob": False, "routed_scaling_factor": 2.0}
        >>> router_topk_backward(torch.tensor([[8.0]]), routing, **options).tolist()
        [[4.0, 0.0, 0.0, 0.0]]
    """
    check_tensor("scores", routing.scores, shape=("num_tokens", "num_experts"), dtypes=(torch.float32,))
    num_tokens, num_experts = routing.scores.shape
    check_tensor("topk_idx", routing.topk_idx, shape=(num_tokens, "top_k"), dtypes=(torch.int64,))
    top_k = routing.topk_idx.shape[1]
    check_tensor("grad_weights", grad_weights, shape=(num_tokens, top_k), dtypes=(torch.float32,))
    if grad_scores is not None:
        check_tensor("grad_scores", grad_scores, shape=(num_tokens, num_experts), dtypes=(torch.float32,))
    if score_function not in SCORE_FUNCTIONS:
        raise ValueError(f"score_function must be one of {SCORE_FUNCTIONS}, got {score_function!r}")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be bfloat16 or float32, got {dtype}")
    check_number("routed_scaling_factor", routed_scaling_factor)
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"{num_experts} experts are not supported (at most {MAX_EXPERTS})")
    check_devices(router_topk_backward_kernel, grad_weights, grad_scores, routing.topk_idx, routing.scores)
    check_ids(routing.topk_idx, num_experts)

    grad_logits = torch.empty((num_tokens, num_experts), dtype=dtype, device=grad_weights.device)
    if num_tokens == 0:
        return grad_logits
    padded_experts = triton.next_power_of_2(num_experts)
    with torch.cuda.device_of(grad_weights):  # type: ignore[no-untyped-call]
        router_topk_backward_kernel[(num_tokens,)](
            grad_weights,
            grad_scores,
            routing.topk_idx,
            routing.scores,
            grad_logits,
            softmax=score_function == "softmax",
            num_experts=num_experts,
            top_k=top_k,
            norm_topk_prob=norm_topk_prob,
            epsilon=SIGMOID_EPSILON,
            routed_scaling_factor=float(routed_scaling_factor),
            padded_experts=padded_experts,
            num_warps=num_warps(padded_experts),
            enable_fp_fusion=False,
        )
    return grad_logits
