"""Configurations that cannot work are refused with a text that says what would."""

import dataclasses
import inspect

import pytest
import torch

import moe_efa
from moe_efa import ConfigError, ExpertParallel, ExpertParallelConfig

VALID = {"num_experts": 8, "hidden_size": 64, "top_k": 2, "max_tokens_per_rank": 16}


def make(**changes):
    return ExpertParallelConfig(**{**VALID, **changes})


def test_a_valid_configuration_is_frozen_comparable_and_hashable():
    config = make()
    assert config == make()
    assert hash(config) == hash(make())
    assert config != make(top_k=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 3
    assert config.as_dict()["memory_budget_bytes"] == 1 << 30


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, not 0"),
        ({"hidden_size": -1}, "hidden_size must be at least 1"),
        ({"hidden_size": 64.0}, "hidden_size must be an integer, not 64.0"),
        ({"top_k": True}, "top_k must be an integer"),
        ({"top_k": 9}, "top_k=9 is more than num_experts=8"),
        ({"num_experts": 128, "top_k": 65}, "top_k=65 is more than the 64"),
        ({"max_tokens_per_rank": 0}, "max_tokens_per_rank must be at least 1"),
        ({"memory_budget_bytes": 0}, "memory_budget_bytes must be at least 1"),
        ({"node_size": 0}, "node_size must be at least 1"),
        ({"timeout_s": 0.0}, "timeout_s must be a positive, finite number"),
        ({"timeout_s": float("inf")}, "timeout_s must be a positive, finite number"),
        ({"heartbeat_timeout_s": "20"}, "heartbeat_timeout_s must be a positive, finite number"),
        ({"wire_dtype": "fp16"}, "wire_dtype='fp16' is unknown; use one of auto, bf16, fp32, fp8"),
        ({"combine_dtype": "e4m3"}, "combine_dtype='e4m3' is unknown; use one of auto, bf16, fp32, fp8"),
        ({"grad_wire_dtype": None}, "grad_wire_dtype=None is unknown; use one of auto, bf16, fp32, fp8"),
        ({"fp8_scale": "e8m0"}, "fp8_scale='e8m0' is unknown; use one of fp32, ue8m0"),
        ({"transport": "tcp"}, "transport='tcp' is unknown; use one of auto, shm, libfabric"),
        ({"provider": ""}, "provider must be the name of a libfabric provider"),
        ({"chunk_rows": -1}, "chunk_rows must be at least 0"),
        ({"slots": 1.5}, "slots must be an integer"),
    ],
)
def test_values_that_cannot_work(changes, text):
    with pytest.raises(ConfigError) as error:
        make(**changes)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("wire", "combine", "grad", "expected"),
    [
        ("auto", "auto", "auto", ("auto", "auto")),
        ("bf16", "fp32", "auto", ("bf16", "fp32")),  # as the values
        ("fp8", "fp8", "auto", ("auto", "auto")),  # their own dtype: nothing makes a gradient FP8 by itself
        ("fp8", "bf16", "auto", ("auto", "bf16")),
        ("bf16", "fp8", "auto", ("bf16", "auto")),
        ("fp8", "fp8", "bf16", ("bf16", "bf16")),
        ("fp8", "fp8", "fp8", ("fp8", "fp8")),
        ("bf16", "fp32", "fp8", ("fp8", "fp32")),  # a combine that is not FP8 forward is not FP8 backward
        ("auto", "auto", "fp32", ("fp32", "auto")),
    ],
)
def test_what_gradients_travel_in(wire, combine, grad, expected):
    config = make(wire_dtype=wire, combine_dtype=combine, grad_wire_dtype=grad)
    assert (config.grad_dispatch_dtype, config.grad_combine_dtype) == expected


def test_experts_must_divide_among_the_ranks():
    make().check_num_ranks(4)
    with pytest.raises(ConfigError, match="num_experts=8 is not a multiple of the group's 3 ranks"):
        make().check_num_ranks(3)
    with pytest.raises(ConfigError, match="node_size=3 does not divide the group's 4 ranks"):
        make(node_size=3).check_num_ranks(4)


@pytest.mark.parametrize(
    ("hosts", "given", "expected"),
    [("a", None, 1), ("aaaa", None, 4), ("aabb", None, 2), ("abcd", None, 1), ("aaaa", 2, 2), ("aaaabb", 2, 2)],
)
def test_node_size_is_found_from_the_hosts(hosts, given, expected):
    assert make(num_experts=24, node_size=given).resolve_node_size(hosts) == expected


@pytest.mark.parametrize(
    ("hosts", "given", "text"),
    [
        ("aaaabb", None, "unequal numbers of ranks of the group ([4, 2]); pass node_size: node_size=2 would do"),
        ("abab", None, "not consecutive in the group"),
        ("abab", None, "node_size=1 would do"),
        ("aabbaa", None, "node_size=2 would do"),
        ("aabb", 4, "node_size=4 would put ranks of different hosts in a node; node_size=2 would do"),
        ("aaabbb", 2, "node_size=2 would put ranks of different hosts in a node; node_size=3 would do"),
    ],
)
def test_hosts_that_do_not_fit_say_which_node_size_would_do(hosts, given, text):
    with pytest.raises(ConfigError) as error:
        make(num_experts=24, node_size=given).resolve_node_size(hosts)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("transport", "num_nodes", "expected"),
    [
        ("auto", 1, "none"),
        ("libfabric", 1, "none"),
        ("auto", 2, "libfabric"),
        ("libfabric", 2, "libfabric"),
        ("shm", 2, "shm"),
    ],
)
def test_transport_joins_nodes(transport, num_nodes, expected):
    assert make(transport=transport).resolve_transport(num_nodes=num_nodes, num_hosts=1) == expected


def test_shared_memory_does_not_join_hosts():
    with pytest.raises(ConfigError, match="transport='shm' cannot join 2 hosts"):
        make(transport="shm").resolve_transport(num_nodes=2, num_hosts=2)


def test_expert_parallel_mirrors_the_configuration():
    parameters = inspect.signature(ExpertParallel).parameters
    fields = {field.name: field.default for field in dataclasses.fields(ExpertParallelConfig)}
    assert list(parameters) == ["group", *fields]
    for name, default in fields.items():
        expected = inspect.Parameter.empty if default is dataclasses.MISSING else default
        if name == "device":
            expected = None  # what this machine has, as a word of the configuration
        assert parameters[name].default == expected, name
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize(
    "field", ["num_experts", "hidden_size", "max_tokens_per_rank", "memory_budget_bytes", "chunk_rows", "slots"]
)
def test_numbers_beyond_any_machine_are_config_errors(field: str) -> None:
    numbers = {"num_experts": 4, "hidden_size": 8, "top_k": 1, "max_tokens_per_rank": 4, field: 2**70}
    with pytest.raises(ConfigError, match=field):
        ExpertParallelConfig(**numbers)


def test_alignment_that_no_offset_can_hold_is_refused_before_anything_is_sent() -> None:
    with moe_efa.ExpertParallel(None, num_experts=4, hidden_size=8, top_k=1, max_tokens_per_rank=4) as ep:
        x, idx, weights = torch.ones(2, 8), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
        for alignment in (2**31, 2**33):
            with pytest.raises(ValueError, match="expert_alignment"):
                ep.dispatch(x, idx, weights, expert_alignment=alignment)
        assert ep.dispatch(x, idx, weights, expert_alignment=16).offsets.tolist() == [0, 16, 16, 16, 16]


def test_interrupt_between_the_halves_of_a_dispatch_fails_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with moe_efa.ExpertParallel(None, num_experts=4, hidden_size=8, top_k=1, max_tokens_per_rank=4) as ep:
        arguments = torch.ones(2, 8), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("moe_efa.native_group.torch.empty", interrupted)
            ep.dispatch(*arguments)
        for _ in range(2):
            with pytest.raises(moe_efa.TransportError, match="KeyboardInterrupt"):
                ep.dispatch(*arguments)
