"""Histogram of the selected experts and the row of every (token, k): a stable counting sort in three launches.

Deterministic without atomics: rows are in (expert, token, top-k position) order, as in csrc/kernels/cpu/plan.cc and
``moe_efa.reference.make_plan``, so that nothing downstream depends on timing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import ASSERTING, check_devices, check_ids, check_positive, check_tensor
from .reference import RowPlan

SLOTS_PER_PROGRAM = 128  # ranks are counted by comparing every pair of these
EXPERTS_PER_PROGRAM = 32
BLOCKS_PER_STEP = 64
NUM_WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def count_kernel(  # type: ignore[no-untyped-def]
    topk_idx_ptr,
    counts_ptr,  # [blocks, num_experts]
    num_slots,
    num_experts: tl.constexpr,
    padded_experts: tl.constexpr,
    slots_per_program: tl.constexpr,
):
    """The histogram of each block of slots."""
    block = tl.program_id(0).to(tl.int64)
    slot = block * slots_per_program + tl.arange(0, slots_per_program)
    expert_idx = tl.load(topk_idx_ptr + slot, mask=slot < num_slots, other=-1)
    tl.device_assert((expert_idx >= -1) & (expert_idx < num_experts), "topk_idx outside [-1, num_experts)")
    selected = (expert_idx >= 0) & (expert_idx < num_experts)
    expert = tl.arange(0, padded_experts)
    counts = tl.histogram(tl.where(selected, expert_idx, 0).to(tl.int32), padded_experts, mask=selected)
    tl.store(counts_ptr + block * num_experts + expert, counts, mask=expert < num_experts)


@triton.jit  # type: ignore[untyped-decorator]
def scan_kernel(  # type: ignore[no-untyped-def]
    counts_ptr,  # [blocks, num_experts]; becomes what earlier blocks hold
    tokens_per_expert_ptr,
    num_blocks,
    num_experts: tl.constexpr,
    experts_per_program: tl.constexpr,
    blocks_per_step: tl.constexpr,
):
    """Per expert the exclusive prefix sums over blocks, and the total."""
    expert = tl.program_id(0) * experts_per_program + tl.arange(0, experts_per_program)
    total = tl.zeros((experts_per_program,), tl.int32)
    for first_block in range(0, num_blocks, blocks_per_step):
        block = first_block + tl.arange(0, blocks_per_step)
        offsets = block.to(tl.int64)[:, None] * num_experts + expert[None, :]
        mask = (block < num_blocks)[:, None] & (expert < num_experts)[None, :]
        counts = tl.load(counts_ptr + offsets, mask=mask, other=0)
        before = tl.cumsum(counts, axis=0) - counts + total[None, :]
        tl.store(counts_ptr + offsets, before, mask=mask)
        total += tl.sum(counts, axis=0)
    tl.store(tokens_per_expert_ptr + expert, total.to(tl.int64), mask=expert < num_experts)


@triton.jit  # type: ignore[untyped-decorator]
def place_kernel(  # type: ignore[no-untyped-def]
    topk_idx_ptr,
    counts_ptr,  # [blocks, num_experts]: what earlier blocks hold
    tokens_per_expert_ptr,
    offsets_ptr,
    positions_ptr,
    num_slots,
    expert_alignment,
    num_experts: tl.constexpr,
    padded_experts: tl.constexpr,
    slots_per_program: tl.constexpr,
):
    """A slot's row: where its expert begins + what earlier blocks hold of it + what stands before it in the block."""
    expert = tl.arange(0, padded_experts)
    tokens = tl.load(tokens_per_expert_ptr + expert, mask=expert < num_experts, other=0).to(tl.int32)
    sizes = (tokens + expert_alignment - 1) // expert_alignment * expert_alignment
    ends = tl.cumsum(sizes, axis=0)
    block = tl.program_id(0).to(tl.int64)
    if block == 0:
        tl.store(offsets_ptr, 0)
        tl.store(offsets_ptr + 1 + expert, ends, mask=expert < num_experts)

    lane = tl.arange(0, slots_per_program)
    slot = block * slots_per_program + lane
    in_range = slot < num_slots
    expert_idx = tl.load(topk_idx_ptr + slot, mask=in_range, other=-1)
    selected = (expert_idx >= 0) & (expert_idx < num_experts)
    expert_idx = tl.where(selected, expert_idx, -1).to(tl.int32)
    begin = tl.gather(ends - sizes, tl.where(selected, expert_idx, 0), 0)
    earlier_blocks = tl.load(counts_ptr + block * num_experts + expert_idx, mask=selected, other=0)
    is_before = (expert_idx[:, None] == expert_idx[None, :]) & (lane[None, :] < lane[:, None])
    row = begin + earlier_blocks + tl.sum(is_before.to(tl.int32), axis=1)
    tl.store(positions_ptr + slot, tl.where(selected, row, -1), mask=in_range)


def plan_rows(topk_idx: Tensor, *, num_experts: int, expert_alignment: int = 1) -> RowPlan:
    """Orders the selections by expert, then by token, then by top-k position, and pads every expert's rows.

    Deterministic and bitwise equal to ``reference.plan_rows``; the order is that of ``ExpertParallel.dispatch`` on one
    rank. Nothing is read back from the device.

    Args:
        topk_idx: ``[num_tokens, top_k]`` int64 or int32 expert ids, contiguous; -1 selects nothing. An id may stand
            twice in a row and has two rows then.
        num_experts: at most 4096.
        expert_alignment: every expert's rows are padded to a multiple of this.

    Returns:
        A :class:`~moe_efa.triton_kernels.reference.RowPlan`.

    Raises:
        ValueError: shape, dtype, layout, device or a number is not supported, or (on the CPU) an id is outside
            [-1, num_experts); on a GPU that is a device-side assertion.

    Example (a test reuses it): three experts; expert 2 has three rows, padded to four.

        >>> plan = plan_rows(torch.tensor([[2, 0], [-1, 2], [2, -1]]), num_experts=3, expert_alignment=2)
        >>> plan.tokens_per_expert.tolist(), plan.offsets.tolist()
        ([1, 0, 3], [0, 2, 2, 6])
        >>> plan.positions.tolist()
        [[2, 0], [-1, 3], [4, -1]]
    """
    check_tensor("topk_idx", topk_idx, shape=("num_tokens", "top_k"), dtypes=(torch.int64, torch.int32))
    check_positive(num_experts=num_experts, expert_alignment=expert_alignment)
    if num_experts > 4096:
        raise ValueError(f"num_experts must be at most 4096, got {num_experts}")
    num_slots = topk_idx.numel()
    if num_slots + num_experts * (expert_alignment - 1) >= 1 << 31:
        raise ValueError(f"{num_slots} selections in {num_experts} experts aligned to {expert_alignment} are too many")
    check_devices(count_kernel, topk_idx)
    check_ids(topk_idx, num_experts)

    device = topk_idx.device
    num_blocks = max(1, triton.cdiv(num_slots, SLOTS_PER_PROGRAM))
    padded_experts = max(16, triton.next_power_of_2(num_experts))
    counts = torch.empty(num_blocks, num_experts, dtype=torch.int32, device=device)
    tokens_per_expert = torch.empty(num_experts, dtype=torch.int64, device=device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    positions = torch.empty(topk_idx.shape, dtype=torch.int32, device=device)
    with torch.cuda.device_of(topk_idx):  # type: ignore[no-untyped-call]
        count_kernel[(num_blocks,)](
            topk_idx,
            counts,
            num_slots,
            num_experts=num_experts,
            padded_experts=padded_experts,
            slots_per_program=SLOTS_PER_PROGRAM,
            num_warps=NUM_WARPS,
            **ASSERTING,
        )
        scan_kernel[(triton.cdiv(num_experts, EXPERTS_PER_PROGRAM),)](
            counts,
            tokens_per_expert,
            num_blocks,
            num_experts=num_experts,
            experts_per_program=EXPERTS_PER_PROGRAM,
            blocks_per_step=BLOCKS_PER_STEP,
            num_warps=NUM_WARPS,
        )
        place_kernel[(num_blocks,)](
            topk_idx,
            counts,
            tokens_per_expert,
            offsets,
            positions,
            num_slots,
            expert_alignment,
            num_experts=num_experts,
            padded_experts=padded_experts,
            slots_per_program=SLOTS_PER_PROGRAM,
            num_warps=NUM_WARPS,
        )
    return RowPlan(tokens_per_expert, offsets, positions, expert_alignment)
