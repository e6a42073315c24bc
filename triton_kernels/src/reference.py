"""Plain-torch twins of the kernels, under the same names: slow, obvious, and what the kernels must return.

Bitwise, but for sums that kernels add in an order of their own and for exp; each kernel's docstring says so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_efa.quantization import BLOCK_SIZE, FP8_MAX, MIN_SCALE, SCALE_FORMATS, dequantize_1x128, quantize_1x128
from moe_efa.routing import Routing, kept_groups

__all__ = [
    "BLOCK_SIZE",
    "FP8_MAX",
    "MIN_SCALE",
    "SCALE_FORMATS",
    "RowPlan",
    "QuantizedRows",
    "SwiGLUGrads",
    "quantize_1x128",
    "dequantize_1x128",
    "plan_rows",
    "permute",
    "permute_quantize",
    "unpermute",
    "unpermute_backward",
    "swiglu",
    "swiglu_quantize",
    "swiglu_backward",
    "router_topk",
    "router_topk_backward",
    "quantize_128x128",
    "grouped_gemm_fp8",
]


class RowPlan(NamedTuple):
    """Where the row of every (token, k) stands among rows that are grouped by expert.

    Attributes:
        tokens_per_expert: [E] int64, true counts.
        offsets: [E + 1] int32, where each expert's rows begin, each a multiple of ``expert_alignment``.
        positions: [T, K] int32, the row of each selection; -1 where nothing is selected.
        expert_alignment: every expert's rows are padded to a multiple of this.
    """

    tokens_per_expert: Tensor
    offsets: Tensor
    positions: Tensor
    expert_alignment: int

    @property
    def max_rows(self) -> int:
        """Rows that suffice whatever the routing is."""
        num_experts = len(self.tokens_per_expert)
        used_experts = min(num_experts, self.positions.numel())
        return self.positions.numel() + used_experts * (self.expert_alignment - 1)


class QuantizedRows(NamedTuple):
    """e4m3 rows: q [rows, H], scales [rows, ceil(H / 128)] fp32, weights [rows] fp32 or None."""

    q: Tensor
    scales: Tensor
    weights: Tensor | None


class SwiGLUGrads(NamedTuple):
    """grad_gate_up [rows, 2 * I], grad_weights [rows] fp32 or None; grad_gate_up as e4m3 q and its scales, or None."""

    grad_gate_up: Tensor
    grad_weights: Tensor | None
    q: Tensor | None
    scales: Tensor | None


def plan_rows(topk_idx: Tensor, *, num_experts: int, expert_alignment: int = 1) -> RowPlan:
    """Twin of :func:`moe_efa.triton_kernels.plan_rows.plan_rows`."""
    positions = torch.full(topk_idx.shape, -1, dtype=torch.int32, device=topk_idx.device)
    counts, offsets = [], [0]
    for expert_idx in range(num_experts):
        token_idx, topk_pos = (topk_idx == expert_idx).nonzero(as_tuple=True)  # by token, then by k
        first_row, count = offsets[-1], len(token_idx)
        rows = torch.arange(first_row, first_row + count, dtype=torch.int32, device=topk_idx.device)
        positions[token_idx, topk_pos] = rows
        counts.append(count)
        offsets.append(first_row + -(-count // expert_alignment) * expert_alignment)
    return RowPlan(
        torch.tensor(counts, dtype=torch.int64, device=topk_idx.device),
        torch.tensor(offsets, dtype=torch.int32, device=topk_idx.device),
        positions,
        expert_alignment,
    )


def permute(
    x: Tensor, plan: RowPlan, *, topk_weights: Tensor | None = None, num_rows: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Twin of :func:`moe_efa.triton_kernels.permute.permute`."""
    num_rows = int(plan.offsets[-1]) if num_rows is None else num_rows
    token_idx, topk_pos = (plan.positions >= 0).nonzero(as_tuple=True)
    to = plan.positions[token_idx, topk_pos].long()
    rows = torch.zeros(num_rows, x.shape[1], dtype=x.dtype, device=x.device)
    rows[to] = x[token_idx]
    if topk_weights is None:
        return rows, None
    weights = torch.zeros(num_rows, device=x.device)
    weights[to] = topk_weights[token_idx, topk_pos]
    return rows, weights


def permute_quantize(
    x: Tensor,
    plan: RowPlan,
    *,
    topk_weights: Tensor | None = None,
    scale_format: str = "fp32",
    num_rows: int | None = None,
) -> QuantizedRows:
    """Twin of :func:`moe_efa.triton_kernels.permute_quantize.permute_quantize`: quantize, then permute."""
    q, scales = quantize_1x128(x, scale_format=scale_format)
    codes, weights = permute(q.view(torch.uint8), plan, topk_weights=topk_weights, num_rows=num_rows)
    row_scales, _ = permute(scales, plan, num_rows=num_rows)
    is_padding = torch.ones(len(row_scales), dtype=torch.bool, device=x.device)
    is_padding[plan.positions[plan.positions >= 0].long()] = False
    row_scales[is_padding] = 1.0
    return QuantizedRows(codes.view(torch.float8_e4m3fn), row_scales, weights)


def unpermute(
    y: Tensor,
    plan: RowPlan,
    *,
    weights: Tensor | None = None,
    row_values: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Twin of :func:`moe_efa.triton_kernels.unpermute.unpermute`."""
    out = torch.zeros(len(plan.positions), y.shape[1], dtype=dtype or y.dtype, device=y.device)
    for token_idx, positions in enumerate(plan.positions.tolist()):
        total = None
        for row in sorted(position for position in positions if position >= 0):  # by (expert, k)
            term = y[row].float() if weights is None else weights[row] * y[row].float()
            total = term if total is None else total + term
        if total is not None:
            out[token_idx] = _one_nan(total, out.dtype)
    if row_values is None:
        return out, None
    values = torch.zeros(plan.positions.shape, device=y.device)
    values[plan.positions >= 0] = row_values[plan.positions[plan.positions >= 0].long()]
    return out, values


def unpermute_backward(grad_out: Tensor, y: Tensor, plan: RowPlan, *, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of :func:`moe_efa.triton_kernels.unpermute_backward.unpermute_backward`."""
    grad_rows, _ = permute(grad_out, plan, num_rows=len(y))
    is_row = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    is_row[plan.positions[plan.positions >= 0].long()] = True
    product = weights[:, None] * grad_rows.float()
    grad_y = _one_nan(product, y.dtype).masked_fill(~is_row[:, None], 0.0)
    grad_weights = (grad_rows.float() * y.float()).sum(-1).masked_fill(~is_row, 0.0)
    return grad_y, grad_weights


def swiglu(gate_up: Tensor, *, weights: Tensor | None = None, limit: float | None = None) -> Tensor:
    """Twin of :func:`moe_efa.triton_kernels.swiglu.swiglu`."""
    return _one_nan(_swiglu(gate_up, weights, limit), gate_up.dtype)


def swiglu_quantize(
    gate_up: Tensor, *, weights: Tensor | None = None, limit: float | None = None, scale_format: str = "fp32"
) -> tuple[Tensor, Tensor]:
    """Twin of :func:`moe_efa.triton_kernels.swiglu.swiglu_quantize`."""
    return quantize_1x128(_swiglu(gate_up, weights, limit), scale_format=scale_format)


def swiglu_backward(
    grad_hidden: Tensor,
    gate_up: Tensor,
    *,
    weights: Tensor | None = None,
    limit: float | None = None,
    quantized: bool = False,
    scale_format: str = "fp32",
) -> SwiGLUGrads:
    """Twin of :func:`moe_efa.triton_kernels.swiglu_backward.swiglu_backward`."""
    gate, up = _clamped(gate_up, limit)
    grad = grad_hidden.float()
    divisor = 1 + torch.exp(-gate)
    silu, sigmoid = gate / divisor, torch.ones_like(divisor) / divisor
    grad_weights = None
    if weights is not None:
        grad_weights = (grad * (silu * up)).sum(1)
        grad = grad * weights[:, None]
    grad_gate = ((grad * up) * sigmoid) * (1 + gate * (1 - sigmoid))
    grad_up = grad * silu
    if limit is not None:
        free_gate, free_up = gate_up.float().chunk(2, dim=1)
        grad_gate = torch.where(free_gate <= limit, grad_gate, 0.0)
        grad_up = torch.where(free_up.abs() <= limit, grad_up, 0.0)
    grad_gate_up = torch.cat([grad_gate, grad_up], dim=1)
    q, scales = quantize_1x128(grad_gate_up, scale_format=scale_format) if quantized else (None, None)
    return SwiGLUGrads(_one_nan(grad_gate_up, gate_up.dtype), grad_weights, q, scales)


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
    """Twin of :func:`moe_efa.triton_kernels.router_topk.router_topk`: ``moe_efa.routing`` with stable choices."""
    logits = logits.float()
    if score_function == "softmax":
        exponentials = torch.exp(logits - logits.amax(-1, keepdim=True))
        scores = exponentials / exponentials.sum(-1, keepdim=True)
    else:
        scores = 1 / (1 + torch.exp(-logits))
    if topk_idx is None:
        biased = scores if e_score_correction_bias is None else scores + e_score_correction_bias
        if topk_group < n_group:
            groups = biased.view(len(biased), n_group, biased.shape[1] // n_group)
            two_best = groups.sort(dim=-1, descending=True, stable=True).values[..., :2]
            best = _first(two_best[..., 0] + two_best[..., 1], topk_group)
            out = torch.ones(groups.shape[:2], dtype=torch.bool, device=logits.device).scatter_(1, best, False)
            biased = kept_groups(groups, out)
        topk_idx = _first(biased, top_k)
    weights = scores.gather(1, topk_idx.clamp(min=0)).masked_fill(topk_idx < 0, 0.0)
    if norm_topk_prob:
        weights = weights / _weight_sum(weights, topk_idx, score_function)
    return Routing(topk_idx, weights * routed_scaling_factor, scores)


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
    """Twin of :func:`moe_efa.triton_kernels.router_topk_backward.router_topk_backward`."""
    topk_idx, scores = routing.topk_idx, routing.scores
    of_scores = grad_weights.masked_fill(topk_idx < 0, 0.0) * routed_scaling_factor
    if norm_topk_prob:
        selected = scores.gather(1, topk_idx.clamp(min=0)).masked_fill(topk_idx < 0, 0.0)
        total = _weight_sum(selected, topk_idx, score_function)
        products = of_scores * (selected / total)
        of_scores = (of_scores - _sum_in_order(products)) / total
    grad = torch.zeros_like(scores) if grad_scores is None else grad_scores.clone()
    for k in range(topk_idx.shape[1]):
        rows = (topk_idx[:, k] >= 0).nonzero().squeeze(1)
        grad[rows, topk_idx[rows, k]] += of_scores[rows, k]
    if score_function == "softmax":
        grad = scores * (grad - (grad * scores).sum(-1, keepdim=True))
    else:
        grad = (grad * (1 - scores)) * scores
    return _one_nan(grad, dtype)


def quantize_128x128(x: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of :func:`moe_efa.triton_kernels.quantize_128x128.quantize_128x128`."""
    num_experts, n, k = x.shape
    n_blocks, k_blocks = -(-n // BLOCK_SIZE), -(-k // BLOCK_SIZE)
    padded = torch.zeros(num_experts, n_blocks * BLOCK_SIZE, k_blocks * BLOCK_SIZE, device=x.device)
    padded[:, :n, :k] = x
    blocks = padded.view(num_experts, n_blocks, BLOCK_SIZE, k_blocks, BLOCK_SIZE)
    amax = blocks.abs().amax((2, 4))
    # A row with the largest magnitude of every block has the scales of the blocks.
    _, scales = quantize_1x128(amax.view(-1, 1))
    scales = scales.view(amax.shape)
    quotients = (blocks / scales[:, :, None, :, None]).clamp(-FP8_MAX, FP8_MAX)
    quotients = _one_nan(quotients, torch.float32).view(padded.shape)
    return quotients[:, :n, :k].to(torch.float8_e4m3fn).contiguous(), scales


def grouped_gemm_fp8(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    offsets: Tensor,
    *,
    expert_alignment: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    implementation: str = "auto",
) -> Tensor:
    """Twin of :func:`moe_efa.triton_kernels.grouped_gemm_fp8.grouped_gemm_fp8`: dequantizes, multiplies in fp32."""
    del expert_alignment, implementation  # change nothing
    out = torch.zeros(len(a), b.shape[1], device=a.device)
    for expert_idx in range(len(b)):
        rows = slice(int(offsets[expert_idx]), int(offsets[expert_idx + 1]))
        row_scales = b_scales[expert_idx].repeat_interleave(BLOCK_SIZE, 0)[: b.shape[1]].contiguous()
        out[rows] = dequantize_1x128(a[rows], a_scales[rows]) @ dequantize_1x128(b[expert_idx], row_scales).T
    return out.to(dtype)


def _first(values: Tensor, count: int) -> Tensor:
    """Indices of the largest; of equal ones the first."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count].contiguous()


def _weight_sum(weights: Tensor, topk_idx: Tensor, score_function: str) -> Tensor:
    total = _sum_in_order(weights)
    if score_function == "softmax":
        return total.masked_fill((topk_idx < 0).all(-1, keepdim=True), 1.0)
    return total + 1e-20


def _sum_in_order(terms: Tensor) -> Tensor:
    total = terms[:, :1]
    for k in range(1, terms.shape[1]):
        total = total + terms[:, k : k + 1]
    return total


def _swiglu(gate_up: Tensor, weights: Tensor | None, limit: float | None) -> Tensor:
    gate, up = _clamped(gate_up, limit)
    hidden = gate / (1 + torch.exp(-gate)) * up
    return hidden if weights is None else hidden * weights[:, None]


def _clamped(gate_up: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    gate, up = (half.contiguous() for half in gate_up.float().chunk(2, dim=1))  # torch's exp depends on the strides
    return (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(-limit, limit))


def _one_nan(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds; every NaN becomes the same one: torch's casts give several."""
    return values.to(dtype).masked_fill(values.isnan(), torch.nan)
