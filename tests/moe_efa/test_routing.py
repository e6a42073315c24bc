"""Routing rules: the docstrings' vectors, a slow twin written token by token, pinned selections, bad arguments."""

from __future__ import annotations

import doctest
import math

import pytest
import torch

from moe_efa import routing
from moe_efa.testing import assert_bitwise


def test_docstring_examples_hold():
    outcome = doctest.testmod(routing)
    assert outcome.attempted >= 12
    assert outcome.failed == 0


def slow_sigmoid(logits, bias, top_k, n_group, topk_group, norm, scale):
    """One token in Python numbers: sets of experts and their weights."""
    scores = [1 / (1 + math.exp(-value)) for value in logits]
    biased = [score + shift for score, shift in zip(scores, bias, strict=True)]
    size = len(scores) // n_group
    groups = [range(group * size, (group + 1) * size) for group in range(n_group)]
    best = sorted(groups, key=lambda group: -sum(sorted(biased[e] for e in group)[-2:]))[:topk_group]
    chosen = sorted((e for group in best for e in group), key=lambda e: -biased[e])[:top_k]
    total = sum(scores[e] for e in chosen) if norm else 1.0
    return {e: scale * scores[e] / total for e in chosen}


def slow_softmax(logits, top_k, norm, scale):
    exps = [math.exp(value) for value in logits]
    probabilities = [value / sum(exps) for value in exps]
    chosen = sorted(range(len(logits)), key=lambda e: -probabilities[e])[:top_k]
    total = sum(probabilities[e] for e in chosen) if norm else 1.0
    return {e: scale * probabilities[e] / total for e in chosen}


def as_dicts(routed):
    return [
        dict(zip(idx, weights, strict=True))
        for idx, weights in zip(routed.topk_idx.tolist(), routed.topk_weights.tolist(), strict=True)
    ]


@pytest.mark.parametrize("norm", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2), (4, 1), (8, 8), (2, 2)])
def test_sigmoid_selects_what_a_slow_twin_selects(n_group, topk_group, norm):
    torch.manual_seed(1)
    logits, bias = torch.randn(40, 16), 0.3 * torch.randn(16)
    options = {"n_group": n_group, "topk_group": topk_group, "norm_topk_prob": norm, "routed_scaling_factor": 2.5}
    routed = routing.sigmoid_group_topk(logits, 3, e_score_correction_bias=bias, **options)
    expected = [slow_sigmoid(row.tolist(), bias.tolist(), 3, n_group, topk_group, norm, 2.5) for row in logits]
    for got, want in zip(as_dicts(routed), expected, strict=True):
        assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("topk_group", [1, 2])
def test_experts_that_a_bias_takes_out_come_before_those_of_other_groups(topk_group):
    torch.manual_seed(2)
    logits, bias = torch.randn(60, 12), torch.randn(12)
    bias[torch.randperm(12)[:7]] = -torch.inf
    biased = logits.sigmoid() + bias
    groups = biased.view(-1, 3, 4).sort(-1, descending=True).values[..., :2].sum(-1)
    kept = groups.topk(topk_group).indices
    options = {"n_group": 3, "topk_group": topk_group, "e_score_correction_bias": bias}
    chosen = routing.sigmoid_group_topk(logits, 4, **options).topk_idx
    enabled = groups.isfinite().sum(-1) >= topk_group  # otherwise groups are level, too
    assert enabled.any()
    for row, ids in zip(chosen[enabled], kept[enabled], strict=True):
        assert set((row // 4).tolist()) <= set(ids.tolist())
        assert len(set(row.tolist())) == 4


@pytest.mark.parametrize("norm", [True, False], ids=["normalised", "raw"])
def test_softmax_selects_what_a_slow_twin_selects(norm):
    torch.manual_seed(2)
    logits = torch.randn(40, 12)
    routed = routing.softmax_topk(logits, 4, norm_topk_prob=norm, routed_scaling_factor=0.5)
    for got, row in zip(as_dicts(routed), logits, strict=True):
        assert got == pytest.approx(slow_softmax(row.tolist(), 4, norm, 0.5), rel=1e-5)


@pytest.mark.parametrize("rule", [routing.softmax_topk, routing.sigmoid_group_topk])
def test_a_pinned_selection_gives_the_weights_and_gradients_it_had(rule):
    torch.manual_seed(3)
    logits = torch.randn(5, 7, 8, requires_grad=True)
    free = rule(logits, 3)
    pinned = rule(logits, 3, topk_idx=free.topk_idx)
    assert_bitwise(pinned.topk_weights, free.topk_weights)
    factors = torch.randn(5, 7, 3)
    assert_bitwise(*(torch.autograd.grad((r.topk_weights * factors).sum(), logits)[0] for r in (pinned, free)))


@pytest.mark.parametrize("rule", [routing.softmax_topk, routing.sigmoid_group_topk])
def test_pinned_nothing_has_weight_and_gradient_zero(rule):
    logits = torch.randn(3, 8, requires_grad=True)
    topk_idx = torch.tensor([[-1, -1], [2, -1], [4, 5]])
    routed = rule(logits, 2, topk_idx=topk_idx)
    assert (routed.topk_weights[topk_idx < 0] == 0).all()
    torch.testing.assert_close(routed.topk_weights.sum(-1), torch.tensor([0.0, 1.0, 1.0]))
    (grad,) = torch.autograd.grad(routed.topk_weights.square().sum(), logits)
    assert grad.isfinite().all()
    assert (grad[0] == 0).all()


@pytest.mark.parametrize("rule", [routing.softmax_topk, routing.sigmoid_group_topk])
def test_no_tokens_and_all_experts(rule):
    assert rule(torch.zeros(0, 4), 2).topk_idx.shape == (0, 2)
    assert rule(torch.zeros(2, 4), 4).topk_idx.sort().values.tolist() == [[0, 1, 2, 3]] * 2
    assert rule(torch.zeros(2, 1), 1).topk_idx.tolist() == [[0], [0]]


def test_half_precision_logits_are_scored_in_fp32():
    logits = torch.randn(4, 8).bfloat16()
    for rule in (routing.softmax_topk, routing.sigmoid_group_topk):
        assert_bitwise(rule(logits, 2).topk_weights, rule(logits.float(), 2).topk_weights)


@pytest.mark.parametrize(
    ("top_k", "n_group", "topk_group"), [(1, 3, 1), (1, 2, 3), (1, 2, 0), (5, 2, 1), (1, 8, 4), (9, 1, 1)]
)
def test_groups_that_do_not_fit_are_refused(top_k, n_group, topk_group):
    with pytest.raises(ValueError, match="group"):
        routing.sigmoid_group_topk(torch.zeros(1, 8), top_k, n_group=n_group, topk_group=topk_group)


@pytest.mark.parametrize("topk_idx", [torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int32)])
def test_a_pinned_selection_of_another_shape_or_dtype_is_refused(topk_idx):
    with pytest.raises(ValueError, match="pinned"):
        routing.softmax_topk(torch.zeros(2, 4), 2, topk_idx=topk_idx)


def test_balance_loss_is_a_mean_over_sequences():
    torch.manual_seed(4)
    routed = routing.softmax_topk(torch.randn(6, 10, 8), 2)
    each = torch.stack([routing.balance_loss(routed.scores[i], routed.topk_idx[i]) for i in range(6)])
    torch.testing.assert_close(routing.balance_loss(routed.scores, routed.topk_idx), each.mean())


def test_balance_loss_takes_unselected_and_no_tokens():
    scores = torch.full((3, 4), 0.25)
    assert routing.balance_loss(scores, torch.full((3, 2), -1)) == 0
    assert routing.balance_loss(scores[:0], torch.zeros(0, 2, dtype=torch.int64)) == 0


def test_the_bias_evens_out_the_load():
    """Tokens that all prefer expert 0 are spread by repeated corrections."""
    torch.manual_seed(5)
    logits = torch.randn(512, 8) + torch.tensor([2.0, 1.0, 0, 0, 0, 0, 0, -1.0])
    bias = torch.zeros(8)
    loads = []
    for _ in range(400):
        routed = routing.sigmoid_group_topk(logits, 2, e_score_correction_bias=bias)
        loads.append(routing.tokens_per_expert(routed.topk_idx, 8))
        bias = routing.corrected_bias(bias, loads[-1], 2e-3)
    assert loads[0].max() > 3 * 128
    assert loads[-1].max() < 1.1 * 128
    assert loads[-1].min() > 0.9 * 128
