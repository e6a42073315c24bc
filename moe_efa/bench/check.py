"""Correctness first: nothing is timed after a wrong result."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_efa import reference
from moe_efa.bench.exchange import Exchange
from moe_efa.bench.inputs import Inputs, make_inputs
from moe_efa.bench.options import DTYPES, BenchConfig
from moe_efa.bench.routing import RoutingConfig
from moe_efa.bench.timing import gather
from moe_efa.expert_parallel import ExpertParallel
from moe_efa.handle import DispatchResult

_UNIT_ROUNDOFF = {"bf16": 2.0**-8, "fp32": 2.0**-24}
# FP8 e4m3 in blocks: 3 mantissa bits, the largest value 448, the smallest normal one 2 ** -6.
_FP8_ROUNDOFF, _FP8_LARGEST, _FP8_SMALLEST_STEP, _FP8_BLOCK = 2.0**-4, 448.0, 2.0**-9, 128


class CheckError(AssertionError):
    """A result is wrong: nothing is timed."""


def check_small(config: BenchConfig, group: dist.ProcessGroup) -> tuple[str, int]:
    """A small round compared bit by bit with ``moe_efa.reference``. Collective.

    Returns:
        What was compared, and the ranks per node that the group found.

    Raises:
        CheckError: on every rank.
    """
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    shape: dict[str, Any] = {
        "tokens": 24,
        "hidden": 40,
        "topk": min(config.topk, 4),
        "experts": max(num_ranks, math.ceil(8 / num_ranks) * num_ranks),
    }
    small = dataclasses.replace(config, routing=RoutingConfig(), **shape)
    everyone = [make_inputs(small, r, node_size=num_ranks) for r in range(num_ranks)]
    mine = everyone[rank]
    arguments: dict[str, Any] = small.expert_parallel(chunk_rows=8).as_dict()
    with ExpertParallel(group, **arguments) as ep:
        d = ep.dispatch(*mine.to(ep.device))
        y = _apply_experts(d, rank * ep.num_local_experts, small.experts)
        out = ep.combine(y, d.handle).cpu()
        rows, weights = d.x.cpu(), d.weights.cpu()
        node_size = ep.node_size
    scale: dict[str, Any] = {"fp8_scale": config.fp8_scale} if "fp8" in _dtypes(config) else {}
    plan = reference.make_plan([inputs.topk_idx for inputs in everyone], num_experts=small.experts)
    expected = reference.dispatch(
        [inputs.x for inputs in everyone],
        [inputs.topk_weights for inputs in everyone],
        plan,
        wire_dtype=config.wire_dtype,
        **scale,
    )
    factors = _expert_factors(small.experts).to(DTYPES[config.dtype])
    expert_rows = [
        rows.x * factors[[row.expert_idx for row in plan_rows if row is not None]][:, None]
        for rows, plan_rows in zip(expected, plan.rows, strict=True)
    ]
    sums = reference.combine(
        expert_rows,
        plan,
        weights=[rows.weights for rows in expected],
        node_size=node_size,
        combine_dtype=config.combine_dtype,
        **scale,
    )
    problems = [
        f"{name} differs from the reference"
        for name, actual, wanted in (
            ("dispatched rows", rows, expected[rank].x),
            ("dispatched weights", weights, expected[rank].weights),
            ("combined rows", out, sums[rank]),
        )
        if not _equal_bits(actual, wanted)
    ]
    raise_together(group, problems, "small shape")
    text = "T={tokens} H={hidden} K={topk} E={experts}, bit by bit against moe_efa.reference".format(**shape)
    return text, node_size


def check_full(config: BenchConfig, group: dist.ProcessGroup, ep: ExpertParallel, mine: Inputs) -> float:
    """A round of the measured shape compared with its dense meaning, element by element. Collective.

    Expert e multiplies by a factor of its own, so ``out[t] = x[t] * sum over k of w[t, k] * factor[topk_idx[t, k]]``:
    all terms of a sum have one sign, and the roundings on the way (wire, expert, rank, node, output) bound the error.

    Returns:
        The largest error of any rank, as a fraction of the bound.

    Raises:
        CheckError: on every rank.
    """
    d = ep.dispatch(*mine.to(ep.device))
    out = ep.combine(_apply_experts(d, ep.rank * ep.num_local_experts, config.experts), d.handle).cpu()
    factor = (mine.topk_weights.double() * _expert_factors(config.experts)[mine.topk_idx].double()).sum(1)
    error = (out.double() - mine.x.double() * factor[:, None]).abs()
    worst_of_row = (error / (sum_bound(config, mine.x, factor) + 1e-30)).nan_to_num(nan=math.inf).amax(1)
    problems = []
    if bool((worst_of_row > 1).any()):
        bad = (worst_of_row > 1).nonzero()[:, 0]
        problems.append(
            f"{len(bad)} of {len(out)} combined rows are off by more than the formats' rounding, first row "
            f"{int(bad[0])} by {float(worst_of_row[bad[0]]):.3g} times the bound"
        )
    raise_together(group, problems, "measured shape")
    return max(gather(group, float(worst_of_row.max())))


def check_baselines(
    config: BenchConfig, group: dist.ProcessGroup, ep: ExpertParallel, mine: Inputs, baselines: dict[str, Exchange]
) -> tuple[str, Tensor]:
    """All exchanges must bring the same rows in the same order, and sums that agree. Collective; CheckError if not.

    The rows of the baselines are equal bit by bit, and to moe_efa's unless its wire has fewer bits than x.

    Returns:
        The digest of the baselines' rows and moe_efa's sums on this rank, to check the version in other processes.
    """
    d = ep.dispatch(mine.x, mine.topk_idx, mine.topk_weights)
    out = ep.combine(d.x, d.handle)
    problems, digest = [], ""
    for title, exchange in baselines.items():
        rows, handle = exchange.dispatch(mine)
        if not _rows_agree(config, d.x, rows):
            problems.append(f"{title} brought other rows")
            break
        brought = digest_of(rows)
        if digest not in ("", brought):
            problems.append(f"{title} brought other rows than the baseline before it")
            break
        digest = brought
        if not sums_agree(config, mine, out, exchange.combine(rows, handle)):
            problems.append(f"{title} and moe_efa combined to different sums")
            break
    raise_together(group, problems, "baselines")
    return digest, out


def sums_agree(config: BenchConfig, mine: Inputs, ours: Tensor, others: Tensor) -> bool:
    """Whether two combined results of undone experts differ by roundings alone: ours, and eight more of ``dtype``."""
    factor = mine.topk_weights.double().sum(1)
    bound = sum_bound(config, mine.x, factor) + 8 * torch.finfo(ours.dtype).eps * others.double().abs() + 1e-30
    return bool(((ours.double() - others.double()).abs() <= bound).all())


def digest_of(rows: Tensor) -> str:
    """A checksum of a tensor's bytes."""
    data: Any = rows.contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def sum_bound(config: BenchConfig, x: Tensor, factor: Tensor) -> Tensor:
    """The largest error of ``x * factor[:, None]`` as a round computes it, for positive factors: float64 [T, H].

    Roundings to bf16 or fp32 and normal FP8 values have a relative error; FP8 values below the smallest normal one are
    off by half of its step, times the block's scale.
    """
    dtypes = _dtypes(config)
    roundoff = max(_UNIT_ROUNDOFF[name] for name in (config.dtype, *dtypes) if name in _UNIT_ROUNDOFF)
    fp8_stages = dtypes.count("fp8")
    relative = (1 + roundoff) ** 4 * (1 + _FP8_ROUNDOFF) ** fp8_stages - 1 + (config.topk + 4) * 2.0**-23
    bound = relative * x.double().abs() * factor[:, None]
    if fp8_stages:
        # The second stage sees what the first made of x: up to 1 / 16 more, and an eighth is ample.
        bound += fp8_stages * 1.125 * _fp8_half_step(config, x) * factor[:, None]
    return bound


def _rows_agree(config: BenchConfig, ours: Tensor, exact: Tensor) -> bool:
    """Whether our rows are the exact ones, as the wire may round them."""
    wire = _dtypes(config)[0]
    if wire in ("fp32", config.dtype):
        return _equal_bits(ours, exact)
    if ours.shape != exact.shape:
        return False
    bound = _UNIT_ROUNDOFF.get(wire, _FP8_ROUNDOFF + _UNIT_ROUNDOFF[config.dtype]) * exact.double().abs() + 1e-30
    if wire == "fp8":
        bound += _fp8_half_step(config, exact)
    return bool(((ours.double() - exact.double()).abs() <= bound).all())


def _fp8_half_step(config: BenchConfig, x: Tensor) -> Tensor:
    """Half of the smallest FP8 step times the scale of its block, [T, H]; a power of two is up to twice as large."""
    hidden = x.shape[1]
    blocks = math.ceil(hidden / _FP8_BLOCK)
    padded = torch.nn.functional.pad(x.abs().float(), (0, blocks * _FP8_BLOCK - hidden))
    amax = padded.view(len(x), blocks, _FP8_BLOCK).amax(2).double()
    scale = amax / _FP8_LARGEST * (2 if config.fp8_scale == "ue8m0" else 1)
    return (0.5 * _FP8_SMALLEST_STEP * scale).repeat_interleave(_FP8_BLOCK, 1)[:, :hidden]


def _dtypes(config: BenchConfig) -> tuple[str, str]:
    """What dispatch and combine send."""
    wire, back = (config.dtype if name == "auto" else name for name in (config.wire_dtype, config.combine_dtype))
    return wire, back


def _expert_factors(num_experts: int) -> Tensor:
    """What expert e multiplies its rows with in the checks: different for every expert, exact in bf16."""
    return 1.0 + (torch.arange(num_experts) % 64) / 64.0


def _apply_experts(d: DispatchResult, first_expert: int, num_experts: int) -> Tensor:
    assert d.tokens_per_expert is not None
    own = _expert_factors(num_experts)[first_expert : first_expert + len(d.tokens_per_expert)]
    return d.x * own.repeat_interleave(d.tokens_per_expert)[:, None].to(d.x)


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def raise_together(group: dist.ProcessGroup, problems: list[str], what: str) -> None:
    """Raise CheckError on every rank if any has a problem. Collective."""
    for rank, others in enumerate(gather(group, problems)):
        if others:
            raise CheckError(f"wrong result, {what}, rank {rank}: {'; '.join(others)}")
