"""Memory of results: used again when the last tensor of it is gone, and never before."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import moe_efa
from moe_efa import ConfigError, env, host_memory

ROWS, HIDDEN = 600, 1024  # 1.2 MB in bf16: more than the least that is pooled


@pytest.fixture(autouse=True)
def fresh_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(host_memory, "_pool", None)
    yield
    host_memory.release_idle()


def test_memory_of_a_dead_tensor_is_used_again() -> None:
    first = host_memory.empty(ROWS, HIDDEN, dtype=torch.bfloat16)
    address = first.data_ptr()
    del first
    assert host_memory.pool().idle_bytes > 0
    second = host_memory.empty(ROWS - 5, HIDDEN, dtype=torch.bfloat16)
    assert second.data_ptr() == address
    assert second.is_contiguous()
    assert host_memory.pool().idle_bytes == 0


@pytest.mark.parametrize("keep", [lambda t: t[3:], lambda t: t.view(-1), lambda t: t.numpy(), lambda t: t.detach()])
def test_memory_with_a_living_view_is_not(keep: object) -> None:
    first = host_memory.empty(ROWS, HIDDEN, dtype=torch.float32)
    first.fill_(7.0)
    view = keep(first)  # type: ignore[operator]
    del first
    assert host_memory.pool().idle_bytes == 0
    host_memory.empty(ROWS, HIDDEN, dtype=torch.float32).fill_(1.0)
    assert (torch.as_tensor(view) == 7.0).all()


def test_two_living_tensors_have_memory_of_their_own() -> None:
    tensors = [host_memory.empty(ROWS, HIDDEN, dtype=torch.float32).fill_(i) for i in range(4)]
    assert [float(t.sum()) for t in tensors] == [float(i * ROWS * HIDDEN) for i in range(4)]


def test_idle_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_EFA_OUTPUT_CACHE_BYTES", str(5 << 20))
    tensors = [host_memory.empty(ROWS, HIDDEN, dtype=torch.bfloat16) for _ in range(8)]
    del tensors
    assert 0 < host_memory.pool().idle_bytes <= 5 << 20
    host_memory.release_idle()
    assert host_memory.pool().idle_bytes == 0


def test_one_block_beyond_the_bound_pushes_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_EFA_OUTPUT_CACHE_BYTES", str(8 << 20))
    small = host_memory.empty(ROWS, HIDDEN, dtype=torch.bfloat16)
    address = small.data_ptr()
    del small
    host_memory.empty(16 * ROWS, HIDDEN, dtype=torch.bfloat16)  # dies at once
    assert host_memory.empty(ROWS, HIDDEN, dtype=torch.bfloat16).data_ptr() == address


def test_what_was_used_last_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_EFA_OUTPUT_CACHE_BYTES", str(8 << 20))
    large = host_memory.empty(4 * ROWS, HIDDEN, dtype=torch.bfloat16)  # 5 MB
    small = [host_memory.empty(ROWS, HIDDEN, dtype=torch.bfloat16) for _ in range(4)]
    addresses = {tensor.data_ptr() for tensor in small}
    del large, small
    assert {host_memory.empty(ROWS, HIDDEN, dtype=torch.bfloat16).data_ptr()} <= addresses
    assert host_memory.pool().idle_bytes == 8 << 20


def test_results_may_be_changed_in_place_and_differentiated() -> None:
    with moe_efa.ExpertParallel(None, num_experts=4, hidden_size=HIDDEN, top_k=2, max_tokens_per_rank=ROWS) as ep:
        x = torch.randn(ROWS, HIDDEN, requires_grad=True)
        weights, idx = torch.rand(ROWS, 4).topk(2)
        d = ep.dispatch(x, idx, weights)
        rows = d.x.mul_(2.0)
        ep.combine(rows, d.handle).sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, 2 * weights.sum(1, keepdim=True).expand_as(x))


def test_small_tensors_do_not_come_from_the_pool() -> None:
    assert host_memory.empty(0, HIDDEN, dtype=torch.float32).shape == (0, HIDDEN)
    host_memory.empty(3, HIDDEN, dtype=torch.float32)
    assert host_memory.pool().idle_bytes == 0


def test_a_child_of_fork_leaves_the_pool_alone() -> None:
    tensor = host_memory.empty(ROWS, HIDDEN, dtype=torch.float32)
    pid = os.fork()
    if pid == 0:
        del tensor
        os._exit(0 if host_memory.pool().idle_bytes == 0 else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_wrong_limit_is_an_error_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_EFA_OUTPUT_CACHE_BYTES", "much")
    with pytest.raises(ConfigError, match="MOE_EFA_OUTPUT_CACHE_BYTES='much'"):
        env.output_cache_bytes()
    with pytest.raises(ConfigError, match="MOE_EFA_OUTPUT_CACHE_BYTES"):
        moe_efa.ExpertParallel(None, num_experts=4, hidden_size=8, top_k=2, max_tokens_per_rank=4)
