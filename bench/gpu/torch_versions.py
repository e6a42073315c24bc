"""The same work in plain torch operators: what users write, run eagerly and through torch.compile.

Scales are divided by numbers here, which a compiler may turn into products: these are for time, not for bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """[T, H], H a multiple of 128 -> e4m3 and scales."""
    blocks = x.view(x.shape[0], -1, BLOCK).float()
    scales = (blocks.abs().amax(-1) / 448.0).clamp(min=1e-12)
    q = (blocks / scales[..., None]).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return q.view(x.shape), scales


def permute(x: Tensor, source: Tensor) -> Tensor:
    """Rows of tokens."""
    return x.index_select(0, source)


def permute_then_quantize(x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """The unfused pair: bf16 rows are written, then read and quantized."""
    return quantize(x.index_select(0, source))


def quantize_then_permute(x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Quantized before the rows are many."""
    q, scales = quantize(x)
    return q.view(torch.uint8).index_select(0, source), scales.index_select(0, source)


def dequantize_rows(q: Tensor, scales: Tensor, source: Tensor) -> Tensor:
    """FP8 rows to where they belong, in bf16."""
    rows = q.view(torch.uint8).index_select(0, source).view(torch.float8_e4m3fn).float()
    of_rows = scales.index_select(0, source)[..., None]
    return (rows.view(len(source), -1, BLOCK) * of_rows).view(rows.shape).to(torch.bfloat16)


def gather_fp8(q: Tensor, scales: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 rows to where they belong."""
    return q.view(torch.uint8).index_select(0, source), scales.index_select(0, source)


def unpermute(y: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """[R, H], [T, K] rows, [R] -> the weighted sums."""
    rows = positions.flatten().long()
    terms = y.index_select(0, rows).float() * weights.index_select(0, rows)[:, None]
    return terms.view(*positions.shape, -1).sum(1).to(y.dtype)


def unpermute_index_add(y: Tensor, source: Tensor, weights: Tensor, tokens: int) -> Tensor:
    """The same by atomic additions in fp32."""
    out = torch.zeros(tokens, y.shape[1], device=y.device)
    return out.index_add_(0, source, y.float() * weights[:, None]).to(y.dtype)


def unpermute_backward(grad: Tensor, y: Tensor, source: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and of the weights."""
    rows = grad.index_select(0, source).float()
    return (rows * weights[:, None]).to(y.dtype), (rows * y.float()).sum(1)


def swiglu(gate_up: Tensor, weights: Tensor) -> Tensor:
    """In fp32, rounded once."""
    gate, up = gate_up.float().chunk(2, dim=1)
    return (torch.nn.functional.silu(gate) * up * weights[:, None]).to(gate_up.dtype)


def swiglu_quantize(gate_up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one function, for a compiler to fuse."""
    gate, up = gate_up.float().chunk(2, dim=1)
    return quantize(torch.nn.functional.silu(gate) * up * weights[:, None])


def swiglu_backward(grad: Tensor, gate_up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate_up and of the weights."""
    gate, up = gate_up.float().chunk(2, dim=1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    plain = grad.float()
    of_weights = (plain * silu * up).sum(1)
    scaled = plain * weights[:, None]
    grad_gate = scaled * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([grad_gate, scaled * silu], dim=1).to(gate_up.dtype), of_weights


def plan_rows(topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, offsets and the row of every selection, by a stable sort."""
    flat = topk_idx.flatten()
    order = flat.argsort(stable=True)
    positions = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = torch.bincount(flat, minlength=num_experts)
    return counts, counts.cumsum(0), positions.view(topk_idx.shape)


def router(logits: Tensor, top_k: int, groups: int, topk_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """sigmoid, the best groups by their two best experts, top-k, renormalized."""
    scores = torch.sigmoid(logits)
    grouped = scores.view(len(scores), groups, -1)
    best = grouped.topk(2, dim=-1).values.sum(-1).topk(topk_groups, dim=-1).indices
    mask = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, True)
    masked = grouped.masked_fill(~mask[..., None], 0.0).flatten(1)
    idx = masked.topk(top_k, dim=-1).indices
    weights = scores.gather(1, idx)
    return idx, weights / weights.sum(-1, keepdim=True), scores
