"""The benchmark's routings: seeded, all selections of a token different, and skewed as they say."""

import pytest
import torch

from moe_efa import ConfigError
from moe_efa.bench.routing import ROUTINGS, Imbalance, RoutingConfig, select

SHAPE = {"tokens": 400, "topk": 4, "experts": 32, "num_nodes": 4}


@pytest.mark.parametrize("name", sorted(ROUTINGS))
def test_selections_of_a_token_differ_and_equal_seeds_give_equal_ones(name):
    config = RoutingConfig(name)
    found = select(config, 1, seed=3, **SHAPE)
    assert found.dtype == torch.int64
    assert found.shape == (400, 4)
    assert int(found.min()) >= 0 and int(found.max()) < 32
    ordered = found.sort(1).values
    assert bool((ordered[:, 1:] > ordered[:, :-1]).all())
    assert torch.equal(found, select(config, 1, seed=3, **SHAPE))
    assert not torch.equal(found, select(config, 2, seed=3, **SHAPE))
    assert not torch.equal(found, select(config, 1, seed=4, **SHAPE))


def shares(config):
    return select(config, 0, seed=0, tokens=20_000, topk=1, experts=16, num_nodes=1).flatten().bincount(minlength=16)


def test_first_selections_follow_the_shares():
    assert shares(RoutingConfig("uniform")).max() < 1.2 * 20_000 / 16
    by_size = shares(RoutingConfig("zipf", zipf_exponent=1.0)).sort(descending=True).values.double() / 20_000
    expected = 1 / torch.arange(1, 17, dtype=torch.float64)
    assert torch.allclose(by_size, expected / expected.sum(), atol=0.015)
    logs = shares(RoutingConfig("lognormal", lognormal_sigma=1.0)).double().log()
    assert 0.6 < float(logs.std()) < 1.4


def test_popular_experts_are_the_same_on_all_ranks_and_not_the_first_ones():
    config = RoutingConfig("zipf", zipf_exponent=2.0)
    best = [int(select(config, rank, seed=1, **SHAPE).flatten().bincount(minlength=32).argmax()) for rank in range(3)]
    assert len(set(best)) == 1
    others = {int(select(config, 0, seed=seed, **SHAPE).flatten().bincount(minlength=32).argmax()) for seed in range(8)}
    assert len(others) > 3


@pytest.mark.parametrize(("limit", "expected"), [(None, 2), (1, 1), (3, 3), (9, 4)])
def test_node_limited_tokens_stay_on_so_many_nodes(limit, expected):
    found = select(RoutingConfig("node-limited", topk_nodes=limit), 0, seed=0, **SHAPE)
    nodes = [len(set(row)) for row in (found // 8).tolist()]
    assert max(nodes) == expected


def test_imbalance_is_of_ranks_and_experts():
    everything_to_one = [torch.zeros(5, 1, dtype=torch.int64)] * 2
    assert Imbalance.of(everything_to_one, experts=4) == Imbalance(ranks=2.0, experts=4.0)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"name": "random"}, "unknown"),
        ({"zipf_exponent": -1.0}, "zipf-exponent"),
        ({"lognormal_sigma": float("nan")}, "lognormal-sigma"),
        ({"topk_nodes": 0}, "topk-nodes"),
    ],
)
def test_wrong_parameters_are_refused(arguments, word):
    with pytest.raises(ConfigError, match=word):
        RoutingConfig(**arguments)
