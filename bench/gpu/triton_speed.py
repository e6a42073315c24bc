"""The Triton kernels, timed: each case is checked against torch before its time counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_efa.quantization import quantize_1x128 as quantize_by_torch
from moe_efa.triton_kernels import reference
from moe_efa.triton_kernels.permute import permute
from moe_efa.triton_kernels.permute_quantize import permute_quantize
from moe_efa.triton_kernels.plan_rows import plan_rows
from moe_efa.triton_kernels.quantize import quantize_1x128
from moe_efa.triton_kernels.reference import RowPlan
from moe_efa.triton_kernels.router_topk import router_topk
from moe_efa.triton_kernels.swiglu import swiglu, swiglu_quantize
from moe_efa.triton_kernels.swiglu_backward import swiglu_backward
from moe_efa.triton_kernels.unpermute import unpermute
from moe_efa.triton_kernels.unpermute_backward import unpermute_backward

from . import checks, floors, shapes
from .cuda_speed import FRACTION, source_rows
from .results import Bar, Check, Timed
from .setting import Setting, shape_conditions
from .shapes import Shape

BF16_ULP = 2.0**-7  # of a rounding up or down by one ulp, relative
FP8_ULP = 2.0**-3


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is timed, how many bytes it has to move, and how to see that it is right."""

    kernel: str
    bytes: int
    call: Callable[[], object]
    problem: Callable[[], str | None]
    has_bar: bool = True
    conditions: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Operands:
    """Tensors of one shape on the device; ``rows`` are those of all experts, without padding."""

    logits: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    x: Tensor
    plan: RowPlan
    source: Tensor
    y: Tensor
    row_weights: Tensor
    gate_up: Tensor
    grad_hidden: Tensor

    @property
    def rows(self) -> int:
        """Of all experts."""
        return len(self.source)


def operands(shape: Shape, device: str) -> Operands:
    """The plan is made without the kernels."""
    topk_idx, topk_weights = shapes.route(shape)
    source, positions = source_rows(topk_idx, shape.experts)
    counts = torch.bincount(topk_idx[topk_idx >= 0], minlength=shape.experts)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(torch.int32)
    plan = RowPlan(counts.to(device), offsets.to(device), positions.to(device), 1)
    rows, inner = len(source), shape.intermediate
    return Operands(
        logits=shapes.logits_of(shape).to(device),
        topk_idx=topk_idx.to(device),
        topk_weights=topk_weights.to(device),
        x=shapes.random_rows(shape.tokens, shape.hidden, device=device),
        plan=plan,
        source=source.to(device),
        y=shapes.random_rows(rows, shape.hidden, seed=1, device=device),
        row_weights=torch.rand(rows, generator=torch.Generator().manual_seed(2)).to(device),
        gate_up=shapes.random_rows(rows, 2 * inner, seed=3, device=device),
        grad_hidden=shapes.random_rows(rows, inner, seed=4, device=device),
    )


def cases(shape: Shape, of: Operands) -> Iterator[Case]:
    """All kernels at one shape."""
    tokens, hidden, inner, rows = shape.tokens, shape.hidden, shape.intermediate, of.rows
    options: dict[str, Any] = {"score_function": "sigmoid", "n_group": shape.groups, "topk_group": shape.topk_groups}
    bias = torch.zeros(shape.experts, device=of.x.device)
    plan, weights, gate_up = of.plan, of.row_weights, of.gate_up
    yield Case(
        kernel="triton-router",
        bytes=floors.router(tokens, shape.experts, shape.topk),
        call=lambda: router_topk(of.logits, shape.topk, e_score_correction_bias=bias, **options),
        problem=lambda: router_problem(of.logits, shape.topk, bias, options),
        has_bar=False,
    )
    yield Case(
        kernel="triton-plan-rows",
        bytes=floors.plan_rows(tokens, shape.topk, shape.experts),
        call=lambda: plan_rows(of.topk_idx, num_experts=shape.experts),
        problem=lambda: plan_problem(of.topk_idx, shape.experts, plan),
        has_bar=False,
    )
    yield Case(
        kernel="triton-quantize",
        bytes=floors.quantize(tokens, hidden),
        call=lambda: quantize_1x128(of.x),
        problem=lambda: quantize_problem(of.x),
    )
    yield Case(
        kernel="triton-permute",
        bytes=floors.permute(tokens, rows, hidden),
        call=lambda: permute(of.x, plan, topk_weights=of.topk_weights, num_rows=rows),
        problem=lambda: checks.bitwise("rows", permute(of.x, plan, num_rows=rows)[0], of.x[of.source]),
    )
    yield Case(
        kernel="triton-permute-quantize",
        bytes=floors.permute_quantize(tokens, rows, hidden),
        call=lambda: permute_quantize(of.x, plan, topk_weights=of.topk_weights, num_rows=rows),
        problem=lambda: permute_quantize_problem(of),
    )
    yield Case(
        kernel="triton-unpermute",
        bytes=floors.unpermute(tokens, rows, hidden),
        call=lambda: unpermute(of.y, plan, weights=weights),
        problem=lambda: checks.bitwise(
            "out", unpermute(of.y, plan, weights=weights)[0], checks.fixed_order_sum(of.y, plan.positions, weights)
        ),
    )
    yield Case(
        kernel="triton-unpermute-backward",
        bytes=floors.unpermute_backward(tokens, rows, hidden),
        call=lambda: unpermute_backward(of.x, of.y, plan, weights=weights),
        problem=lambda: checks.bitwise(
            "grad_y",
            unpermute_backward(of.x, of.y, plan, weights=weights)[0],
            (weights[:, None] * of.x[of.source].float()).to(torch.bfloat16),
        ),
    )
    yield Case(
        kernel="triton-swiglu",
        bytes=floors.swiglu(rows, inner, quantized=False),
        call=lambda: swiglu(gate_up, weights=weights),
        problem=lambda: swiglu_problem(gate_up, weights),
    )
    yield Case(
        kernel="triton-swiglu-quantize",
        bytes=floors.swiglu(rows, inner, quantized=True),
        call=lambda: swiglu_quantize(gate_up, weights=weights),
        problem=lambda: swiglu_quantize_problem(gate_up, weights),
    )
    yield Case(
        kernel="triton-swiglu-backward",
        bytes=floors.swiglu_backward(rows, inner, quantized=False),
        call=lambda: swiglu_backward(of.grad_hidden, gate_up, weights=weights),
        problem=lambda: swiglu_backward_problem(of.grad_hidden, gate_up, weights),
    )


def run(setting: Setting) -> None:
    """All shapes, the most important first."""
    ceiling = setting.ceilings().get("copy_gb_per_s")
    for shape in shapes.timed_shapes(dry_run=setting.dry_run):
        if not setting.has_time_for(f"Triton kernels at {shape.name}", 0 if setting.dry_run else 8):
            continue
        of = operands(shape, setting.device)
        for case in cases(shape, of):
            name = f"{case.kernel}/{shape.name}"
            if not setting.has_time_for(name, 0 if setting.dry_run else 2):
                continue
            try:
                problem = case.problem()
                setting.synchronize()
            except Exception as error:  # whatever the compiler or the launch says
                setting.out.check(Check(name=name, ok=False, detail=f"{type(error).__name__}: {error}"))
                continue
            setting.out.check(Check(name=name, ok=problem is None, detail=problem or "as torch"))
            if problem is not None:
                continue
            timing = setting.timer(case.call)
            bars = []
            if ceiling and case.has_bar and (shape.tokens >= shapes.LARGE_TOKENS or setting.dry_run):
                fraction = case.bytes / timing.us / 1e3 / ceiling
                bars.append(Bar(what="fraction of copy", value=fraction, least=FRACTION))
            setting.out.timed(
                Timed(
                    name=name,
                    kernel=case.kernel,
                    conditions=shape_conditions(
                        shape, rows=of.rows, intermediate=shape.intermediate, **case.conditions
                    ),
                    us=timing.us,
                    us_p20=timing.us_p20,
                    us_p80=timing.us_p80,
                    runs=timing.runs,
                    bytes=case.bytes,
                    ceiling=ceiling,
                    bars=bars,
                )
            )
        del of
        setting.release_memory()


def router_problem(logits: Tensor, top_k: int, bias: Tensor | None, options: dict[str, Any]) -> str | None:
    """Scores within what exp and sums allow; the experts are, exactly, the best of the scores as returned."""
    got = router_topk(logits, top_k, e_score_correction_bias=bias, **options)
    if logits.numel() == 0:
        return None if got.topk_idx.shape == got.topk_weights.shape == (0, top_k) else "shapes without tokens"
    want = reference.router_topk(logits, top_k, e_score_correction_bias=bias, **options)
    relative = (8 + 4 * float(logits.abs().max()) + logits.shape[1]) * 2.0**-23
    chosen = best_experts(got.scores, top_k, bias, options.get("n_group", 1), options.get("topk_group", 1))
    weights = got.scores.gather(1, chosen)
    weights = weights / weights.sum(1, keepdim=True)
    return checks.first_problem(
        checks.bounded("scores", got.scores, want.scores, relative * want.scores.abs() + 1e-30),
        checks.bitwise("experts", got.topk_idx, chosen),
        checks.bounded("weights", got.topk_weights, weights, (top_k + 4) * 2.0**-23 * weights + 1e-30),
    )


def best_experts(scores: Tensor, top_k: int, bias: Tensor | None, n_group: int, topk_group: int) -> Tensor:
    """[T, K]: of the groups with the largest sums of two, the largest; of equal ones the first."""
    biased = scores if bias is None else scores + bias
    if topk_group < n_group:
        groups = biased.view(len(biased), n_group, -1)
        two = groups.sort(dim=-1, descending=True, stable=True).values[..., :2]
        best = (two[..., 0] + two[..., 1]).sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
        out = torch.ones(groups.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, False)
        biased = groups.masked_fill(out[..., None], -torch.inf).flatten(1)
    return biased.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()


def plan_problem(topk_idx: Tensor, num_experts: int, want: RowPlan) -> str | None:
    """Counts, offsets and positions, bitwise."""
    got = plan_rows(topk_idx, num_experts=num_experts, expert_alignment=want.expert_alignment)
    return checks.first_problem(
        *(
            checks.bitwise(name, getattr(got, name), getattr(want, name))
            for name in ("tokens_per_expert", "offsets", "positions")
        )
    )


def by_torch(x: Tensor, compare: Callable[[Tensor, Tensor], str | None], scale_format: str = "fp32") -> str | None:
    """Compares with torch's rows on the device, which is quick; what differs is for the CPU to judge."""
    problem = compare(*quantize_by_torch(x, scale_format=scale_format))
    if problem is not None and x.device.type != "cpu":
        q, scales = quantize_by_torch(x.cpu(), scale_format=scale_format)
        problem = compare(q.to(x.device), scales.to(x.device))
    return problem


def quantize_problem(x: Tensor, scale_format: str = "fp32") -> str | None:
    """Bitwise."""
    q, scales = quantize_1x128(x, scale_format=scale_format)

    def compare(want_q: Tensor, want_scales: Tensor) -> str | None:
        return checks.first_problem(checks.bitwise("q", q, want_q), checks.bitwise("scales", scales, want_scales))

    return by_torch(x, compare, scale_format)


def permute_quantize_problem(of: Operands) -> str | None:
    """Bitwise: quantized, then moved."""
    got = permute_quantize(of.x, of.plan, topk_weights=of.topk_weights, num_rows=of.rows)

    def compare(q: Tensor, scales: Tensor) -> str | None:
        return checks.first_problem(
            checks.bitwise("q", got.q.view(torch.uint8), q.view(torch.uint8)[of.source]),
            checks.bitwise("scales", got.scales, scales[of.source]),
        )

    return by_torch(of.x, compare)


def swiglu_problem(gate_up: Tensor, weights: Tensor) -> str | None:
    """exp differs in last bits, so a result may be rounded the other way."""
    want = reference.swiglu(gate_up, weights=weights).float()
    return checks.bounded("hidden", swiglu(gate_up, weights=weights).float(), want, BF16_ULP * want.abs() + 1e-30)


def swiglu_quantize_problem(gate_up: Tensor, weights: Tensor) -> str | None:
    """Values within an e4m3 rounding, the smallest step being 2**-9 of a scale."""
    q, scales = swiglu_quantize(gate_up, weights=weights)
    want_q, want_scales = reference.swiglu_quantize(gate_up, weights=weights)
    values, want = (reference.dequantize_1x128(*pair) for pair in ((q, scales), (want_q, want_scales)))
    step = want_scales.repeat_interleave(128, 1)[:, : want.shape[1]] * 2.0**-9
    return checks.first_problem(
        checks.bounded("scales", scales, want_scales, 2.0**-14 * want_scales),
        checks.bounded("values", values, want, FP8_ULP * want.abs() + step),
    )


def swiglu_backward_problem(grad_hidden: Tensor, gate_up: Tensor, weights: Tensor) -> str | None:
    """Each element to rounding, of bf16 and of the terms that cancel in silu's derivative."""
    got = swiglu_backward(grad_hidden, gate_up, weights=weights)
    want = reference.swiglu_backward(grad_hidden, gate_up, weights=weights)
    grad = (grad_hidden.float() * weights[:, None]).abs()
    gate, up = gate_up.float().chunk(2, dim=1)
    # What is added up has this magnitude; exp is within 2 + |gate| ulps.
    terms = torch.cat([grad * up.abs() * (1 + gate.abs()), grad * gate.abs()], dim=1)
    slack = terms * (4 + torch.cat([gate, gate], 1).abs()) * 2.0**-23
    bound = BF16_ULP * want.grad_gate_up.float().abs() + slack + 1e-30
    assert got.grad_weights is not None and want.grad_weights is not None
    products = (grad_hidden.float() * reference.swiglu(gate_up.float())).abs().sum(1)
    return checks.first_problem(
        checks.bounded("grad_gate_up", got.grad_gate_up.float(), want.grad_gate_up.float(), bound),
        checks.bounded("grad_weights", got.grad_weights, want.grad_weights, 2.0**-12 * products + 1e-30),
    )
