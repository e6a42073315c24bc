"""Shapes and dtypes of what the operators of ops.py give, for compilers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from moe_efa import group_registry, plan_tensor
from moe_efa.config import ExpertParallelConfig
from moe_efa.op_kernels import FP8_DTYPE, Dispatched, shape_error
from moe_efa.quantization import BLOCK_SIZE


def dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    group: str,
    expert_alignment: int,
    output: str,
    capacity: int | None = None,
    after: Tensor | None = None,
) -> list[Tensor]:
    native = group_registry.find(group)
    config, num_local_experts = native.config, native.config.num_experts // native.num_ranks
    shape = (x.shape[0], config.top_k)
    for name, tensor in (("topk_idx", topk_idx), ("topk_weights", topk_weights)):
        message = functools.partial(shape_error, name, tensor, shape)
        torch._check(tensor.shape[0] == shape[0], message)  # type: ignore[no-untyped-call]
    rows: int | torch.SymInt
    if capacity is not None:
        rows = capacity
    else:
        most_rows = native.num_ranks * config.max_tokens_per_rank * config.top_k
        most_rows += num_local_experts * (expert_alignment - 1)
        rows = torch.library.get_ctx().new_dynamic_size(min=0, max=most_rows)
    return list(
        Dispatched(
            rows=x.new_empty(rows, config.hidden_size, dtype=FP8_DTYPE if output == "fp8" else x.dtype),
            scales=x.new_empty(*_scales_shape(rows, config, output), dtype=torch.float32),
            weights=x.new_empty(rows, dtype=torch.float32),
            tokens_per_expert=x.new_empty(num_local_experts, dtype=torch.int64)
            if capacity is not None
            else torch.empty(num_local_experts, dtype=torch.int64, device="cpu"),
            offsets=x.new_empty(num_local_experts + 1, dtype=torch.int32),
            overflow=x.new_empty((0,) if capacity is None else (), dtype=torch.int64),
            plan=torch.empty(1, dtype=plan_tensor.DTYPE, device="cpu"),
        )
    )


def _scales_shape(rows: int | torch.SymInt, config: ExpertParallelConfig, output: str) -> tuple[Any, ...]:
    return (rows, -(-config.hidden_size // BLOCK_SIZE)) if output == "fp8" else (0,)


def replay(
    x: Tensor, plan: Tensor, group: str, rows: int, gradient: bool = False, after: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(rows, x.shape[1]), torch.empty(0, device="cpu")


def replay_fp8(
    x: Tensor, plan: Tensor, group: str, rows: int, after: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    scales = x.new_empty(rows, -(-x.shape[1] // BLOCK_SIZE), dtype=torch.float32)
    return x.new_empty(rows, x.shape[1], dtype=FP8_DTYPE), scales, torch.empty(0, device="cpu")


def combine(
    y: Tensor,
    weights: Tensor | None,
    plan: Tensor,
    group: str,
    num_tokens: int,
    gradient: bool = False,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return y.new_empty(num_tokens, y.shape[1]), torch.empty(0, device="cpu")


def combine_grads(
    grad_rows: Tensor, grad_weights: Tensor, plan: Tensor, group: str, num_tokens: int, after: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    top_k = group_registry.find(group).config.top_k
    grad_x = grad_rows.new_empty(num_tokens, grad_rows.shape[1])
    return grad_x, grad_weights.new_empty(num_tokens, top_k), torch.empty(0, device="cpu")


def weight_grads(grad_rows: Tensor, y: Tensor, plan: Tensor, group: str) -> Tensor:
    return y.new_empty(y.shape[0], dtype=torch.float32)


def weighted_rows(rows: Tensor, weights: Tensor) -> Tensor:
    return rows.new_empty(rows.shape)
