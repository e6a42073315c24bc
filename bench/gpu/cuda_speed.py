"""Plan, pack, pull and combine of csrc/kernels/cuda, timed by the shim; and how long a flag takes."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_efa.quantization import dequantize_1x128, quantize_1x128

from . import checks, floors, shapes
from .build import shim_path
from .cuda_kernels import BF16, FP8, KernelError, Shim, World
from .results import Bar, Check, Timed
from .setting import Setting, shape_conditions
from .shapes import Shape
from .timing import Timing

NIC_SMS = 6  # what packing may take while a NIC is fed
NIC_GB_PER_S = 50.0
PLAN_US = 10.0
FRACTION = 0.90


def run(setting: Setting) -> None:
    """All shapes, the most important first."""
    shim = Shim(shim_path(dry_run=setting.dry_run))
    _flag_latency(shim, setting)
    for shape in shapes.timed_shapes(dry_run=setting.dry_run):
        if not setting.has_time_for(f"CUDA kernels at {shape.name}", 0 if setting.dry_run else 12):
            continue
        for part in (_sending, _one_rank):
            try:
                part(shim, setting, shape)
            except torch.OutOfMemoryError as error:
                setting.out.note(f"left out: {part.__name__.strip('_')} {shape.name}: {error}")
            except KernelError as error:
                setting.out.check(
                    Check(name=f"cuda {part.__name__.strip('_')} {shape.name}", ok=False, detail=str(error))
                )
            setting.release_memory()


def _flag_latency(shim: Shim, setting: Setting) -> None:
    rounds = 20 if setting.dry_run else 2000
    try:
        found = sorted(shim.flag_latency_us(setting, rounds) for _ in range(3))
    except KernelError as error:
        setting.out.check(Check(name="flag latency", ok=False, detail=str(error)))
        return
    setting.out.facts(flag_round_trip_us=found[1], flag_round_trip_rounds=rounds)
    setting.out.note(f"a flag from the GPU to the CPU and back: {found[1]:.2f} us (both words in mapped host memory)")


def _sending(shim: Shim, setting: Setting, shape: Shape) -> None:
    """Of a rank among `shape.ranks`: plan, and pack for all nodes."""
    topk_idx, topk_weights = shapes.route(shape)
    x = shapes.random_rows(shape.tokens, shape.hidden, device=setting.device)
    for wire, label in ((FP8, "fp8"), (BF16, "bf16")):
        world = World(
            shim,
            setting,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            x=x,
            num_experts=shape.experts,
            num_nodes=shape.ranks // shape.node_size,
            node_size=shape.node_size,
            wire_dtype=wire,
        )
        try:
            if wire == FP8:
                _plan(setting, shape, world)
            _pack(setting, shape, world, label)
        finally:
            world.close()


def _sending_conditions(shape: Shape, world: World, **more: object) -> dict[str, object]:
    nodes = shape.ranks // shape.node_size
    return shape_conditions(shape, ranks=shape.ranks, nodes=nodes, rows=world.facts.rows, **more)


def _plan(setting: Setting, shape: Shape, world: World) -> None:
    world.run("plan")
    _checked(setting, f"cuda-plan/{shape.name}", world.check("plan"))
    timing = setting.timer(lambda: world.launch("plan"))
    bars = [Bar(what="plan, us", value=timing.us, most=PLAN_US)] if shape.tokens <= 4096 else []
    floor = floors.plan(shape.tokens, shape.topk, world.facts.rows)
    _emit(setting, "cuda-plan", shape, _sending_conditions(shape, world), timing, floor, bars=bars)


def _pack(setting: Setting, shape: Shape, world: World, label: str) -> None:
    sms, facts = setting.num_sms, world.facts
    world.run("pack", sms)
    _checked(setting, f"cuda-pack-{label}/{shape.name}", world.check("pack"))
    conditions = _sending_conditions(shape, world, wire=label)
    floor = floors.pack(tokens=facts.tokens, hidden=shape.hidden, chunk_bytes=facts.chunk_bytes)
    if label == "fp8":
        few = setting.timer(lambda: world.launch("pack", NIC_SMS), prepare=lambda: world.prepare("pack"))
        rate = facts.remote_bytes / few.us / 1e3
        is_large = shape.tokens >= shapes.LARGE_TOKENS or setting.dry_run
        _emit(
            setting,
            f"cuda-pack-{label}-{NIC_SMS}sm",
            shape,
            conditions | {"blocks": NIC_SMS},
            few,
            floor,
            bars=[Bar(what=f"wire GB/s on {NIC_SMS} SMs", value=rate, least=NIC_GB_PER_S)] if is_large else [],
            numbers={"wire_gb_per_s": rate},
        )
    _best_grid(setting, f"cuda-pack-{label}", shape, conditions, world, "pack", [(sms, 0), (2 * sms, 0)], floor)


def _one_rank(shim: Shim, setting: Setting, shape: Shape) -> None:
    """Of the only rank: its tokens come back to it. FP8 on the wire, then through pull and combine."""
    topk_idx, topk_weights = shapes.route(shape)
    x = shapes.random_rows(shape.tokens, shape.hidden, device=setting.device)
    # The CPU's FP8 is the one that all kernels are compared with.
    q, scales = (part.to(setting.device) for part in quantize_1x128(x.cpu()))
    source, positions = source_rows(topk_idx, shape.experts)
    source, positions = source.to(setting.device), positions.to(setting.device)
    sms = setting.num_sms
    for out_dtype, label in ((BF16, "fp8-to-bf16"), (FP8, "fp8")):
        world = World(
            shim,
            setting,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            x=x,
            num_experts=shape.experts,
            wire_dtype=FP8,
            out_dtype=out_dtype,
        )
        try:
            facts = world.facts
            conditions = shape_conditions(shape, ranks=1, rows=facts.output_rows, wire="fp8")
            world.run("pack", sms)
            world.run("pull", sms)
            if out_dtype == BF16:
                want = dequantize_1x128(q, scales, dtype=torch.bfloat16)[source]
                problem = checks.bitwise("rows", world.rows, want)
            else:
                problem = checks.first_problem(
                    checks.bitwise("rows", world.rows, q.view(torch.uint8)[source].view(torch.float8_e4m3fn)),
                    checks.bitwise("scales", world.row_scales, scales[source]),
                )
            weights = row_weights(topk_weights.to(setting.device), positions, len(source))
            problem = checks.first_problem(problem, checks.bitwise("weights", world.row_weights, weights))
            _checked(setting, f"cuda-pull-{label}/{shape.name}", problem)
            _best_grid(
                setting,
                f"cuda-pull-{label}",
                shape,
                conditions,
                world,
                "pull",
                [(sms, 0), (sms // 2, 0)],  # of its registers one block fits on an SM
                floors.pull(
                    chunk_bytes=facts.chunk_bytes,
                    rows=facts.output_rows,
                    hidden=shape.hidden,
                    fp8_out=out_dtype == FP8,
                ),
            )
            if out_dtype == BF16:
                _combine(setting, shape, world, positions, conditions)
        finally:
            world.close()


def _combine(setting: Setting, shape: Shape, world: World, positions: Tensor, conditions: dict[str, object]) -> None:
    sms = setting.num_sms
    world.y.copy_(shapes.random_rows(*world.y.shape, seed=1, device=setting.device))
    few = max(1, sms // 16)
    world.run("combine", sms - few, few)
    expected = checks.fixed_order_sum(world.y, positions, world.row_weights)
    _checked(setting, f"cuda-combine-bf16/{shape.name}", checks.bitwise("out", world.out, expected))
    _best_grid(
        setting,
        "cuda-combine-bf16",
        shape,
        conditions | {"wire": "none: one rank"},
        world,
        "combine",
        [(sms - few, few), (max(1, sms // 2), few)],
        floors.combine(tokens=shape.tokens, rows=world.facts.output_rows, hidden=shape.hidden),
    )


def source_rows(topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Of the expert-major rows without padding: the token of each [R], and the row of each (token, k) [T, K]."""
    flat = topk_idx.flatten()
    order = torch.where(flat < 0, num_experts, flat).sort(stable=True).indices[: int((flat >= 0).sum())]
    positions = torch.full((flat.numel(),), -1, dtype=torch.int32)
    positions[order] = torch.arange(len(order), dtype=torch.int32)
    return order // topk_idx.shape[1], positions.view(topk_idx.shape)


def row_weights(topk_weights: Tensor, positions: Tensor, rows: int) -> Tensor:
    """Of each (token, k) to its row [R]."""
    weights = torch.zeros(rows, device=topk_weights.device)
    weights[positions[positions >= 0].long()] = topk_weights[positions >= 0]
    return weights


def _checked(setting: Setting, name: str, problem: str | None) -> None:
    setting.out.check(Check(name=name, ok=problem is None, detail=problem or "bitwise"))
    if problem is not None:
        raise KernelError(f"{name}: {problem}; not timed")


def _best_grid(
    setting: Setting,
    kernel: str,
    shape: Shape,
    conditions: dict[str, object],
    world: World,
    op: str,
    grids: list[tuple[int, int]],
    floor: int,
) -> None:
    """Times several numbers of blocks and keeps the fastest; one that the device does not take is left out."""
    found: dict[tuple[int, int], Timing] = {}
    for grid in grids:
        try:
            world.run(op, *grid)
            found[grid] = setting.timer(lambda g=grid: world.launch(op, *g), prepare=lambda: world.prepare(op))
        except KernelError as error:
            if grid == grids[0]:
                raise
            setting.out.note(f"{kernel}/{shape.name} with {sum(grid)} blocks: {error}")
    grid = min(found, key=lambda key: found[key].us)
    _emit(
        setting,
        kernel,
        shape,
        conditions | {"blocks": sum(grid)},
        found[grid],
        floor,
        bars=_fraction_bar(setting, shape, floor, found[grid].us),
        numbers={f"us_with_{sum(key)}_blocks": timing.us for key, timing in found.items()},
    )


def _fraction_bar(setting: Setting, shape: Shape, floor: int, us: float) -> list[Bar]:
    """Of the copy ceiling, where the shape is large enough."""
    ceiling = setting.ceilings().get("copy_gb_per_s")
    if ceiling is None or (shape.tokens < shapes.LARGE_TOKENS and not setting.dry_run):
        return []
    return [Bar(what="fraction of copy", value=floor / us / 1e3 / ceiling, least=FRACTION)]


def _emit(
    setting: Setting,
    kernel: str,
    shape: Shape,
    conditions: dict[str, object],
    timing: Timing,
    floor: int,
    *,
    bars: list[Bar],
    numbers: dict[str, float] | None = None,
) -> None:
    setting.out.timed(
        Timed(
            name=f"{kernel}/{shape.name}",
            kernel=kernel,
            conditions=dict(conditions),
            us=timing.us,
            us_p20=timing.us_p20,
            us_p80=timing.us_p80,
            runs=timing.runs,
            bytes=floor,
            ceiling=setting.ceilings().get("copy_gb_per_s"),
            bars=bars,
            numbers=numbers or {},
        )
    )
