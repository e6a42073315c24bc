"""MoELayer in waves: the bits of one wave, and gradients of weights that are computed late, within a derived bound."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import moe_efa
from moe_efa.late_gradients import LateGradients
from moe_efa.native_group import NativeGroup
from moe_efa.nn import SwiGLUExperts, experts
from moe_efa.nn.grouped_mm import grouped_outer
from moe_efa.testing import assert_bitwise
from moe_efa.testing.spawn import spawn

E, K, H, I, T = 8, 3, 16, 16, 12  # noqa: E741
SIZES = {"num_experts": E, "hidden_size": H, "top_k": K, "max_tokens_per_rank": T, "memory_budget_bytes": 32 << 20}
LAYOUTS = {
    "ep4-node2-shm": (4, {"node_size": 2, "transport": "shm"}),
    "ep2-node1-tcp": (2, {"node_size": 1, "transport": "libfabric", "provider": "tcp"}),
}
# name: (options of the layer, dtype of its parameters, dtype of autocast, tokens of each rank, pinned routing)
CASES: dict[str, tuple[dict[str, Any], Any, Any, str, list[int] | None]] = {
    "weights-before-down": ({"num_shared_experts": 1}, torch.float32, None, "even", None),
    "weights-at-combine": ({"apply_weights": "at_combine"}, torch.float32, None, "uneven", None),
    "recomputed-aligned": ({"recompute": True, "expert_alignment": 8}, torch.float32, None, "uneven", None),
    "bf16": ({}, torch.bfloat16, None, "uneven", None),
    "autocast": ({}, torch.float32, torch.bfloat16, "even", None),
    "one-expert-takes-all": ({"norm_topk_prob": False}, torch.float32, None, "uneven", [-1, 5, -1]),
    "nothing-selected": ({}, torch.float32, None, "even", [-1, -1, -1]),
    "no-tokens": ({}, torch.float32, None, "none", None),
}
WAVES = (2, 5)


def row_by_row(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """grouped_mm whose rows do not depend on how many there are, as no library promises."""
    expert_of_row = torch.repeat_interleave(torch.arange(offsets.numel() - 1), offsets.diff().long())
    return (rows[:, :, None].float() * weight[expert_of_row].float()).sum(1).to(rows.dtype)


class Outers:
    """grouped_outer, and in float64 what it computes: the gradients, the sums of magnitudes, and how many terms."""

    def __init__(self) -> None:
        self.of_size: dict[torch.Size, list[torch.Tensor]] = {}

    def __call__(self, left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        exact = [torch.zeros(offsets.numel() - 1, left.shape[1], right.shape[1], dtype=torch.float64) for _ in range(2)]
        for expert, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            a, b = left[begin:end].double(), right[begin:end].double()
            exact[0][expert], exact[1][expert] = a.T @ b, a.T.abs() @ b.abs()
        self.of_size[exact[0].shape] = [*exact, offsets.diff()[:, None, None]]
        return grouped_outer(left, right, offsets)


@contextlib.contextmanager
def patched(**functions: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, function in functions.items():
            patch.setattr(experts, name, function)
        yield


def step(layer: Any, x: torch.Tensor, grad: torch.Tensor, autocast: Any, route: Any) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        out = layer(x, route)
    out.backward(grad)
    assert x.grad is not None
    values = {"out": out.detach(), "x": x.grad, "tokens_per_expert": layer.tokens_per_expert}
    for name, parameter in layer.named_parameters():
        values[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    layer.zero_grad()
    return values


def compare_waves(rank: int, group: dist.ProcessGroup, where: dict[str, Any]) -> int:
    compared = 0
    with moe_efa.ExpertParallel(group, **SIZES, **where) as ep:
        for name, (options, dtype, autocast, counts, pinned) in CASES.items():
            generator = torch.Generator().manual_seed(31 + rank)
            num_tokens = {"even": T, "uneven": (7, T, 0, 1)[rank], "none": 0}[counts]
            x = torch.randn(num_tokens, H, generator=generator).to(dtype)
            grad = torch.randn(num_tokens, H, generator=generator).to(dtype)
            route = None if pinned is None else torch.tensor(pinned).repeat(num_tokens, 1)
            layer = moe_efa.MoELayer(
                expert_parallel=ep, intermediate_size=I, initializer_range=0.3, seed=3, dtype=dtype, waves=1, **options
            )
            outers = Outers()
            with patched(grouped_mm=row_by_row, grouped_outer=outers):
                expected = step(layer, x, grad, autocast, route)
            for waves in WAVES:
                layer.waves = waves
                before = ep.stats()["rounds"]
                with patched(grouped_mm=row_by_row):
                    found = step(layer, x, grad, autocast, route)
                    assert ep.stats()["rounds"] - before == 2 * waves, name
                    layer.experts.late_gradients = lambda: None
                    at_once = found if waves == 2 else step(layer, x, grad, autocast, route)
                    del layer.experts.late_gradients
                for key, value in found.items():
                    assert_bitwise(at_once[key], value, f"{name}, {waves} waves, {key}: late or at once")
                    if not key.startswith("experts."):
                        assert_bitwise(value, expected[key], f"{name}, {waves} waves, {key}")
                        continue
                    # An element is a sum over the n rows of its expert. On its way into the sum a term is rounded at
                    # most n times with unit u = 2^-24: once as a product, and in the additions of its part and of the
                    # parts, which are fewer than n for whatever cut (a part without rows adds zero exactly). In bf16,
                    # with unit v = 2^-8, parts are rounded once, and the sums of W parts W - 1 times. So the error is
                    # at most ((1 + u)^n (1 + v)^W - 1) times the sum of the terms' magnitudes; in fp32 v is u.
                    exact, magnitudes, terms = outers.of_size[value.shape]
                    unit = 2.0**-24 if dtype == torch.float32 and autocast is None else 2.0**-8
                    factor = (1 + 2.0**-24) ** terms.double() * (1 + unit) ** waves - 1
                    assert bool(((value.double() - exact).abs() <= factor * magnitudes).all()), f"{name}, {key}"
                compared += 1
            layer.close()
    return compared


@pytest.mark.parametrize("layout", LAYOUTS)
def test_waves_give_the_bits_of_one_wave(layout):
    num_ranks, where = LAYOUTS[layout]
    assert spawn(compare_waves, num_ranks, where, timeout=120) == [len(CASES) * len(WAVES)] * num_ranks


def gradients_late(rank: int, group: dist.ProcessGroup) -> list[str]:
    """Who sees the gradients, when, and how often."""
    torch.manual_seed(rank)
    done = []
    layer = moe_efa.MoELayer(
        group, intermediate_size=I, seed=3, waves=4, **SIZES, node_size=1, transport="shm", num_shared_experts=1
    )
    x, grad = torch.randn(T, H), torch.randn(T, H)
    with patched(grouped_mm=row_by_row):
        expected = step(layer, x, grad, None, None)

        # However long the waits are, the order of the sums is the same; and the gradients of a wave's tokens leave
        # before those of its weights are computed.
        log: list[str] = []

        def start(self: NativeGroup, *args: Any, **options: Any) -> Any:
            if options.get("gradient"):
                log.append("leave")
            return start_combine(self, *args, **options)

        def outer(*args: Any) -> torch.Tensor:
            log.append("outer")
            return grouped_outer(*args)

        start_combine, has_ended = NativeGroup.start_combine, NativeGroup.has_ended
        for name, ended in {"never": lambda *_: False, "always": lambda *_: True, "as it is": has_ended}.items():
            log.clear()
            with patched(grouped_outer=outer), pytest.MonkeyPatch.context() as patch:
                patch.setattr(NativeGroup, "start_combine", start)
                patch.setattr(NativeGroup, "has_ended", ended)
                found = step(layer, x, grad, None, None)
            for key, value in found.items():
                assert_bitwise(value, expected[key], f"{name}: {key}")
            leaves = [at for at, what in enumerate(log) if what == "leave"]
            outers_before = [log[:at].count("outer") for at in leaves]
            assert log.count("outer") == 8, log
            if name == "always":  # nothing to wait for
                assert outers_before == [0, 0, 0, 0]
            elif name == "never":
                assert outers_before == [0, 2, 4, 6]
            assert all(count <= 2 * wave for wave, count in enumerate(outers_before)), log
        done.append("order")

        # Hooks: once, with the sum.
        seen: list[tuple[str, torch.Tensor]] = []
        weight = layer.experts.down_proj
        handles = [
            weight.register_hook(lambda gradient: seen.append(("tensor", gradient.clone()))),
            weight.register_post_accumulate_grad_hook(lambda param: seen.append(("after", param.grad.clone()))),
        ]
        step(layer, x, grad, None, None)
        assert [name for name, _ in seen] == ["tensor", "after"]
        for _, gradient in seen:
            assert_bitwise(gradient, expected["experts.down_proj"])
        for handle in handles:
            handle.remove()
        done.append("hooks")

        # A graph that is kept, gradients that are asked for.
        needed = x.clone().requires_grad_()
        out = layer(needed)
        parameters = dict(layer.named_parameters())
        for names in (["x"], ["experts.down_proj"], ["x", "experts.gate_up_proj"], ["x", *parameters]):
            inputs = [needed if name == "x" else parameters[name] for name in names]
            with patched(grouped_outer=outer):
                log.clear()
                gradients = torch.autograd.grad(out, inputs, grad, retain_graph=True)
            assert (len(log) > 0) == (names != ["x"])
            for name, gradient in zip(names, gradients, strict=True):
                assert_bitwise(gradient, expected[name], f"asked for {names}")
        out.backward(grad, retain_graph=True)
        out.backward(grad)
        assert_bitwise(weight.grad, 2 * expected["experts.down_proj"])
        layer.zero_grad()
        done.append("kept")

        # An error in the middle of a backward leaves nothing for the next one.
        out = layer(needed)

        def fail(*args: Any) -> torch.Tensor:
            log.append("outer")
            if len(log) == 3:
                raise ArithmeticError("no memory")
            return grouped_outer(*args)

        # Whether a rank finds the time for it or not: ranks that fail there have issued the same calls.
        for ended in (lambda *_: rank == 0, lambda *_: rank == 1, has_ended):
            log.clear()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(NativeGroup, "has_ended", ended)
                with patched(grouped_outer=fail), pytest.raises(ArithmeticError, match="no memory"):
                    out.backward(grad, retain_graph=True)
        layer.zero_grad()
        out.backward(grad)
        assert_bitwise(weight.grad, expected["experts.down_proj"])
        layer.zero_grad()
        done.append("error")

        # Checkpoints; frozen parameters.
        for options in ({"use_reentrant": False}, {"use_reentrant": True}):
            again = x.clone().requires_grad_()
            checkpoint(layer, again, **options).backward(grad)
            assert_bitwise(again.grad, expected["x"])
            assert_bitwise(weight.grad, expected["experts.down_proj"])
            layer.zero_grad()
        for frozen in (["experts.gate_up_proj"], ["experts.gate_up_proj", "experts.down_proj"]):
            for name in frozen:
                parameters[name].requires_grad_(False)
            found = step(layer, x, grad, None, None)
            for name, value in found.items():
                assert_bitwise(value, torch.zeros_like(value) if name in frozen else expected[name], name)
        for name in frozen:
            parameters[name].requires_grad_()
        done.append("checkpoints")

        # Modes that watch, and compilers, have one wave.
        before = layer.expert_parallel.stats()["rounds"]
        policy = checkpoint(layer, x, use_reentrant=False, context_fn=moe_efa.checkpoint_context)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        assert layer.expert_parallel.stats()["rounds"] - before == 2
        for out in (policy, compiled):
            assert_bitwise(out, expected["out"])
        done.append("one wave")
    layer.close()
    return done


def test_late_gradients_are_seen_as_ever():
    expected = ["order", "hooks", "kept", "error", "checkpoints", "one wave"]
    assert spawn(gradients_late, 2, timeout=120) == [expected] * 2


def wrapped(rank: int, group: dist.ProcessGroup) -> list[str]:
    """Gradients under wrappers that hook the parameters, of two steps added up."""
    torch.manual_seed(0)
    x, grad = torch.randn(T, H), torch.randn(T, H)
    expected: dict[str, torch.Tensor] = {}
    late = []
    for wrapper in ("none", "ddp", "fsdp of the layer", "fsdp of the experts"):
        layer = model = moe_efa.MoELayer(intermediate_size=I, seed=3, waves=3, **SIZES)
        if wrapper == "ddp":
            model = torch.nn.parallel.DistributedDataParallel(layer)
        elif wrapper != "none":
            fully_shard(layer if wrapper == "fsdp of the layer" else layer.experts, mesh=init_device_mesh("cpu", (1,)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LateGradients, "__init__", counted(LateGradients.__init__, late, wrapper))
            for _ in range(2):
                model(x.clone().requires_grad_()).backward(grad)
        for name, parameter in layer.named_parameters():
            value = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            assert_bitwise(value, expected.setdefault(name, value), f"{wrapper}: {name}")
        layer.close()
    return late


def counted(function: Any, calls: list[str], what: str) -> Any:
    def call(*args: Any) -> Any:
        calls.append(what)
        return function(*args)

    return call


def test_wrappers_that_hook_parameters_see_one_gradient():
    # Parameters of experts that are sharded by themselves show up in each call only.
    assert spawn(wrapped, 1) == [["none"] * 2 + ["ddp"] * 2 + ["fsdp of the layer"] * 2]


def test_parameters_that_are_not_at_hand_have_no_late_gradients():
    def make(**options: Any) -> SwiGLUExperts:
        return SwiGLUExperts(num_experts=2, hidden_size=4, intermediate_size=4, **options)

    assert make().late_gradients() is not None
    with torch.no_grad():
        assert make().late_gradients() is None
    sharded = make()
    sharded.down_proj = torch.nn.Parameter(sharded.down_proj.detach().flatten()[:5])
    assert sharded.late_gradients() is None
    compiled = make()
    compiled.compile()
    assert compiled.late_gradients() is None
    assert make().requires_grad_(False).late_gradients() is None
