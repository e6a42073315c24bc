"""One rank's share of a Kimi-K2 layer at EP64, forward and backward, on one GPU. Single-rank stand-in: the project's
Triton kernels and torch's grouped_mm do the work of a rank, and copies on side streams, as long as the wire would take,
stand in for the network. It is not ExpertParallel: no protocol, no second rank.

A rank of 64 has 6 of the 384 experts and receives as many rows as its tokens have selections. Here its own tokens'
selections stand in for those rows: expert e becomes expert e mod 6.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_efa.triton_kernels.autograd import permute, unpermute
from moe_efa.triton_kernels.plan_rows import plan_rows
from moe_efa.triton_kernels.router_topk import router_topk
from moe_efa.triton_kernels.swiglu import swiglu
from moe_efa.triton_kernels.swiglu_backward import swiglu_backward

from . import checks, floors, shapes
from .build import shim_path
from .cuda_kernels import Shim
from .grouped_gemm import grouped_mm
from .results import Bar, Check, Timed
from .setting import Setting, shape_conditions
from .shapes import Shape
from .timing import Timing

WIRE_GB_PER_S = 50.0  # of one GPU's NICs on p5en
LATENCY_US = 20.0  # of a message: published are 15 to 25
OVERLAP = 0.8
ALIGNMENT = 16
ROW_ERROR = 2.0**-5  # of a row after three products in bf16


def layer_shape(*, dry_run: bool) -> Shape:
    """4096 tokens of Kimi-K2 at EP64."""
    if dry_run:
        return Shape(model="tiny", tokens=4, **shapes.TINY)
    return Shape(model="kimi-k2-ep64", tokens=4096, **shapes.KIMI_K2)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up * weight by the Triton kernels."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        return swiglu(gate_up, weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up, weights = ctx.saved_tensors
        grads = swiglu_backward(grad.contiguous(), gate_up, weights=weights)
        return grads.grad_gate_up, grads.grad_weights


class SingleRankShare(nn.Module):
    """Router, and this rank's experts on the rows that stand in for what it would receive."""

    def __init__(self, shape: Shape, *, local_experts: int, device: str) -> None:
        super().__init__()
        hidden, inner = shape.hidden, shape.intermediate
        generator = torch.Generator(device=device).manual_seed(0)

        def random(*size: int) -> nn.Parameter:
            values = torch.randn(*size, generator=generator, device=device, dtype=torch.float32)
            return nn.Parameter(values.mul_(size[-1] ** -0.5).to(torch.bfloat16))

        self.shape, self.local_experts = shape, local_experts
        self.register_buffer("router", random(shape.experts, hidden).detach())
        self.register_buffer("bias", torch.zeros(shape.experts, device=device))
        self.gate_up_proj = random(local_experts, 2 * inner, hidden)
        self.down_proj = random(local_experts, hidden, inner)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, K] of the experts here, and their weights."""
        logits = (x.detach() @ self.router.T).float()
        found = router_topk(logits, self.shape.topk, score_function="sigmoid", e_score_correction_bias=self.bias)
        return found.topk_idx % self.local_experts, found.topk_weights

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]. Nothing is read back from the device."""
        topk_idx, topk_weights = self.route(x)
        plan = plan_rows(topk_idx, num_experts=self.local_experts, expert_alignment=ALIGNMENT)
        rows, weights = permute(x, topk_weights, plan, num_rows=plan.max_rows)
        ends = plan.offsets[1:]
        gate_up = grouped_mm(rows, self.gate_up_proj.transpose(1, 2), ends)
        y = grouped_mm(_SwiGLU.apply(gate_up, weights), self.down_proj.transpose(1, 2), ends)
        return unpermute(y, plan)

    def plain(self, x: Tensor) -> Tensor:
        """The same by plain torch, token by expert."""
        topk_idx, topk_weights = self.route(x)
        out = torch.zeros(x.shape, device=x.device)
        for expert in range(self.local_experts):
            token, k = (topk_idx == expert).nonzero(as_tuple=True)
            gate, up = (x[token].float() @ self.gate_up_proj[expert].float().T).chunk(2, dim=1)
            hidden = nn.functional.silu(gate) * up * topk_weights[token, k][:, None]
            out = out.index_add(0, token, hidden @ self.down_proj[expert].float().T)
        return out


@dataclass(frozen=True, kw_only=True)
class WireBytes:
    """What one rank sends to other nodes, and receives, in each of the four exchanges of a layer."""

    dispatch: int
    combine: int
    grad_dispatch: int
    grad_combine: int


def wire_bytes(shape: Shape, topk_idx: Tensor) -> WireBytes:
    """Of a rank of node 0: FP8 out, bf16 back; gradients bf16 both ways. One row per (token, remote node)."""
    per_node = shape.experts // (shape.ranks // shape.node_size)
    nodes = (topk_idx // per_node).masked_fill(topk_idx < 0, 0)
    goes = torch.zeros(len(topk_idx), shape.ranks // shape.node_size, dtype=torch.bool, device=topk_idx.device)
    goes.scatter_(1, nodes, True)
    rows = int(goes[:, 1:].sum())
    bf16 = rows * floors.BF16 * shape.hidden
    return WireBytes(dispatch=rows * floors.fp8_row(shape.hidden), combine=bf16, grad_dispatch=bf16, grad_combine=bf16)


def wire_us(num_bytes: float) -> float:
    """How long a rank's NICs take for so many bytes, latency aside.

    >>> wire_us(5e6)
    100.0
    """
    return num_bytes / WIRE_GB_PER_S / 1e3


class Wire:
    """A direction of the network: a side stream with copies of the bytes, and pauses for the rest of their time."""

    def __init__(self, setting: Setting, shim: Shim, largest_bytes: int) -> None:
        self._shim, self._copy_gb_per_s = shim, setting.ceilings().get("copy_gb_per_s", float("inf"))
        self.stream = None if setting.dry_run else torch.cuda.Stream()
        self._buffers = [torch.empty(largest_bytes, dtype=torch.uint8, device=setting.device) for _ in range(2)]

    def send(self, num_bytes: int, *, after: Any = None, first: bool = False) -> Any:
        """Queues a message behind those before it and behind the event `after`; returns the event of its arrival.

        Messages follow each other on the wire, so the `first` one alone pays the latency.
        """
        copy_us = 2 * num_bytes / self._copy_gb_per_s / 1e3
        pause_us = max(0.0, wire_us(num_bytes) - copy_us) + (LATENCY_US if first else 0.0)
        if self.stream is None:
            self._buffers[1][:num_bytes].copy_(self._buffers[0][:num_bytes])
            self._shim.pause(min(pause_us, 100.0), 0)
            return None
        if after is not None:
            self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            self._buffers[1][:num_bytes].copy_(self._buffers[0][:num_bytes], non_blocking=True)
            self._shim.pause(pause_us, self.stream.cuda_stream)
            arrived = torch.cuda.Event()
            arrived.record()
        return arrived


class Rounds:
    """Forward and backward of all waves, with or without the wire, with or without the work."""

    def __init__(
        self,
        layer: SingleRankShare,
        x: Tensor,
        grad: Tensor,
        *,
        waves: int,
        sent: WireBytes,
        wires: Sequence[Wire],
    ) -> None:
        self.layer, self.waves, self.sent = layer, waves, sent
        self.xs = [part.detach().requires_grad_() for part in x.chunk(waves)]
        self.grads = list(grad.chunk(waves))
        self.out_wire, self.back_wire = wires

    def __call__(self, *, work: bool, wire: bool) -> list[Tensor]:
        """One layer. Returns the results of the waves."""

        def forward(i: int, _: list[Any]) -> Tensor:
            return self.layer(self.xs[i])

        results = self._pass(self.sent.dispatch, self.sent.combine, forward, range(self.waves), work, wire)

        def backward(i: int, results: list[Any]) -> None:
            results[i].backward(self.grads[i])

        order = range(self.waves)
        self._pass(self.sent.grad_dispatch, self.sent.grad_combine, backward, order, work, wire, results)
        return results

    def _pass(
        self,
        out_bytes: int,
        back_bytes: int,
        compute: Callable[[int, list[Any]], Any],
        order: Sequence[int],
        work: bool,
        wire: bool,
        results: list[Any] | None = None,
    ) -> list[Any]:
        """All messages out are queued at once; a wave's work begins when its message is there, its result goes back."""
        arrivals: list[Any] = [None] * self.waves
        begun = self._mark()
        if wire:
            arrivals = [self.out_wire.send(out_bytes // self.waves, after=begun, first=i == 0) for i in order]
        found: list[Any] = [] if results is None else results
        returns = []
        for i, arrival in zip(order, arrivals, strict=True):
            if arrival is not None and work:
                torch.cuda.current_stream().wait_event(arrival)
            if work:
                value = compute(i, found)
                if results is None:
                    found.append(value)
            if wire:
                after = self._mark() if work else arrival
                returns.append(self.back_wire.send(back_bytes // self.waves, after=after, first=i == 0))
        for event in returns:
            if event is not None:
                torch.cuda.current_stream().wait_event(event)
        return found

    def _mark(self) -> Any:
        if self.out_wire.stream is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event


def overlap_efficiency(comm_us: float, compute_us: float, together_us: float) -> float:
    """1 where the shorter of the two is hidden completely.

    >>> overlap_efficiency(100.0, 50.0, 110.0)
    0.8
    """
    return (comm_us + compute_us - together_us) / min(comm_us, compute_us)


def run(setting: Setting) -> None:
    """Correct, then timed: the work alone, the wire alone, both, for several numbers of waves."""
    shape, device = layer_shape(dry_run=setting.dry_run), setting.device
    layer = SingleRankShare(shape, local_experts=max(2, shape.experts // shape.ranks), device=device)
    problem = _problem(
        layer, shapes.random_rows(min(3 if setting.dry_run else 256, shape.tokens), shape.hidden, device=device)
    )
    setting.out.check(
        Check(name=f"layer-share/{shape.name}", ok=problem is None, detail=problem or "rows within bound")
    )
    if problem is not None:
        return
    x = shapes.random_rows(shape.tokens, shape.hidden, device=device)
    grad = shapes.random_rows(shape.tokens, shape.hidden, seed=1, device=device)
    sent = wire_bytes(shape, shapes.route(shape)[0])
    shim = Shim(shim_path(dry_run=setting.dry_run))
    largest = max(sent.dispatch, sent.combine, sent.grad_dispatch, sent.grad_combine, 1)
    wires = [Wire(setting, shim, largest) for _ in range(2)]
    for waves in (2,) if setting.dry_run else (1, 8, 4, 16):
        if setting.has_time_for(f"layer share in {waves} waves", 0 if setting.dry_run else 8):
            _time(setting, shape, Rounds(layer, x, grad, waves=waves, sent=sent, wires=wires))


def _time(setting: Setting, shape: Shape, rounds: Rounds) -> None:
    """The work alone, the wire alone, both."""
    waves, layer, sent = rounds.waves, rounds.layer, rounds.sent
    rows = shape.tokens * shape.topk
    flops = 3 * 3 * floors.grouped_gemm_flops(rows, shape.hidden, shape.intermediate)  # three matrices, three passes
    memory = _peak_bytes(setting, rounds)
    compute, comm, both = (
        _whole_layers(setting, lambda w=work, n=wire: rounds(work=w, wire=n))
        for work, wire in ((True, False), (False, True), (True, True))
    )
    efficiency = overlap_efficiency(comm.us, compute.us, both.us)
    bars = [Bar(what="overlap", value=efficiency, least=OVERLAP)] if waves >= 4 else []
    setting.out.timed(
        Timed(
            name=f"layer-share-{waves}-waves/{shape.name}",
            kernel=f"layer-share-{waves}-waves",
            conditions=shape_conditions(
                shape,
                rows=rows,
                waves=waves,
                local_experts=layer.local_experts,
                wire=f"{WIRE_GB_PER_S:g} GB/s and {LATENCY_US:g} us, paced copies on side streams",
                what="single-rank stand-in, forward and backward",
            ),
            us=both.us,
            us_p20=both.us_p20,
            us_p80=both.us_p80,
            runs=both.runs,
            flops=flops,
            ceiling=setting.ceilings().get("matmul_tflop_per_s"),
            bars=bars,
            numbers={
                "compute_us": compute.us,
                "wire_us": comm.us,
                "overlap_efficiency": efficiency,
                "compute_tflop_per_s": flops / compute.us / 1e6,
                "peak_bytes": memory,
                "parameter_bytes": 2 * sum(p.numel() * 2 for p in layer.parameters()),
                "wire_bytes": sent.dispatch + sent.combine + sent.grad_dispatch + sent.grad_combine,
            },
        )
    )


def _problem(layer: SingleRankShare, x: Tensor) -> str | None:
    """Results and gradients of tokens and weights against plain torch in fp32."""
    x = (x.float() / x.float().norm(dim=1, keepdim=True) * x.shape[1] ** 0.5).to(torch.bfloat16)
    generator = torch.Generator(device=x.device).manual_seed(3)
    grad = torch.randn(x.shape, generator=generator, device=x.device)
    found = []
    for function in (layer, layer.plain):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        out = function(leaf)
        out.backward(grad.to(out.dtype))
        weights = [p.grad.float().flatten(0, 1) for p in (layer.gate_up_proj, layer.down_proj)]
        assert leaf.grad is not None
        found.append([out.detach().float(), leaf.grad.float(), *weights])
    layer.zero_grad()
    names = ("out", "grad_x", "grad of gate_up", "grad of down")
    # Rows of weights whose gradients are small beside those of their expert have the error of the others.
    return checks.first_problem(
        *(
            checks.bounded(
                name,
                (a.double() - b.double()).norm(dim=1),
                torch.zeros(len(a), dtype=torch.float64, device=a.device),
                ROW_ERROR * (b.double().norm(dim=1) + b.double().norm(dim=1).mean()),
            )
            for name, a, b in zip(names, *found, strict=True)
        )
    )


def _whole_layers(setting: Setting, call: Callable[[], object]) -> Timing:
    """Of whole layers: long enough for the host's clock."""
    samples = []
    for _ in range(1 if setting.dry_run else 7):
        setting.synchronize()
        start = time.perf_counter()
        call()
        setting.synchronize()
        samples.append(1e6 * (time.perf_counter() - start))
    return Timing.of(samples)


def _peak_bytes(setting: Setting, rounds: Rounds) -> float:
    """Of one layer, parameters and their gradients included; of a dry run 0."""
    if setting.dry_run:
        return 0.0
    rounds(work=True, wire=False)
    rounds.layer.zero_grad()
    for x in rounds.xs:
        x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    rounds(work=True, wire=False)
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated())
