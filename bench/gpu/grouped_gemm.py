"""Matrix products of rows grouped by expert: bf16 through torch, FP8 through our kernel, beside what else there is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_efa.quantization import dequantize_1x128, quantize_1x128
from moe_efa.triton_kernels.grouped_gemm_fp8 import grouped_gemm_fp8
from moe_efa.triton_kernels.quantize_128x128 import quantize_128x128

from . import checks, floors
from .results import Bar, Check, Peer, Timed
from .setting import Setting

ALIGNMENT = 128  # of every expert's rows: what DeepGEMM asks for
ROW_ERROR = 2.0**-7  # of bf16 results, relative to the row


@dataclass(frozen=True, kw_only=True)
class Problem:
    """out[i] = b[expert of i] @ a[i] for `rows` rows of [k]; `skewed`: one expert has half of them."""

    name: str
    rows: int
    experts: int
    n: int
    k: int
    skewed: bool = False


def problems(*, dry_run: bool) -> list[Problem]:
    """What one rank multiplies at 4096 tokens per rank: T * K rows when balanced."""
    if dry_run:
        return [Problem(name="tiny", rows=256, experts=2, n=128, k=256)]
    gate_up = {"n": 4096, "k": 7168}
    down = {"n": 7168, "k": 2048}
    return [
        Problem(name="deepseek-v3-ep32-gate-up", rows=32768, experts=8, **gate_up),
        Problem(name="deepseek-v3-ep32-down", rows=32768, experts=8, **down),
        Problem(name="kimi-k2-ep64-gate-up", rows=32768, experts=6, **gate_up),
        Problem(name="kimi-k2-ep64-down", rows=32768, experts=6, **down),
        Problem(name="deepseek-v3-ep32-gate-up-skewed", rows=32768, experts=8, skewed=True, **gate_up),
        Problem(name="deepseek-v3-ep32-gate-up-decode", rows=1024, experts=8, **gate_up),
    ]


def grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """torch's, under the name that this release has."""
    function = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    return function(rows, weight, offs=ends)


def run(setting: Setting) -> None:
    """All problems."""
    for problem in problems(dry_run=setting.dry_run):
        if setting.has_time_for(f"grouped GEMM {problem.name}", 0 if setting.dry_run else 6):
            _one(setting, problem)
            setting.release_memory()


def offsets_of(problem: Problem) -> Tensor:
    """[experts + 1] int32 on the CPU, multiples of ALIGNMENT."""
    blocks = problem.rows // ALIGNMENT
    sizes = torch.full((problem.experts,), blocks // problem.experts)
    sizes[: blocks % problem.experts] += 1
    if problem.skewed:
        sizes = torch.full((problem.experts,), (blocks - blocks // 2) // (problem.experts - 1))
        sizes[0] = blocks - int(sizes[1:].sum())
    return torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).mul(ALIGNMENT).to(torch.int32)


def _one(setting: Setting, problem: Problem) -> None:
    device = setting.device
    offsets = offsets_of(problem)
    bounds = offsets.tolist()
    ends, offsets = offsets[1:].to(device), offsets.to(device)
    generator = torch.Generator(device=device).manual_seed(0)
    a = torch.randn(problem.rows, problem.k, generator=generator, device=device).to(torch.bfloat16)
    b = torch.randn(problem.experts, problem.n, problem.k, generator=generator, device=device).to(torch.bfloat16)
    flops = floors.grouped_gemm_flops(problem.rows, problem.n, problem.k)

    bf16_rate = 0.0
    found = _timed(
        setting,
        problem,
        "grouped-mm-bf16",
        lambda: grouped_mm(a, b.transpose(1, 2), ends),
        lambda: _by_expert(a, b, bounds),
        flops,
    )
    if found is not None:
        bf16_rate = found.rate or 0.0
        _peer(setting, "grouped-mm-bf16", problem, "a product for each expert", lambda: _by_expert(a, b, bounds))
    _weight_gradient(setting, problem, a, ends, bounds, flops)

    a8, a_scales = quantize_1x128(a)
    b8, b_scales = quantize_128x128(b)
    arguments = (a8, a_scales, b8, b_scales, offsets)

    def exact() -> Tensor:
        rows = dequantize_1x128(a8, a_scales)
        scales = b_scales.repeat_interleave(128, 1)[:, : problem.n]
        weights = [dequantize_1x128(b8[e], scales[e].contiguous()) for e in range(problem.experts)]
        return torch.cat([rows[i:j] @ w.T for w, i, j in zip(weights, bounds, bounds[1:], strict=False)])

    name = "triton-grouped-gemm-fp8"
    found = _timed(
        setting, problem, name, lambda: grouped_gemm_fp8(*arguments, implementation="triton"), exact, flops, bf16_rate
    )
    if found is None:
        return
    _peer(
        setting,
        name,
        problem,
        "deep_gemm",
        lambda: grouped_gemm_fp8(*arguments, implementation="deep_gemm", expert_alignment=ALIGNMENT),
    )
    _peer(setting, name, problem, "torch grouped_mm bf16", lambda: grouped_mm(a, b.transpose(1, 2), ends))
    row_scales = torch.rand(problem.rows, device=device) + 0.5
    column_scales = torch.rand(problem.experts, problem.n, device=device) + 0.5
    _peer(
        setting,
        name,
        problem,
        "torch scaled_grouped_mm, a scale per row",
        lambda: torch._scaled_grouped_mm(
            a8,
            b8.transpose(1, 2),
            row_scales,
            column_scales,
            offs=ends,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        ),
    )


def _weight_gradient(
    setting: Setting, problem: Problem, a: Tensor, ends: Tensor, bounds: list[int], flops: int
) -> None:
    generator = torch.Generator(device=a.device).manual_seed(1)
    grad = torch.randn(problem.rows, problem.n, generator=generator, device=a.device).to(torch.bfloat16)
    _timed(
        setting,
        problem,
        "grouped-mm-bf16-wgrad",
        lambda: grouped_mm(grad.t(), a, ends).flatten(0, 1),
        lambda: torch.stack([grad[i:j].t() @ a[i:j] for i, j in itertools.pairwise(bounds)]).flatten(0, 1),
        flops,
    )


def _by_expert(a: Tensor, b: Tensor, bounds: list[int]) -> Tensor:
    return torch.cat([a[i:j] @ w.T for w, i, j in zip(b, bounds, bounds[1:], strict=False)])


def _timed(
    setting: Setting,
    problem: Problem,
    kernel: str,
    call: Callable[[], Tensor],
    expected: Callable[[], Tensor],
    flops: int,
    bf16_rate: float | None = None,
) -> Timed | None:
    """None where it is wrong or does not run. With `bf16_rate`, which it is held against."""
    name = f"{kernel}/{problem.name}"
    try:
        wrong = checks.rows_within("out", call(), expected(), ROW_ERROR)
        setting.synchronize()
    except Exception as error:  # whatever the compiler or the launch says
        setting.out.check(Check(name=name, ok=False, detail=f"{type(error).__name__}: {error}"))
        return None
    setting.out.check(Check(name=name, ok=wrong is None, detail=wrong or "rows within their bound"))
    if wrong is not None:
        return None
    setting.release_memory()
    timing = setting.timer(call)
    timed = Timed(
        name=name,
        kernel=kernel,
        conditions={"rows": problem.rows, "experts": problem.experts, "n": problem.n, "k": problem.k},
        us=timing.us,
        us_p20=timing.us_p20,
        us_p80=timing.us_p80,
        runs=timing.runs,
        flops=flops,
        ceiling=setting.ceilings().get("matmul_tflop_per_s"),
    )
    if bf16_rate:
        timed.bars.append(Bar(what="over bf16 grouped_mm", value=(timed.rate or 0.0) / bf16_rate, least=1.0))
    setting.out.timed(timed)
    return timed


def _peer(setting: Setting, kernel: str, problem: Problem, name: str, call: Callable[[], object]) -> None:
    try:
        peer = Peer(us=setting.timer(call).us)
    except Exception as error:  # somebody else's code, or a refusal
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        peer = Peer(note=f"not available: {reason}"[:160])
    setting.out.peer(kernel, problem.name, name, peer)
