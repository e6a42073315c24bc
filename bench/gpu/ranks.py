"""Rounds of 1, 2, 4 and 8 ranks that share this machine's GPUs, called and replayed by graphs, compared with the same
rounds on the CPU, and what a killed rank does. Nodes are joined by libfabric's tcp provider where there is libfabric,
otherwise by shared memory.

    python bench/gpu/ranks.py [--device cuda] [--buffers auto]

Needs the built package. Exit status 1 where anything differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moe_efa import PeerTimeoutError, build_info
from moe_efa.testing.device_rounds import (
    CASES,
    MANY_RANKS,
    Case,
    assert_same,
    lose_a_rank,
    replay,
    replay_layer,
    run,
)
from moe_efa.testing.spawn import spawn

TIMEOUT_S = 60.0
HEARTBEAT_S = 3.0
NUM_REPLAYS = 100
MOST_LATE = 3


def check(case: Case, device: str) -> None:
    """Raises what is wrong with one case."""
    expected = spawn(run, case.num_ranks, dataclasses.replace(case, buffers="host"), "cpu", timeout=TIMEOUT_S)
    found = spawn(run, case.num_ranks, case, device, timeout=TIMEOUT_S)
    assert_same(found, expected, torch_sums_alike=device == "cpu")


def check_replays(case: Case, device: str) -> None:
    """Raises what is wrong with replays of a graph."""
    expected = spawn(
        replay, case.num_ranks, dataclasses.replace(case, buffers="host"), "cpu", NUM_REPLAYS, timeout=TIMEOUT_S
    )
    found = spawn(replay, case.num_ranks, case, device, NUM_REPLAYS, timeout=TIMEOUT_S)
    assert_same(found, expected, torch_sums_alike=device == "cpu")


def check_layer(case: Case, device: str) -> None:
    """Raises unless a whole layer in a graph gives what the same layer gives when it is called."""
    spawn(replay_layer, case.num_ranks, case, device, NUM_REPLAYS, timeout=TIMEOUT_S)


def check_loss(case: Case, device: str) -> None:
    """Raises unless all others name the rank that was killed."""
    outcomes = spawn(lose_a_rank, case.num_ranks, case, device, HEARTBEAT_S, True, may_die=[1], timeout=TIMEOUT_S)
    for named, after_s in outcomes[:1] + outcomes[2:]:
        assert named == 1, f"named {named} after {after_s:.1f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"), help="cpu: the comparison with itself")
    parser.add_argument("--buffers", default="auto", choices=("auto", "host", "device"), help="on a GPU (default auto)")
    options = parser.parse_args()
    device = options.device
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # otherwise gloo looks the host's name up, which may take long
    cases = [*CASES, *MANY_RANKS]
    if not build_info()["libfabric_found"]:
        cases = [dataclasses.replace(case, transport="shm") for case in cases]
    cases = [dataclasses.replace(case, buffers_on_gpu=options.buffers) for case in cases]
    if device == "cpu":
        cases = [dataclasses.replace(case, buffers="host") for case in cases]
    jobs = [(f"{case.id}: {what.__name__}", what, case) for case in cases for what in (check,)]
    graphs = [(check_replays, cases[0]), (check_replays, cases[3])]
    if device == "cuda":  # a layer's products are in the graph, too
        graphs.append((check_layer, cases[4]))
    jobs += [(f"{case.id}: {what.__name__}", what, case) for what, case in graphs]
    jobs += [(f"{cases[2].id}: {check_loss.__name__}", check_loss, cases[2])]
    same = wrong = late = 0
    for name, job, case in jobs:
        if late == MOST_LATE:
            print(f"after {late} that did not end: the rest is left out", flush=True)
            break
        begin = time.monotonic()
        try:
            job(case, device)
            print(f"same  {time.monotonic() - begin:5.1f} s  {name}", flush=True)
        except Exception as error:
            wrong += 1
            late += isinstance(error, TimeoutError) or isinstance(error.__cause__, PeerTimeoutError)
            why = (str(error).strip() or type(error).__name__).splitlines()
            print(f"WRONG {time.monotonic() - begin:5.1f} s  {name}  {why[-1]}", flush=True)
            print(*(f"        {line}" for line in why[:-1]), sep="\n", flush=True)
        else:
            same += 1
    print(f"{same} of {len(jobs)} as on the CPU")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
