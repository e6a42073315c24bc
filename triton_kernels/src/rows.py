"""What the kernels that fill rows share: which rows are padding, how wide programs are, checks of a plan."""

from __future__ import annotations

import operator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_tensor
from .reference import RowPlan

MAX_BLOCK = 8192  # columns of a program
TAIL_PROGRAMS = 64


@triton.jit  # type: ignore[untyped-decorator]
def padding_rows(  # type: ignore[no-untyped-def]
    program,
    offsets_ptr,
    tokens_per_expert_ptr,
    num_rows,
    num_experts: tl.constexpr,
    tail_programs: tl.constexpr,
):
    """(first, stop, step) of the padding that a program fills: one for each expert, then those of the tail."""
    is_tail = program >= num_experts
    end = tl.load(offsets_ptr + num_experts)
    tl.device_assert(end <= num_rows, "num_rows is less than offsets[-1]")
    expert = tl.minimum(program, num_experts - 1)
    begin = tl.load(offsets_ptr + expert) + tl.load(tokens_per_expert_ptr + expert).to(tl.int32)
    first = tl.where(is_tail, end + program - num_experts, begin)
    stop = tl.where(is_tail, num_rows, tl.load(offsets_ptr + expert + 1))
    return first, stop, tl.where(is_tail, tail_programs, 1)


@triton.jit  # type: ignore[untyped-decorator]
def store_row_weights(  # type: ignore[no-untyped-def]
    token, topk_weights_ptr, positions_ptr, weights_ptr, top_k: tl.constexpr, padded_top_k: tl.constexpr
):
    """The weights of a token's selections, each to its row; those of -1 are not read."""
    topk_pos = tl.arange(0, padded_top_k)
    rows = tl.load(positions_ptr + token * top_k + topk_pos, mask=topk_pos < top_k, other=-1)
    weights = tl.load(topk_weights_ptr + token * top_k + topk_pos, mask=rows >= 0)
    tl.store(weights_ptr + rows, weights, mask=rows >= 0)


def check_num_rows(num_rows: int | None) -> int | None:
    """As an int. One that is a tensor of a device is waited for."""
    if num_rows is None:
        return None
    try:
        number = operator.index(num_rows)
    except TypeError:
        raise ValueError(f"num_rows must be an integer, got {num_rows!r}") from None
    if number < 0:
        raise ValueError(f"num_rows must not be negative, got {number}")
    return number


def padding_programs(plan: RowPlan, num_rows: int | None) -> tuple[int, int]:
    """How many programs fill padding, and how many of these the tail behind the last expert."""
    if num_rows is not None:
        tail_programs = TAIL_PROGRAMS
        if (
            plan.offsets.device.type == "cpu"
        ):  # where it can be seen: the interpreter takes long for programs without rows
            tail_programs = min(tail_programs, max(0, num_rows - int(plan.offsets[-1])))
        return len(plan.tokens_per_expert) + tail_programs, tail_programs
    return len(plan.tokens_per_expert) if plan.expert_alignment > 1 else 0, 0


def resolve_num_rows(plan: RowPlan, num_rows: int | None) -> int:
    """The rows to allocate: ``num_rows``, or offsets[-1], which waits for the device."""
    if num_rows is not None and plan.offsets.device.type != "cpu":
        return num_rows
    end = int(plan.offsets[-1])
    if num_rows is not None and num_rows < end:
        raise ValueError(f"num_rows={num_rows} is less than the {end} rows of the plan")
    return end if num_rows is None else num_rows


def check_plan(plan: RowPlan, num_tokens: int) -> None:
    """The plan's tensors fit together and ``num_tokens`` tokens."""
    check_tensor("positions", plan.positions, shape=("num_tokens", "top_k"), dtypes=(torch.int32,))
    if len(plan.positions) != num_tokens:
        raise ValueError(f"there are {num_tokens} tokens, the plan is of {len(plan.positions)}")
    check_tensor("tokens_per_expert", plan.tokens_per_expert, shape=("num_experts",), dtypes=(torch.int64,))
    num_experts = len(plan.tokens_per_expert)
    check_tensor("offsets", plan.offsets, shape=(num_experts + 1,), dtypes=(torch.int32,))


def check_rows_of_plan(plan: RowPlan, num_rows: int) -> None:
    """As many rows as the plan asks for. Looked at on the CPU; on a GPU kernels assert it, since to look would wait."""
    if plan.offsets.device.type == "cpu" and num_rows < int(plan.offsets[-1]):
        raise ValueError(f"there are {num_rows} rows, the plan has {int(plan.offsets[-1])}")


def check_row_floats(name: str, x: Tensor | None, shape: tuple[int | str, ...]) -> None:
    """Optional fp32 numbers, one for each row or each selection."""
    if x is not None:
        check_tensor(name, x, shape=shape, dtypes=(torch.float32,))


def column_blocks(hidden_size: int, largest: int = MAX_BLOCK) -> tuple[int, int, int]:
    """(columns of a program, programs for a row, warps): 16 columns a thread, for 16-byte accesses."""
    block = min(largest, triton.next_power_of_2(hidden_size))
    return block, triton.cdiv(hidden_size, block), min(16, max(1, block // 512))
