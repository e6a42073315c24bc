"""Calls in a CUDA graph: captured once, replayed with other tokens and other routings. Where there is no GPU, a library
plays it and the graph (moe_efa/testing/graphs.py); replays are compared bit by bit with calls on the CPU.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_efa import device as device_of
from moe_efa.testing import device_rounds
from moe_efa.testing.device_ranks import DeviceRanks
from moe_efa.testing.device_rounds import CASES, Case
from moe_efa.testing.spawn import spawn

DEVICE = "cuda" if torch.cuda.is_available() and device_of.CUDA_LIBRARY.exists() else "cpu"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_replays_give_the_bits_of_calls_on_the_cpu(case: Case, ranks: DeviceRanks) -> None:
    found = ranks.spawn(device_rounds.replay, case.num_ranks, case, DEVICE, 6)
    expected = spawn(device_rounds.replay, case.num_ranks, dataclasses.replace(case, buffers="host"), "cpu", 6)
    device_rounds.assert_same(found, expected)
