"""Experts of one rank against plain autograd in float64, with and without the grouped kernel."""

from __future__ import annotations

import pytest
import torch

from moe_efa.nn import SwiGLUExperts
from moe_efa.nn import grouped_mm as grouped
from moe_efa.testing import assert_bitwise, assert_within_ulps

COUNTS = {
    "mixed": [3, 0, 7, 1],
    "last-and-first-empty": [0, 4, 5, 0],
    "one-takes-all": [0, 0, 9, 0],
    "no-rows": [0, 0, 0, 0],
}
SIZES = {"h16-i8": (16, 8), "h6-i5": (6, 5)}  # the second does not suit the grouped kernel: strides


def offsets_of(counts):
    return torch.tensor([0, *counts]).cumsum(0).int()


def plain(rows, weights, gate_up_proj, down_proj, offsets):
    """What the experts compute, in the inputs' precision and with torch's autograd."""
    results = []
    for expert in range(len(offsets) - 1):
        mine = slice(int(offsets[expert]), int(offsets[expert + 1]))
        gate, up = (rows[mine] @ gate_up_proj[expert].T).chunk(2, dim=-1)
        results.append(weights[mine, None] * ((torch.nn.functional.silu(gate) * up) @ down_proj[expert].T))
    return torch.cat(results)


def run(experts, rows, weights, offsets, grad_y):
    rows, weights = rows.clone().requires_grad_(), weights.clone().requires_grad_()
    y = experts(rows, offsets, weights)
    inputs = [rows, weights, experts.gate_up_proj, experts.down_proj]
    return [y.detach(), *torch.autograd.grad(y, inputs, grad_y)]


@pytest.fixture(params=["grouped", "loop"])
def kernel(request, monkeypatch):
    if request.param == "loop":
        monkeypatch.setattr(grouped, "_works", lambda *_: False)
    return request.param


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_values_and_gradients_are_those_of_plain_autograd(sizes, counts, recompute, kernel):
    hidden_size, intermediate_size = sizes
    torch.manual_seed(0)
    experts = SwiGLUExperts(
        num_experts=4,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        recompute=recompute,
        initializer_range=0.5,
    )
    offsets = offsets_of(counts)
    rows, weights = torch.randn(sum(counts), hidden_size), torch.rand(sum(counts))
    grad_y = torch.randn_like(rows)
    got = run(experts, rows, weights, offsets, grad_y)

    inputs = [rows, weights, experts.gate_up_proj, experts.down_proj]
    inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    y = plain(*inputs, offsets)
    want = [y.detach(), *torch.autograd.grad(y, inputs, grad_y.double())]
    for name, a, b in zip(["y", "rows", "weights", "gate_up_proj", "down_proj"], got, want, strict=True):
        if name == "weights":  # one number per row, a sum that may cancel
            torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)
        else:
            assert_within_ulps(a, b.float(), ulps=64, fmt="fp32", what=name)
    for expert, count in enumerate(counts):
        if count == 0:
            assert (got[3][expert] == 0).all()
            assert (got[4][expert] == 0).all()


def test_recomputation_is_bitwise_and_keeps_less():
    torch.manual_seed(1)
    counts = [5, 0, 20, 7]
    rows, weights, offsets = torch.randn(32, 16), torch.rand(32), offsets_of(counts)
    results, kept = [], []
    for recompute in (False, True):
        experts = SwiGLUExperts(num_experts=4, hidden_size=16, intermediate_size=24, recompute=recompute, seed=3)
        parameters = {parameter.data_ptr() for parameter in experts.parameters()}
        kept.append(0)

        def pack(tensor, parameters=parameters):
            if tensor.data_ptr() not in parameters:
                kept[-1] += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results.append(run(experts, rows, weights, offsets, torch.ones(32, 16)))
    for a, b in zip(*results, strict=True):
        assert_bitwise(a, b)
    assert kept[1] == 32 * 16 * 4 + 32 * 4 + 5 * 4  # rows, weights, offsets
    assert kept[0] - kept[1] == 32 * 2 * 24 * 4  # gate and up


def test_grouped_kernel_and_loop_agree_in_bf16(monkeypatch):
    torch.manual_seed(2)
    experts = SwiGLUExperts(num_experts=4, hidden_size=16, intermediate_size=8, initializer_range=0.5)
    rows, weights, offsets = torch.randn(11, 16).bfloat16(), torch.rand(11), offsets_of([3, 0, 7, 1])
    grad_y = torch.randn(11, 16).bfloat16()
    results = [run(experts, rows, weights, offsets, grad_y)]  # fp32 parameters, cast to the rows' dtype
    monkeypatch.setattr(grouped, "_works", lambda *_: False)
    results.append(run(experts, rows, weights, offsets, grad_y))
    assert results[0][0].dtype == results[0][1].dtype == torch.bfloat16
    assert results[0][3].dtype == torch.float32
    for name, a, b in zip(["y", "rows", "weights", "gate_up_proj", "down_proj"], *results, strict=True):
        if name == "weights":
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
        else:
            assert_within_ulps(a, b, ulps=4, fmt="bf16", what=name)


def test_stale_memory_of_a_kernel_does_not_reach_the_gradients(monkeypatch):
    """A kernel that leaves the groups without rows as they were in memory."""

    def careless(left, right, *, offs):
        out = torch.nn.functional.grouped_mm(left, right, offs=offs)
        if out.dim() == 3:
            out[offs.diff(prepend=torch.zeros(1, dtype=torch.int32)) == 0] = float("nan")
        return out

    monkeypatch.setattr(grouped, "_native", lambda: careless)
    experts = SwiGLUExperts(num_experts=4, hidden_size=16, intermediate_size=8)
    offsets = offsets_of([3, 0, 7, 0])
    for grad in run(experts, torch.randn(10, 16), torch.rand(10), offsets, torch.randn(10, 16)):
        assert grad.isfinite().all()


def test_expanded_gradients_and_frozen_parts():
    experts = SwiGLUExperts(num_experts=4, hidden_size=16, intermediate_size=8)
    rows = torch.randn(6, 16)
    experts(rows, offsets_of([1, 2, 3, 0])).sum().backward()  # a gradient of stride 0
    assert experts.gate_up_proj.grad.abs().sum() > 0
    experts.gate_up_proj.requires_grad_(False)
    weights = torch.rand(6, requires_grad=True)
    experts(rows, offsets_of([1, 2, 3, 0]), weights).sum().backward()
    assert weights.grad.shape == (6,)


def test_initial_values_depend_on_the_expert_and_not_on_who_holds_it():
    everything = SwiGLUExperts(num_experts=6, hidden_size=4, intermediate_size=3, seed=7)
    for first in (0, 2, 4):
        part = SwiGLUExperts(
            num_experts=6, num_local_experts=2, first_expert=first, hidden_size=4, intermediate_size=3, seed=7
        )
        assert_bitwise(part.gate_up_proj, everything.gate_up_proj[first : first + 2])
        assert_bitwise(part.down_proj, everything.down_proj[first : first + 2])
    other = SwiGLUExperts(num_experts=6, hidden_size=4, intermediate_size=3, seed=8)
    values = [*everything.gate_up_proj.detach(), *other.gate_up_proj.detach()]
    assert len({value.sum().item() for value in values}) == 12  # no two experts of any layer are alike
    assert abs(everything.gate_up_proj.std().item() / 0.02 - 1) < 0.2


def test_meta_device_then_reset_gives_the_same_values():
    plainly = SwiGLUExperts(num_experts=2, hidden_size=4, intermediate_size=3, seed=7)
    with torch.device("meta"):
        late = SwiGLUExperts(num_experts=2, hidden_size=4, intermediate_size=3, seed=7)
    assert late.gate_up_proj.is_meta
    late.to_empty(device="cpu")
    late.reset_parameters()
    assert_bitwise(late.gate_up_proj, plainly.gate_up_proj)
    assert_bitwise(late.down_proj, plainly.down_proj)


def test_equal_seeds_of_torch_give_equal_layers():
    layers = []
    for _ in range(2):
        torch.manual_seed(5)
        layers.append([SwiGLUExperts(num_experts=2, hidden_size=4, intermediate_size=3) for _ in range(2)])
    assert_bitwise(layers[0][1].down_proj, layers[1][1].down_proj)
    assert not torch.equal(layers[0][0].down_proj, layers[0][1].down_proj)


@pytest.mark.parametrize(
    ("rows", "offsets", "weights", "message"),
    [
        (torch.zeros(2, 5), [0, 1, 2], None, "rows"),
        (torch.zeros(2, 4), [0, 2], None, "offsets must"),
        (torch.zeros(2, 4), [0, 1, 1], None, "offsets end"),
        (torch.zeros(2, 4), [0, 1, 2], torch.zeros(3), "weights"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(rows, offsets, weights, message):
    experts = SwiGLUExperts(num_experts=2, hidden_size=4, intermediate_size=3)
    with pytest.raises(ValueError, match=message):
        experts(rows, torch.tensor(offsets, dtype=torch.int32), weights)


def test_experts_beyond_the_layer_are_refused():
    with pytest.raises(ValueError, match="not among"):
        SwiGLUExperts(num_experts=4, num_local_experts=2, first_expert=3, hidden_size=4, intermediate_size=3)


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_compiled_without_a_break_it_gives_the_same_bits(recompute):
    torch.manual_seed(4)
    experts = SwiGLUExperts(num_experts=4, hidden_size=16, intermediate_size=8, recompute=recompute)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True, dynamic=True)
    for counts in ([3, 0, 7, 1], [0, 4, 0, 1]):
        rows, weights, offsets = torch.randn(sum(counts), 16), torch.rand(sum(counts)), offsets_of(counts)
        grad_y = torch.randn_like(rows)
        for a, b in zip(*(run(f, rows, weights, offsets, grad_y) for f in (experts, compiled)), strict=True):
            assert_bitwise(a, b)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
def test_the_custom_ops_keep_torchs_rules(weighted):
    experts = SwiGLUExperts(num_experts=2, hidden_size=8, intermediate_size=4)
    weights = torch.rand(5, requires_grad=True) if weighted else None
    rows = torch.randn(5, 8, requires_grad=True)
    arguments = (rows, weights, experts.gate_up_proj, experts.down_proj, offsets_of([2, 3]), False)
    torch.library.opcheck(torch.ops.moe_efa.swiglu_experts.default, arguments)
