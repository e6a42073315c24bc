"""Ranges for profilers: forward, waves and backward of real calls, heard by a stand-in of the package's domain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moe_efa import ExpertParallel, nvtx


class Listener:
    """What was opened, in order, and how much of it is open. Backward on the CPU runs in the calling thread."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.open = 0

    def get_event_attributes(self, *, message: str) -> str:
        return message

    def push_range(self, attributes: str) -> None:
        self.heard.append(attributes)
        self.open += 1

    def pop_range(self) -> None:
        self.open -= 1


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    listener = Listener()
    monkeypatch.setattr(nvtx, "_domain", lambda: listener)
    nvtx._attributes.cache_clear()
    yield listener
    nvtx._attributes.cache_clear()


@pytest.fixture(scope="module")
def ep() -> Iterator[ExpertParallel]:
    config: dict[str, Any] = {"num_experts": 4, "hidden_size": 64, "top_k": 2, "max_tokens_per_rank": 8}
    with ExpertParallel(None, memory_budget_bytes=16 << 20, **config) as ep:
        yield ep


def run(ep: ExpertParallel, *, waves: int) -> None:
    x = torch.randn(6, 64, requires_grad=True)
    topk_idx = torch.arange(12).reshape(6, 2) % 4
    topk_weights = torch.rand(6, 2, requires_grad=True)
    ep.moe(x, topk_idx, topk_weights, lambda rows, _: rows * 2, waves=waves).sum().backward()


def test_calls_and_their_backward_have_names(ep: ExpertParallel, listener: Listener) -> None:
    run(ep, waves=1)
    assert listener.heard == ["dispatch", "combine", "dispatch of gradients", "combine of gradients"]
    assert listener.open == 0


def test_waves_have_names_and_so_have_their_experts(ep: ExpertParallel, listener: Listener) -> None:
    run(ep, waves=2)
    assert listener.heard.count("experts") == 2
    for name in ("start dispatch", "start combine", "start dispatch of gradients", "start combine of gradients"):
        assert listener.heard.count(name) == 2, name
    assert listener.open == 0


def test_ranges_end_with_an_error(listener: Listener) -> None:
    @nvtx.annotated("call")
    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError), nvtx.annotate("outer"):
        fail()
    assert listener.heard == ["outer", "call"]
    assert listener.open == 0


def test_without_the_package_nothing_is_done(ep: ExpertParallel, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> None:
        raise ImportError

    monkeypatch.setattr(nvtx.importlib, "import_module", absent)
    nvtx._domain.cache_clear()
    try:
        assert nvtx._domain() is None
        run(ep, waves=2)
    finally:
        nvtx._domain.cache_clear()
