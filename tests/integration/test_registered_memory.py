"""What a running group has registered and mapped, against what `moe-efa plan` computes beforehand (I9)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_efa import ExpertParallel, ExpertParallelConfig
from moe_efa.plan import plan_memory
from moe_efa.testing import spawn
from moe_efa.testing.routing import PATTERNS

NUM_RANKS = 4
SHAPE = {"num_experts": 8, "hidden_size": 384, "top_k": 4, "max_tokens_per_rank": 96, "timeout_s": 30.0}
FP8 = {"wire_dtype": "fp8", "combine_dtype": "fp8", "grad_wire_dtype": "bf16"}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "one-node": {"node_size": 4},
    "one-node-fp8": {"node_size": 4, **FP8},
    "two-nodes-shm": {"node_size": 2, "transport": "shm"},
    "two-nodes-shm-4-nics": {"node_size": 2, "transport": "shm", "num_nics": 4},
    "two-nodes-tcp-2-nics-fp8": {"node_size": 2, "transport": "libfabric", "provider": "tcp", "num_nics": 2, **FP8},
    "two-nodes-little": {"node_size": 2, "transport": "shm", "memory_budget_bytes": 2 << 20},
    "two-nodes-chosen": {"node_size": 2, "transport": "shm", "chunk_rows": 16, "slots": 3},
    "four-nodes-bf16": {"node_size": 1, "transport": "shm", "wire_dtype": "bf16", "combine_dtype": "bf16"},
}


def segments() -> dict[str, int]:
    """Bytes of the shared memory that this process created and holds, by role, read from its descriptors."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
            if target.startswith("/dev/shm/moe_efa-"):
                found[target.removesuffix(" (deleted)").rpartition("-")[2]] = os.stat(entry).st_size
        except FileNotFoundError:  # of this very listing
            continue
    return found


def mapped_regions() -> list[int]:
    """Bytes of every mapping of a region in this process: its own, its mates', those of rail peers in shared memory."""
    sizes = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/dev/shm/moe_efa-" in line and "-region" in line:
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            sizes.append(end - begin)
    return sizes


def run_round(ep: ExpertParallel, seed: int) -> None:
    routing = PATTERNS["skewed"](96, 8, 4, seed=seed)
    x = torch.randn(96, SHAPE["hidden_size"]).bfloat16().requires_grad_()  # type: ignore[call-overload]
    received = ep.dispatch(x, routing.topk_idx, routing.topk_weights)
    ep.combine(received.x, received.handle).float().sum().backward()


def look(rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    facts = {}
    for name, changes in CONFIGURATIONS.items():
        with ExpertParallel(group, **{"memory_budget_bytes": 32 << 20, **SHAPE, **changes}) as ep:
            before = segments(), mapped_regions()
            for seed in range(6):
                run_round(ep, seed)
            facts[name] = {"segments": before[0], "maps": before[1], "info": ep.info()}
            assert (segments(), mapped_regions()) == before, "memory grew"
        assert segments() == {}
        assert mapped_regions() == []
    return facts


@pytest.fixture(scope="module")
def facts() -> list[dict[str, Any]]:
    return spawn(look, NUM_RANKS)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_what_is_allocated_is_what_was_planned(name: str, facts: list[dict[str, Any]]) -> None:
    config = ExpertParallelConfig(**{"memory_budget_bytes": 32 << 20, **SHAPE, **CONFIGURATIONS[name]})
    planned = plan_memory(NUM_RANKS, config)
    assert planned.registered_bytes <= config.memory_budget_bytes
    assert sum(planned.parts.values()) == planned.registered_bytes
    page = os.sysconf("SC_PAGESIZE")
    in_pages = -(-planned.registered_bytes // page) * page
    for seen in (rank[name] for rank in facts):
        segments, info = dict(seen["segments"]), seen["info"]
        assert segments.pop("region") == planned.registered_bytes == info["registered_bytes"]
        for field in ("slots", "publish_slots", "chunk_rows"):
            assert info[field] == getattr(planned, field)
        # Besides the region only the inboxes of rails through shared memory, which stand for completion queues.
        shm_rails = (config.num_nics or 1) if config.transport == "shm" else 0
        assert sorted(segments) == [f"inbox{nic}" for nic in range(shm_rails)]
        # Each rail maps the regions of its peers once more.
        peers = shm_rails * (NUM_RANKS // planned.node_size - 1)
        assert seen["maps"] == [in_pages] * (planned.node_size + peers)
