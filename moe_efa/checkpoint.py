"""Activation checkpointing that never communicates again: recomputation takes what the collectives gave the first time.

Under plain torch.utils.checkpoint results are the same bits, but recomputation repeats the round on the wire.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

from moe_efa import ops


def checkpoint_context() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """``context_fn`` of torch.utils.checkpoint: results of dispatch and combine are saved, the rest is recomputed.

    ``checkpoint(layer, x, use_reentrant=False, context_fn=moe_efa.checkpoint_context)``; with torch.compile as well.
    """
    return create_selective_checkpoint_contexts(checkpoint_policy)  # type: ignore[no-untyped-call]


def checkpoint_policy(ctx: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What :func:`checkpoint_context` does with the results of an operator, for policies of your own::

        def policy(ctx, op, *args, **kwargs):
            if op is torch.ops.aten.mm.default:
                return CheckpointPolicy.MUST_SAVE
            return moe_efa.checkpoint_policy(ctx, op, *args, **kwargs)

        context_fn = functools.partial(create_selective_checkpoint_contexts, policy)

    Returns:
        MUST_SAVE for the collectives, and PREFER_RECOMPUTE for everything else.
    """
    return CheckpointPolicy.MUST_SAVE if op in ops.COLLECTIVES else CheckpointPolicy.PREFER_RECOMPUTE
