"""Modules of one rank: compiled checkpoints, autocast, copies, casts, failed constructors, what the bias counts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import moe_efa
from moe_efa import group_registry
from moe_efa.nn import Router, SharedExperts, SwiGLUExperts
from moe_efa.testing import assert_bitwise

SIZES = {"num_experts": 4, "hidden_size": 8, "intermediate_size": 16, "top_k": 2, "max_tokens_per_rank": 64}
CONTEXTS = {"plain": {}, "saving-collectives": {"context_fn": moe_efa.checkpoint_context}}


@pytest.fixture
def build():
    layers = []

    def build(**options):
        layers.append(moe_efa.MoELayer(**{**SIZES, "seed": 5, **options}))
        return layers[-1]

    yield build
    for layer in layers:
        layer.close()


def step(layer, call, x):
    x = x.clone().requires_grad_()
    out = call(x)
    out.square().sum().backward()
    grads = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    layer.zero_grad()
    return [out.detach(), *grads]


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_a_checkpoint_compiles_as_one_graph(build, score_function, context):
    layer = build(score_function=score_function, num_shared_experts=1)
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    expected = step(layer, layer, x)
    counted = layer.router._counts.clone()
    recorded = layer.topk_idx, layer.tokens_per_expert
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: checkpoint(layer, x, use_reentrant=False, **context), fullgraph=True, backend="aot_eager"
    )
    for result, value in zip(step(layer, compiled, x), expected, strict=True):
        torch.testing.assert_close(result, value)
    assert layer.topk_idx is recorded[0] and layer.tokens_per_expert is recorded[1]
    assert torch.equal(layer.router._counts, 2 * counted)  # however often the forward ran


def test_a_compiled_layer_without_a_checkpoint_records_as_ever(build):
    layer = build(aux_loss_coef=0.1)
    x = torch.randn(12, 8)
    layer(x)
    recorded, rows, aux_loss = layer.topk_idx, layer.tokens_per_expert, layer.aux_loss
    layer.topk_idx = None
    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(layer.topk_idx, recorded)
    assert torch.equal(layer.tokens_per_expert, rows)
    torch.testing.assert_close(layer.aux_loss, aux_loss)


def test_a_balance_loss_is_not_lost_in_a_compiled_checkpoint_unnoticed(build):
    layer = build(aux_loss_coef=0.1)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="side effect"):
        compiled(torch.randn(12, 8, requires_grad=True))


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_autocast_leaves_the_router_in_its_dtype(score_function):
    router = Router(hidden_size=64, num_experts=16, top_k=4, score_function=score_function, seed=0)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    expected = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        routed = router(x)
    for result, value in zip(routed, expected, strict=True):
        assert_bitwise(result, value)
    router.compute_dtype = None
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(router(x).scores.float(), expected.scores)


def test_experts_follow_autocast_and_return_the_dtype_of_the_rows():
    experts = SwiGLUExperts(num_experts=2, hidden_size=8, intermediate_size=16, initializer_range=0.5, seed=0)
    rows, offsets = torch.randn(6, 8, requires_grad=True), torch.tensor([0, 2, 6], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(rows, offsets)
    y.sum().backward()
    assert y.dtype == rows.grad.dtype == experts.down_proj.grad.dtype == torch.float32
    assert_bitwise(y.detach(), copy.deepcopy(experts).bfloat16()(rows.detach().bfloat16(), offsets).detach().float())


def test_a_layer_under_autocast_keeps_the_dtype_of_x(build):
    layer = build(num_shared_experts=1, shared_expert_gate=True)
    x = torch.randn(12, 8, requires_grad=True)
    plainly = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == torch.float32
    assert not torch.equal(out, plainly)
    torch.testing.assert_close(out, plainly, atol=1e-4, rtol=0.05)


@pytest.mark.parametrize("parameters, inputs", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_all_parts_cast_their_parameters_to_the_input(build, parameters, inputs):
    layer = build(num_shared_experts=1, shared_expert_gate=True, dtype=parameters)
    x = torch.randn(12, 8, dtype=inputs, requires_grad=True)
    out = layer(x)
    out.float().sum().backward()
    assert out.dtype == x.grad.dtype == inputs
    assert all(parameter.grad.dtype == parameters for parameter in layer.parameters())
    casted = copy.deepcopy(layer).to(inputs)
    casted.router = layer.router  # which computes in fp32 with the values that it has
    assert_bitwise(out.detach(), casted(x.detach()).detach())
    casted.close()


def test_shared_experts_of_equal_dtype_run_the_hooks_of_their_linear_layers():
    shared = SharedExperts(hidden_size=8, intermediate_size=4)
    seen = []
    shared.down_proj.register_forward_hook(lambda *_: seen.append(1))
    shared(torch.randn(2, 8))
    assert seen == [1]


def test_copies_share_the_native_group_and_are_closed_by_themselves():
    layer = moe_efa.MoELayer(**SIZES, aux_loss_coef=0.1, num_shared_experts=1)
    x = torch.randn(12, 8)
    out = layer(x)
    assert layer.aux_loss.grad_fn is not None
    average = torch.optim.swa_utils.AveragedModel(layer)
    copied = average.module
    assert copied.aux_loss is None
    assert copied.experts.down_proj is not layer.experts.down_proj
    native = layer.expert_parallel._native
    assert native.references == 2 and copied.expert_parallel._native is native
    average.update_parameters(layer)
    layer.close()
    layer.close()
    assert_bitwise(average(x).detach(), out.detach())
    with pytest.raises(moe_efa.ClosedError):
        layer(x)
    copied.close()
    assert native not in group_registry._live
    copy.deepcopy(copied).close()  # of a closed one: closed


def test_copies_of_a_layer_that_was_passed_its_expert_parallel_share_it():
    sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    with moe_efa.ExpertParallel(None, **sizes) as ep:
        layer = moe_efa.MoELayer(expert_parallel=ep, intermediate_size=4)
        copied = copy.deepcopy(layer)
        assert copied.expert_parallel is ep
        copied.close()
        assert copied(torch.randn(3, 8)).shape == (3, 8)
        assert ep._native.references == 1


def test_pickling_says_what_to_do_instead(build, tmp_path):
    layer = build()
    with pytest.raises(TypeError, match="state_dict"):
        torch.save(layer, tmp_path / "layer.pt")
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(layer.expert_parallel)


@pytest.mark.parametrize(
    "wrong",
    [
        {"score_function": "sofmax"},
        {"n_group": 2},
        {"apply_weights": "late"},
        {"intermediate_size": 0},
        {"expert_alignment": 0},
        {"wire_dtype": "int3"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_failed_constructor_leaves_nothing_open(wrong):
    before = len(group_registry._live)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        moe_efa.MoELayer(**{**SIZES, "max_tokens_per_rank": 63, **wrong})
    assert len(group_registry._live) == before


def test_experts_that_cannot_be_allocated_leave_nothing_open(monkeypatch):
    def no_memory(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(SwiGLUExperts, "reset_parameters", no_memory)
    before = len(group_registry._live)
    with pytest.raises(MemoryError):
        moe_efa.MoELayer(**{**SIZES, "max_tokens_per_rank": 62})
    assert len(group_registry._live) == before


def test_what_the_bias_counts():
    router = Router(hidden_size=8, num_experts=4, top_k=2, score_function="sigmoid")
    x = torch.randn(5, 8)
    loss = router(x).topk_weights.square().sum()
    loss.backward(retain_graph=True)
    assert int(router._counts.sum()) == 10
    loss.backward()  # as documented: every backward through the weights counts
    assert int(router._counts.sum()) == 20
    router.requires_grad_(False)
    router(x)
    assert int(router._counts.sum()) == 20
    router(x.requires_grad_()).topk_weights.sum().backward()
    assert int(router._counts.sum()) == 30


def test_assigned_state_leaves_the_bias_in_fp32():
    router = Router(hidden_size=8, num_experts=4, top_k=2, score_function="sigmoid")
    state = {name: value.bfloat16() for name, value in router.state_dict().items()}
    state["e_score_correction_bias"].fill_(1.5)
    router.load_state_dict(state, assign=True)
    assert router.weight.dtype == torch.bfloat16
    assert_bitwise(router.e_score_correction_bias, torch.full((4,), 1.5))
    assert "e_score_correction_bias" in dict(router.named_buffers())


def test_rows_of_another_size_or_dtype_are_refused_before_anything_is_sent() -> None:
    layer = moe_efa.MoELayer(num_experts=4, hidden_size=8, intermediate_size=4, top_k=2, max_tokens_per_rank=8)
    before = layer.expert_parallel.stats()
    for x in (torch.randn(3, 9), torch.randn(3, 8, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"x must be \[\.\.\., 8\] in bf16 or fp32"):
            layer(x)
    assert layer.expert_parallel.stats()["dispatch"]["calls"] == before["dispatch"]["calls"]
    layer.close()
