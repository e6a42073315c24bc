"""All ranks of a group as threads of this process: real native groups, real memory, no processes to start.

For tests that want many small groups quickly. Autograd is not involved: calls are those of the native group.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from moe_efa import _C, rendezvous
from moe_efa.config import ExpertParallelConfig
from moe_efa.native_group import NativeGroup

_T = TypeVar("_T")


class InProcessRanks:
    """The native groups of all ranks; :meth:`run` calls a function on every rank at the same time."""

    def __init__(self, groups: list[NativeGroup], pool: ThreadPoolExecutor) -> None:
        self.groups = groups
        self._pool = pool

    def run(self, fn: Callable[[int, NativeGroup], _T]) -> list[_T]:
        """``fn(rank, group)`` on every rank, each in a thread of its own; results in rank order. Raises the first error
        in rank order, after all have ended."""
        futures = [self._pool.submit(fn, rank, group) for rank, group in enumerate(self.groups)]
        for future in futures:
            future.exception()
        return [future.result() for future in futures]


@contextlib.contextmanager
def in_process_ranks(config: ExpertParallelConfig, num_ranks: int) -> Iterator[InProcessRanks]:
    """Native groups of ``num_ranks`` ranks that are threads; several nodes are joined through shared memory."""
    node_size = config.node_size or num_ranks
    job_key = f"threads-{uuid.uuid4().hex[:12]}"
    agreements = [
        rendezvous.Agreement(
            rank=rank,
            num_ranks=num_ranks,
            node_size=node_size,
            transport="none" if node_size == num_ranks else "shm",
            num_hosts=1,
            ranks_on_host=num_ranks,
            rank_on_host=rank,
            job_key=job_key,
            shared_key=None,
        )
        for rank in range(num_ranks)
    ]
    with ThreadPoolExecutor(num_ranks) as pool:
        natives = [_C.Group(rendezvous.native_config(config, agreement)) for agreement in agreements]
        groups: list[NativeGroup] = []
        try:
            addresses = [native.address() for native in natives]
            for native in natives:
                native.connect(addresses)
            list(pool.map(lambda native: native.meet(lambda: None), natives))
            list(pool.map(lambda native: native.start(), natives))
            groups = [NativeGroup(n, config, a) for n, a in zip(natives, agreements, strict=True)]
            natives = []
            for group in groups:
                group.references = 1
            yield InProcessRanks(groups, pool)
            list(pool.map(lambda group: group.release(), groups))
        finally:
            for group in groups:
                group.close_at_exit(1.0)  # nothing to do after a release
            for native in natives:
                rendezvous.discard(native)
