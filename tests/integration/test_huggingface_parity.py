"""MoELayer against the MoE blocks of Hugging Face transformers, with weights copied from them.

Routing is compared bit for bit. With the weights applied at combine, as they do it, the whole block's result on one
rank is equal bit for bit too; between ranks, and with the weights applied earlier, sums are rounded elsewhere.
"""

from __future__ import annotations

import pytest
import torch

import moe_efa
from moe_efa import routing
from moe_efa.testing import assert_bitwise, assert_within_ulps
from moe_efa.testing.spawn import spawn

pytest.importorskip("transformers", reason="compares with Hugging Face transformers (pip install 'moe_efa[test]')")

H, INNER, E, K = 32, 32, 16, 4
T = 24
FAMILIES = ("deepseek-v3", "kimi-k2", "mixtral", "qwen3-moe", "qwen2-moe")


def build(family):
    """(their block with random weights, options that make ours the same layer)."""
    import transformers
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes = {"hidden_size": H, "num_experts_per_tok": K, "experts_implementation": "eager"}
    if family in ("deepseek-v3", "kimi-k2"):  # Kimi-K2 is the same class without groups
        n_group, topk_group, scale = (4, 2, 2.5) if family == "deepseek-v3" else (1, 1, 2.827)
        groups = {"n_group": n_group, "topk_group": topk_group, "routed_scaling_factor": scale}
        config = transformers.DeepseekV3Config(
            **sizes, **groups, n_routed_experts=E, moe_intermediate_size=INNER, n_shared_experts=2, norm_topk_prob=True
        )
        block = DeepseekV3MoE(config)
        options = {**groups, "score_function": "sigmoid", "num_shared_experts": 2}
    elif family == "mixtral":
        block = MixtralSparseMoeBlock(transformers.MixtralConfig(**sizes, num_local_experts=E, intermediate_size=INNER))
        options = {"norm_topk_prob": True, "router_dtype": None}
    elif family == "qwen3-moe":
        config = transformers.Qwen3MoeConfig(**sizes, num_experts=E, moe_intermediate_size=INNER, norm_topk_prob=True)
        block = Qwen3MoeSparseMoeBlock(config)
        options = {"norm_topk_prob": True, "router_dtype": None}
    else:
        config = transformers.Qwen2MoeConfig(
            **sizes,
            num_experts=E,
            moe_intermediate_size=INNER,
            shared_expert_intermediate_size=2 * INNER,
            norm_topk_prob=False,
        )
        block = Qwen2MoeSparseMoeBlock(config)
        options = {
            "norm_topk_prob": False,
            "router_dtype": None,
            "shared_expert_intermediate_size": 2 * INNER,
            "shared_expert_gate": True,
        }
    generator = torch.Generator().manual_seed(len(family))
    for tensor in block.state_dict().values():
        tensor.normal_(0.0, 0.3, generator=generator)
    return block, options


def parameters_of(block):
    """Their parameters by our names; shared gate and up are joined."""
    theirs = dict(block.named_parameters())
    ours = {"router.weight": theirs["gate.weight"]}
    for name in ("gate_up_proj", "down_proj"):
        ours[f"experts.{name}"] = theirs[f"experts.{name}"]
    shared = next((name for name in ("shared_experts", "shared_expert") if hasattr(block, name)), None)
    if shared:
        ours["shared_experts.gate_up_proj.weight"] = (
            theirs[f"{shared}.gate_proj.weight"],
            theirs[f"{shared}.up_proj.weight"],
        )
        ours["shared_experts.down_proj.weight"] = theirs[f"{shared}.down_proj.weight"]
    if "shared_expert_gate.weight" in theirs:
        ours["shared_experts.gate.weight"] = theirs["shared_expert_gate.weight"]
    return ours


def load(layer, block):
    """Copy their weights, of our experts only."""
    first = layer.experts.first_expert
    mine = slice(first, first + layer.experts.num_local_experts)
    ours = parameters_of(block)
    assert ours.keys() == dict(layer.named_parameters()).keys()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            value = torch.cat(ours[name]) if isinstance(ours[name], tuple) else ours[name]
            parameter.copy_(value[mine] if name.startswith("experts") else value)
        if layer.router.e_score_correction_bias is not None:
            layer.router.e_score_correction_bias.copy_(block.gate.e_score_correction_bias)
    return mine


def gradient_of(ours, name):
    grads = [part.grad for part in (ours[name] if isinstance(ours[name], tuple) else (ours[name],))]
    return torch.cat(grads)


def inputs():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, T, H, generator=generator), torch.randn(2, T, H, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_router_selects_the_same_experts_with_the_same_weights(family, dtype):
    block, options = build(family)
    block = block.to(dtype)
    layer = moe_efa.MoELayer(
        num_experts=E,
        hidden_size=H,
        intermediate_size=INNER,
        top_k=K,
        max_tokens_per_rank=2 * T,
        dtype=dtype,
        **options,
    )
    load(layer, block)
    if dtype == torch.bfloat16 and layer.router.e_score_correction_bias is not None:
        assert layer.router.e_score_correction_bias.dtype == torch.float32
    x = inputs()[0].to(dtype).view(-1, H)
    _, weights, idx = block.gate(x)
    routed = layer.router(x)
    assert torch.equal(routed.topk_idx, idx)
    # Qwen rounds its weights to the model's dtype.
    assert_bitwise(routed.topk_weights.to(weights.dtype), weights)
    factors = torch.randn(2 * T, K)
    (want,) = torch.autograd.grad((weights.float() * factors).sum(), block.gate.weight)
    (got,) = torch.autograd.grad((routed.topk_weights * factors).sum(), layer.router.weight)
    assert_within_ulps(got, want, ulps=8, fmt="fp32" if dtype == torch.float32 else "bf16")
    layer.close()


@pytest.fixture
def one_thread():
    """With several, the same product of matrices may be split in another way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("apply_weights", ["at_combine", "before_down_proj"])
@pytest.mark.parametrize("family", FAMILIES)
def test_block_on_one_rank(family, apply_weights):
    block, options = build(family)
    layer = moe_efa.MoELayer(
        num_experts=E,
        hidden_size=H,
        intermediate_size=INNER,
        top_k=K,
        max_tokens_per_rank=2 * T,
        apply_weights=apply_weights,
        **options,
    )
    load(layer, block)
    x, grad = inputs()
    theirs, mine = x.clone().requires_grad_(), x.clone().requires_grad_()
    want, got = block(theirs), layer(mine)
    want.backward(grad)
    got.backward(grad)
    if apply_weights == "at_combine" and layer.shared_experts is None:
        assert_bitwise(got, want)
    assert_within_ulps(got, want, ulps=16, fmt="fp32", what="out")
    assert_within_ulps(mine.grad, theirs.grad, ulps=64, fmt="fp32", what="gradient of x")
    ours = parameters_of(block)
    for name, parameter in layer.named_parameters():
        check_gradient(name, parameter.grad, gradient_of(ours, name))
    layer.close()


def blocks_between_ranks(rank, group):
    for family in FAMILIES:
        block, options = build(family)
        layer = moe_efa.MoELayer(
            group, num_experts=E, hidden_size=H, intermediate_size=INNER, top_k=K, max_tokens_per_rank=T, **options
        )
        local = load(layer, block)
        x, grad = inputs()
        theirs, mine = x.clone().requires_grad_(), x[rank].clone().requires_grad_()
        want, got = block(theirs), layer(mine)  # they see both ranks' tokens
        want.backward(grad)
        got.backward(grad[rank])
        assert_within_ulps(got, want[rank], ulps=16, fmt="fp32", what=f"{family} out")
        assert_within_ulps(mine.grad, theirs.grad[rank], ulps=64, fmt="fp32", what=f"{family} gradient of x")
        ours = parameters_of(block)
        for name, parameter in layer.named_parameters():
            value = gradient_of(ours, name)
            if name.startswith("experts"):
                value = value[local]
            else:
                torch.distributed.all_reduce(parameter.grad, group=group)
            check_gradient(f"{family} {name}", parameter.grad, value)
        layer.close()
    return True


def check_gradient(name, got, want):
    """By the largest value of the whole tensor: a row of the router's gradient may cancel to nearly nothing."""
    assert_within_ulps(got.flatten()[None], want.flatten()[None], ulps=64, fmt="fp32", what=f"gradient of {name}")


def test_blocks_between_two_ranks():
    assert spawn(blocks_between_ranks, 2, timeout=180) == [True, True]


def test_balance_loss_is_theirs():
    """Mixtral's counts each of the K selections as a whole, so that even load gives K there and 1 here."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(50, E, requires_grad=True)
    theirs = load_balancing_loss_func((logits,), E, K) / K
    routed = routing.softmax_topk(logits, K)
    ours = routing.balance_loss(routed.scores, routed.topk_idx)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads)


def test_the_comparison_can_fail():
    """Without the bias or without the groups, other experts are selected."""
    block, options = build("deepseek-v3")
    x = inputs()[0].view(-1, H)
    logits, _, idx = block.gate(x)
    bias = block.gate.e_score_correction_bias
    rule = {name: options[name] for name in ("n_group", "topk_group", "routed_scaling_factor")}
    right = routing.sigmoid_group_topk(logits, K, e_score_correction_bias=bias, **rule)
    without_bias = routing.sigmoid_group_topk(logits, K, **rule)
    without_groups = routing.sigmoid_group_topk(logits, K, e_score_correction_bias=bias)
    assert torch.equal(right.topk_idx, idx)
    assert not torch.equal(without_bias.topk_idx, idx)
    assert not torch.equal(without_groups.topk_idx, idx)
