"""MoELayer between ranks against a dense layer in float64 that holds all experts; recomputation; bias updates."""

from __future__ import annotations

import copy
import doctest

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import moe_efa
from moe_efa import group_registry
from moe_efa.nn import Router, SharedExperts, SwiGLUExperts, moe_layer
from moe_efa.testing import assert_bitwise, assert_within_ulps
from moe_efa.testing.spawn import spawn

E, K, T, R = 8, 3, 10, 4
SIZES = {"num_experts": E, "top_k": K, "max_tokens_per_rank": T, "node_size": 2, "transport": "shm"}
FLOOR = "wire_floor_bytes"
INITIAL = {"initializer_range": 0.3, "seed": 11}
GROUPS = {"score_function": "sigmoid", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
# name: (hidden, intermediate, options of the layer, pinned routing)
CASES = {
    "softmax": (16, 8, {}, None),
    "sigmoid-groups-shared": (16, 8, {**GROUPS, "num_shared_experts": 2}, None),
    "gated-shared": (16, 8, {"shared_expert_intermediate_size": 12, "shared_expert_gate": True}, None),
    "at-combine": (16, 8, {"apply_weights": "at_combine", "norm_topk_prob": False}, None),
    "aligned": (16, 8, {"expert_alignment": 8}, None),
    "odd-sizes": (6, 5, {}, None),
    "recomputed": (16, 8, {"recompute": True}, None),
    "one-expert-takes-all": (16, 8, {"norm_topk_prob": False}, [-1, 5, -1]),
    "nothing-selected": (16, 8, {}, [-1, -1, -1]),
    "duplicates": (16, 8, {}, [2, 2, 7]),
    "auxiliary-loss": (16, 8, {"aux_loss_coef": 0.1}, None),
}
COUNTS = {"even": [T] * R, "uneven": [7, 0, T, 1], "no-tokens": [0] * R}


def dense_layer(hidden, intermediate, options):
    """(parameters by the layer's names, function of (x, topk_idx) that gives out in float64 and the auxiliary loss)."""
    common = {"hidden_size": hidden, **INITIAL}
    of_router = {"norm_topk_prob", "aux_loss_coef", *GROUPS} & options.keys()
    router = Router(num_experts=E, top_k=K, **common, **{name: options[name] for name in of_router})
    parts = {"router": router}
    experts = parts["experts"] = SwiGLUExperts(num_experts=E, intermediate_size=intermediate, **common).double()
    shared = options.get("shared_expert_intermediate_size", options.get("num_shared_experts", 0) * intermediate)
    if shared:
        gated = options.get("shared_expert_gate", False)
        parts["shared_experts"] = SharedExperts(intermediate_size=shared, gated=gated, **common).double()

    def forward(x, topk_idx):
        topk_idx, weights, _ = router(x, topk_idx)
        x = x.double()
        out = parts["shared_experts"](x) if shared else torch.zeros_like(x)
        for expert in range(E):
            gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            y = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert].T
            out = out + (weights.double() * (topk_idx == expert)).sum(-1, keepdim=True) * y
        return out, 0.0 if router.aux_loss is None else router.aux_loss

    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.named_parameters()}, forward


def compare_with_dense(rank, group, counts):
    for name, (hidden, intermediate, options, pinned) in CASES.items():
        generator = torch.Generator().manual_seed(1)
        xs = [torch.randn(count, hidden, generator=generator).requires_grad_() for count in counts]
        grads = [torch.randn(count, hidden, generator=generator) for count in counts]
        routes = [None if pinned is None else torch.tensor(pinned).repeat(count, 1) for count in counts]

        parameters, forward = dense_layer(hidden, intermediate, options)
        results = [forward(x, route) for x, route in zip(xs, routes, strict=True)]
        loss = sum((out * grad).sum() + aux for (out, aux), grad in zip(results, grads, strict=True))
        loss.backward()

        layer = moe_efa.MoELayer(
            group, hidden_size=hidden, intermediate_size=intermediate, **SIZES, **INITIAL, **options
        )
        x = xs[rank].detach().clone().requires_grad_()
        out = layer(x, routes[rank])
        loss = (out * grads[rank]).sum()
        (loss if layer.aux_loss is None else loss + layer.aux_loss).backward()

        check(f"{name}: out", out, results[rank][0])
        check(f"{name}: gradient of x", x.grad, xs[rank].grad)
        mine = slice(rank * E // R, (rank + 1) * E // R)
        selections = layer.selections_per_expert()
        dist.all_reduce(selections, group=group)
        assert torch.equal(layer.tokens_per_expert, selections[mine]), name
        assert [key for key, _ in layer.named_parameters()] == list(parameters), name
        for key, parameter in layer.named_parameters():
            want = torch.zeros_like(parameters[key]) if parameters[key].grad is None else parameters[key].grad
            got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if key.startswith("experts"):
                assert parameter.grad is not None, f"{name}: {key}"
                want = want[mine]
                assert (got[layer.tokens_per_expert == 0] == 0).all(), name
            else:
                dist.all_reduce(got, group=group)
            check(f"{name}: gradient of {key}", got.flatten()[None], want.flatten()[None])
        layer.close()
    return len(CASES)


def check(what, got, want):
    assert_within_ulps(got.detach(), want.detach().float(), ulps=64, fmt="fp32", what=what)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_values_and_gradients_are_those_of_a_dense_layer(counts):
    assert spawn(compare_with_dense, R, counts, timeout=180) == [len(CASES)] * R


def run_once(layer, x, grad, call):
    """(out, gradients, bytes kept for backward that are not parameters, what the exchange counted)."""
    x = x.clone().requires_grad_()
    parameters = {parameter.data_ptr() for parameter in layer.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    before = counters(layer)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call(layer, x)
    out.backward(grad)
    grads = [x.grad, *(parameter.grad.clone() for parameter in layer.parameters())]
    layer.zero_grad()
    after = counters(layer)
    return [out.detach(), *grads], sum(kept.values()), {name: after[name] - before[name] for name in after}


def counters(layer):
    """Calls and bytes that do not depend on timing, as the number of writes and credits does."""
    stats = layer.expert_parallel.stats()
    phases = {f"{phase} {name}": stats[phase][name] for phase in ("dispatch", "combine") for name in ("calls", FLOOR)}
    return {"rounds": stats["rounds"], **phases}


def train_with_capacity(rank, group, capacity, apply_weights):
    """Results and gradients of a layer, [overflow], and how many rows its experts got."""
    torch.manual_seed(rank)
    x, grad = torch.randn(T, 16), torch.randn(T, 16)
    layer = moe_efa.MoELayer(
        group,
        hidden_size=16,
        intermediate_size=32,
        capacity=capacity,
        apply_weights=apply_weights,
        expert_alignment=4,
        **SIZES,
        **INITIAL,
    )
    values, _, _ = run_once(layer, x, grad, lambda layer, x: layer(x))
    overflow = None if layer.overflow is None else int(layer.overflow)
    rows = int(layer.tokens_per_expert.sum())
    layer.close()
    return values, overflow, rows


@pytest.mark.parametrize("apply_weights", ["before_down_proj", "at_combine"])
def test_a_capacity_that_is_enough_changes_no_bit(apply_weights):
    exact = spawn(train_with_capacity, 2, None, apply_weights)
    static = spawn(train_with_capacity, 2, 2 * T * SIZES["top_k"] + 32, apply_weights)
    for (values, overflow, rows), (expected, none, expected_rows) in zip(static, exact, strict=True):
        assert (overflow, none, rows) == (0, None, expected_rows)
        for value, other in zip(values, expected, strict=True):
            assert_bitwise(value, other)


def test_what_a_layer_lacked_shows_in_its_overflow():
    lacking = spawn(train_with_capacity, 2, 8, "before_down_proj")
    assert all(rows <= 8 for _, _, rows in lacking)
    needed = max(overflow for _, overflow, _ in lacking)
    assert needed > 8
    assert all(overflow == 0 for _, overflow, _ in spawn(train_with_capacity, 2, needed, "before_down_proj"))


def recompute_without_communication(rank, group):
    torch.manual_seed(rank)
    x, grad = torch.randn(T, 16), torch.randn(T, 16)
    results, kept, counted = [], [], []
    for recompute in (False, True):
        layer = moe_efa.MoELayer(
            group,
            hidden_size=16,
            intermediate_size=32,
            recompute=recompute,
            **SIZES,
            **INITIAL,
            score_function="sigmoid",
        )
        values, size, counts = run_once(layer, x, grad, lambda layer, x: layer(x))
        results.append(values)
        kept.append(size)
        counted.append(counts)
        rows = int(layer.tokens_per_expert.sum())
        layer.close()
    for a, b in zip(*results, strict=True):
        assert_bitwise(a, b)
    assert counted[0] == counted[1]
    assert counted[0] == {**counted[0], "rounds": 2, "dispatch calls": 2, "combine calls": 2}  # forward and backward
    assert counted[0][f"dispatch {FLOOR}"] > 0
    return kept, rows


def test_own_recomputation_is_bitwise_keeps_less_and_sends_nothing():
    for (saved, recomputed), rows in spawn(recompute_without_communication, R):
        assert rows > 0
        assert saved - recomputed == rows * 2 * 32 * 4  # gate and up


def accumulate_and_update(rank, group):
    """Four micro-batches, one of them recomputed by torch's checkpointing, one only evaluated."""
    torch.manual_seed(rank)
    layer = moe_efa.MoELayer(
        group, hidden_size=16, intermediate_size=8, **SIZES, **INITIAL, score_function="sigmoid", num_shared_experts=1
    )
    selections = torch.zeros(E, dtype=torch.int64)
    for number in range(3):
        x = torch.randn(T - rank, 16, requires_grad=True)
        out = checkpoint(layer, x, use_reentrant=number == 2) if number else layer(x)
        selections += layer.selections_per_expert()
        out.sum().backward()
    with torch.no_grad():
        layer(torch.randn(3, 16))
    layer(torch.randn(3, 16))  # without a backward
    dist.all_reduce(selections, group=group)
    layer.update_bias(0.25, group)
    layer.update_bias(0.25, group)  # nothing has been counted since
    with pytest.raises(ValueError, match="needs the group"):
        layer.update_bias(0.25)
    layer.close()
    expected = 0.25 * (selections.double().mean() - selections.double()).sign().float()
    return layer.router.e_score_correction_bias, expected


def test_bias_updates_count_each_backward_of_all_ranks_once():
    biases = spawn(accumulate_and_update, R)
    for bias, expected in biases:
        assert_bitwise(bias, expected)
        assert expected.unique().numel() > 1


def test_casts_spare_the_bias():
    layer = moe_efa.MoELayer(
        num_experts=4, hidden_size=8, intermediate_size=8, top_k=2, max_tokens_per_rank=8, score_function="sigmoid"
    )
    layer.router.e_score_correction_bias.fill_(1.001)
    layer.bfloat16()
    assert layer.router.weight.dtype == layer.experts.down_proj.dtype == torch.bfloat16
    assert_bitwise(layer.router.e_score_correction_bias, torch.full((4,), 1.001))
    assert "router.e_score_correction_bias" in layer.state_dict()
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    out = layer(x)
    out.float().sum().backward()
    assert out.dtype == x.grad.dtype == torch.bfloat16
    layer.close()


def test_a_recorded_selection_replays_to_the_same_bits():
    torch.manual_seed(0)
    layer = moe_efa.MoELayer(num_experts=4, hidden_size=8, intermediate_size=8, top_k=2, max_tokens_per_rank=24)
    x = torch.randn(2, 12, 8)
    out = layer(x)
    recorded = layer.topk_idx
    assert recorded.shape == (2, 12, 2)
    assert_bitwise(layer(x, recorded), out)
    _, weights, _ = layer.router(x)
    assert_bitwise(layer(x, recorded, weights), out)
    assert not torch.equal(layer(x, recorded.roll(1, dims=1)), out)
    layer.close()


def test_arguments_that_do_not_fit_are_refused():
    sizes = {"num_experts": 4, "hidden_size": 8, "top_k": 2, "max_tokens_per_rank": 8}
    with moe_efa.ExpertParallel(None, **sizes) as ep:
        for options, message in [
            ({"intermediate_size": 4}, "num_experts, hidden_size, top_k, max_tokens_per_rank must be given"),
            ({"intermediate_size": 4, "expert_parallel": ep, "hidden_size": 9}, "hidden_size=9 differs"),
            ({"intermediate_size": 4, "expert_parallel": ep, "wire_dtype": "fp32"}, "has its own wire_dtype"),
            ({"intermediate_size": 4, "apply_weights": "late", **sizes}, "apply_weights"),
            ({"intermediate_size": 4, "score_function": "relu", **sizes}, "score_function"),
            ({"intermediate_size": 4, "n_group": 2, **sizes}, "sigmoid"),
            ({"intermediate_size": 4, "wire_dtype": "int3", **sizes}, "wire_dtype"),
            ({"intermediate_size": 4, "capacity": -1, **sizes}, "capacity"),
            ({"intermediate_size": 4, "capacity": 8, "waves": 2, **sizes}, "waves=2 with a capacity"),
        ]:
            with pytest.raises(ValueError, match=message):
                moe_efa.MoELayer(**options)
        layer = moe_efa.MoELayer(expert_parallel=ep, intermediate_size=4)
        x = torch.randn(3, 8)
        with pytest.raises(ValueError, match="need topk_idx"):
            layer(x, topk_weights=torch.ones(3, 2))
        with pytest.raises(ValueError, match="pinned"):
            layer(x, torch.zeros(3, 1, dtype=torch.int64))
        with pytest.raises(ValueError, match="no bias"):
            layer.update_bias()
        bounded = moe_efa.MoELayer(expert_parallel=ep, intermediate_size=4, capacity=8)
        bounded.waves = 2
        with pytest.raises(ValueError, match="waves=2 with a capacity"):
            bounded(x)
        layer.close()
        assert layer(x).shape == (3, 8)  # a corrected call works, and what was passed in stays open


def one_rank_is_wrong(rank, group):
    options = {**SIZES, "node_size": 1, "hidden_size": 8, "intermediate_size": 4}
    wrong = {"score_function": "sofmax"} if rank == 1 else {}
    before = len(group_registry._live)
    with pytest.raises(ValueError, match="score_function") as raised:
        moe_efa.MoELayer(group, **options, **wrong)
    assert len(group_registry._live) == before
    with pytest.raises(ValueError, match="device must be"):
        moe_efa.MoELayer(group, **options, device="gpu" if rank == 1 else "cpu")
    layer = moe_efa.MoELayer(group, **options)  # the group is as good as before
    out = layer(torch.randn(rank, 8))
    copied = copy.deepcopy(layer)
    layer.close()
    assert copied(torch.randn(rank, 8)).shape == out.shape == (rank, 8)
    copied.close()
    assert len(group_registry._live) == before
    return type(raised.value).__name__


def test_arguments_wrong_on_one_rank_are_refused_on_all():
    assert set(spawn(one_rank_is_wrong, 2, timeout=60)) == {"ConfigError"}


def test_docstring_example_holds():
    outcome = doctest.testmod(moe_layer, extraglobs={"torch": torch})
    assert (outcome.attempted, outcome.failed) == (3, 0)


def test_built_on_the_meta_device():
    sizes = {"num_experts": 4, "hidden_size": 8, "top_k": 2, "max_tokens_per_rank": 8, "intermediate_size": 4}
    options = {"score_function": "sigmoid", "num_shared_experts": 1, "seed": 3}
    plainly = moe_efa.MoELayer(**sizes, **options)
    with torch.device("meta"):
        late = moe_efa.MoELayer(**sizes, **options)
    late.to_empty(device="cpu")
    late.reset_parameters()
    for (name, value), (_, other) in zip(plainly.state_dict().items(), late.state_dict().items(), strict=True):
        assert_bitwise(other, value, name)
    x = torch.randn(5, 8)
    assert_bitwise(late(x), plainly(x))
    late.close()
    plainly.close()
