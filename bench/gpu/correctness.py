"""Results against torch and the CPU kernels, over a grid: no tokens, -1, one expert taking all, skew, short last
chunks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_efa.quantization import dequantize_1x128, quantize_1x128
from moe_efa.triton_kernels import dequantize, quantize, reference
from moe_efa.triton_kernels.permute import permute
from moe_efa.triton_kernels.permute_quantize import permute_quantize
from moe_efa.triton_kernels.quantize_128x128 import quantize_128x128
from moe_efa.triton_kernels.unpermute import unpermute
from moe_efa.triton_kernels.unpermute_backward import unpermute_backward

from . import checks, shapes, triton_speed
from .build import TESTS, shim_path
from .cuda_kernels import BF16, FP8, KernelError, Shim, World
from .cuda_speed import row_weights, source_rows
from .package import ROOT, WORK
from .results import Check
from .setting import Setting

HIDDEN = (2048, 4096, 7168)
EXPERTS, TOP_K = 16, 8


@dataclass(frozen=True, kw_only=True)
class Routing:
    """A routing of the grid."""

    name: str
    tokens: int
    topk_idx: Tensor
    topk_weights: Tensor


def routings(*, dry_run: bool) -> Iterator[Routing]:
    """Every kind once; 300 tokens make several chunks, the last of them short."""
    some = 6 if dry_run else 300
    generator = torch.Generator().manual_seed(0)

    def weights(tokens: int) -> Tensor:
        return torch.rand(tokens, TOP_K, generator=generator)

    def distinct(tokens: int, preference: Tensor) -> Tensor:
        noise = torch.rand(tokens, EXPERTS, generator=generator)
        return (noise + preference).topk(TOP_K, dim=1).indices

    even, skew = torch.zeros(EXPERTS), torch.linspace(0, 2, EXPERTS)
    with_none = distinct(some, skew).masked_fill(torch.rand(some, TOP_K, generator=generator) < 0.3, -1)
    if not dry_run:
        yield Routing(name="uniform", tokens=some, topk_idx=distinct(some, even), topk_weights=weights(some))
    yield Routing(name="skewed-with-none", tokens=some, topk_idx=with_none, topk_weights=weights(some))
    one = torch.full((some, TOP_K), -1)
    one[:, 3] = 1
    yield Routing(name="one-expert-takes-all", tokens=some, topk_idx=one, topk_weights=weights(some))
    yield Routing(name="nothing-selected", tokens=7, topk_idx=torch.full((7, TOP_K), -1), topk_weights=weights(7))
    yield Routing(name="one-token", tokens=1, topk_idx=distinct(1, even), topk_weights=weights(1))
    yield Routing(
        name="no-tokens", tokens=0, topk_idx=torch.zeros(0, TOP_K, dtype=torch.int64), topk_weights=weights(0)
    )


def run_triton(setting: Setting, hidden: int) -> None:
    """All Triton kernels at one hidden size."""
    for routing in routings(dry_run=setting.dry_run):
        for name, problem in triton_problems(routing, hidden, setting.device):
            _record(setting, f"{name} {routing.name} hidden {hidden}", problem)


def triton_problems(routing: Routing, hidden: int, device: str) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Kernels that must agree bitwise are compared with their twins on the CPU."""
    alignment = 2 if device == "cpu" else 16  # the interpreter takes its time for every row
    plan = reference.plan_rows(routing.topk_idx, num_experts=EXPERTS, expert_alignment=alignment)
    on_device = reference.RowPlan(*(part.to(device) for part in plan[:3]), alignment)
    rows = int(plan.offsets[-1])
    x = shapes.random_rows(routing.tokens, hidden)
    y = shapes.random_rows(rows, hidden, seed=1)
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(2))
    gate_up = shapes.random_rows(rows, 512, seed=3).to(device)
    grad_hidden = shapes.random_rows(rows, 256, seed=4).to(device)
    x_, y_, weights_, topk_weights_ = (t.to(device) for t in (x, y, weights, routing.topk_weights))
    same = checks.bitwise

    def both(names: str, got: object, want: object) -> str | None:
        pairs = zip(names.split(), got, want, strict=True)  # type: ignore[call-overload]
        return checks.first_problem(*(same(name, a, b) for name, a, b in pairs if a is not None or b is not None))

    yield (
        "triton plan_rows",
        lambda: triton_speed.plan_problem(routing.topk_idx.to(device), EXPERTS, on_device),
    )
    yield (
        "triton permute",
        lambda: both(
            "rows weights",
            permute(x_, on_device, topk_weights=topk_weights_),
            reference.permute(x, plan, topk_weights=routing.topk_weights),
        ),
    )
    for scale_format in ("fp32", "ue8m0"):
        yield (
            f"triton quantize {scale_format}",
            lambda f=scale_format: both(
                "q scales", quantize.quantize_1x128(x_, scale_format=f), quantize_1x128(x, scale_format=f)
            ),
        )
        yield (
            f"triton permute_quantize {scale_format}",
            lambda f=scale_format: both(
                "q scales weights",
                permute_quantize(x_, on_device, topk_weights=topk_weights_, scale_format=f),
                reference.permute_quantize(x, plan, topk_weights=routing.topk_weights, scale_format=f),
            ),
        )
    matrices = shapes.random_rows(2 * 130, hidden, seed=6).view(2, 130, hidden)
    yield (
        "triton quantize_128x128",
        lambda: both("q scales", quantize_128x128(matrices.to(device)), reference.quantize_128x128(matrices)),
    )
    q, scales = quantize_1x128(x)
    yield (
        "triton dequantize",
        lambda: same(
            "x",
            dequantize.dequantize_1x128(q.to(device), scales.to(device), dtype=torch.bfloat16),
            dequantize_1x128(q, scales, dtype=torch.bfloat16),
        ),
    )
    yield (
        "triton unpermute weighted",
        lambda: same(
            "out",
            unpermute(y_, on_device, weights=weights_)[0],
            checks.fixed_order_sum(y, plan.positions, weights),
        ),
    )
    yield (
        "triton unpermute plain",
        lambda: same("out", unpermute(y_, on_device)[0], checks.fixed_order_sum(y, plan.positions, None)),
    )
    want_y, want_weights = reference.unpermute_backward(x, y, plan, weights=weights)
    is_row = torch.zeros(rows, dtype=torch.bool)
    is_row[plan.positions[plan.positions >= 0].long()] = True

    def backward() -> str | None:
        got_y, got_weights = unpermute_backward(x_, y_, on_device, weights=weights_)
        spread, _ = reference.permute(x, plan, num_rows=rows)
        terms = (spread.float() * y.float()).abs().sum(1)
        return checks.first_problem(
            same("grad_y", got_y.cpu()[is_row], want_y[is_row]),
            checks.bounded(
                "grad_weights", got_weights.cpu()[is_row], want_weights[is_row], 2.0**-18 * terms[is_row] + 1e-30
            ),
        )

    yield "triton unpermute_backward", backward
    yield "triton swiglu", lambda: triton_speed.swiglu_problem(gate_up, weights_)
    yield "triton swiglu_quantize", lambda: triton_speed.swiglu_quantize_problem(gate_up, weights_)
    yield "triton swiglu_backward", lambda: triton_speed.swiglu_backward_problem(grad_hidden, gate_up, weights_)
    logits = torch.randn(routing.tokens, EXPERTS, generator=torch.Generator().manual_seed(5)).to(device)
    bias = torch.zeros(EXPERTS, device=device)
    groups = {"score_function": "sigmoid", "n_group": 4, "topk_group": 2}
    yield "triton router softmax", lambda: triton_speed.router_problem(logits, TOP_K, None, {})
    yield "triton router groups", lambda: triton_speed.router_problem(logits, TOP_K, bias, groups)


def run_cuda_grid(setting: Setting) -> None:
    """The CUDA kernels through the shim, over the grid."""
    shim = Shim(shim_path(dry_run=setting.dry_run))
    for hidden in (256,) if setting.dry_run else HIDDEN:
        for routing in routings(dry_run=setting.dry_run):
            for name, problem in cuda_problems(shim, setting, routing, hidden):
                _record(setting, f"{name} {routing.name} hidden {hidden}", problem)


def cuda_problems(
    shim: Shim, setting: Setting, routing: Routing, hidden: int
) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Plan and pack for four nodes of two ranks, then one rank's way through pull and combine."""
    x = shapes.random_rows(routing.tokens, hidden)
    on_device = x.to(setting.device)
    blocks = min(4, setting.num_sms)

    def world(**options: int) -> World:
        return World(
            shim,
            setting,
            topk_idx=routing.topk_idx,
            topk_weights=routing.topk_weights,
            x=on_device,
            num_experts=EXPERTS,
            **{"chunk_rows": 2 if setting.dry_run else 64, **options},
        )

    def sends(op: str, wire: int) -> str | None:
        sending = world(num_nodes=4, node_size=2, wire_dtype=wire)
        try:
            sending.run(op, blocks)
            return sending.check(op)
        finally:
            sending.close()

    yield "cuda plan", lambda: sends("plan", BF16)
    yield "cuda pack fp8", lambda: sends("pack", FP8)
    yield "cuda pack bf16", lambda: sends("pack", BF16)
    source, positions = source_rows(routing.topk_idx, EXPERTS)
    q, scales = quantize_1x128(x)

    def receives(wire: int, out: int) -> str | None:
        one = world(wire_dtype=wire, out_dtype=out)
        try:
            one.run("pack", blocks)
            one.run("pull", blocks)
            if out == FP8:
                problem = checks.first_problem(
                    checks.bitwise("rows", one.rows.view(torch.uint8), q.view(torch.uint8)[source]),
                    checks.bitwise("scales", one.row_scales, scales[source]),
                )
            else:
                sent = x if wire == BF16 else dequantize_1x128(q, scales, dtype=torch.bfloat16)
                problem = checks.bitwise("rows", one.rows, sent[source])
            want_weights = row_weights(routing.topk_weights, positions, len(source))
            problem = checks.first_problem(problem, checks.bitwise("weights", one.row_weights, want_weights))
            if problem is not None or out == FP8:
                return problem
            y = shapes.random_rows(len(source), hidden, seed=1)
            one.y.copy_(y)
            one.run("combine", blocks, 2)
            return checks.bitwise("out", one.out, checks.fixed_order_sum(y, positions, want_weights))
        finally:
            one.close()

    yield "cuda pull and combine, bf16", lambda: receives(BF16, BF16)
    yield "cuda pull and combine, fp8 to bf16", lambda: receives(FP8, BF16)
    yield "cuda pull, fp8 handed through", lambda: receives(FP8, FP8)


def run_programs(setting: Setting) -> None:
    """The tests of the CUDA bodies, launched: everything bit by bit against the CPU kernels.

    No limit of its own: a section that is cut is no verdict.
    """
    for test in TESTS:
        result = subprocess.run([str(WORK / test.stem)], cwd=ROOT, capture_output=True, text=True, check=False)
        lines = (result.stdout + result.stderr).strip().splitlines()
        detail = lines[-1] if result.returncode == 0 and lines else " | ".join(lines[:6] + lines[-2:])
        setting.out.check(Check(name=test.stem, ok=result.returncode == 0, detail=detail))


def run_small(setting: Setting) -> None:
    """Each kernel on few small rows: what compute-sanitizer looks at."""
    shim = Shim(shim_path(dry_run=setting.dry_run))
    for routing in routings(dry_run=True):
        if routing.name in ("skewed-with-none", "no-tokens"):
            for name, problem in cuda_problems(shim, setting, routing, 256):
                _record(setting, f"{name} {routing.name}", problem)
            for name, problem in triton_problems(routing, 256, setting.device):
                _record(setting, f"{name} {routing.name}", problem)


def _record(setting: Setting, name: str, problem: Callable[[], str | None]) -> None:
    try:
        found = problem()
        setting.synchronize()
    except KernelError as error:
        found = str(error)
    except Exception as error:  # whatever the compiler or the launch says
        found = f"{type(error).__name__}: {error}"
        try:
            setting.synchronize()
        except Exception:  # nothing that this process asks of the device will be answered any more
            setting.out.check(Check(name=name, ok=False, detail=found))
            raise
    setting.out.check(Check(name=name, ok=found is None, detail=found or ""))
