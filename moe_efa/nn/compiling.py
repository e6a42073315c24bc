"""Whether forward may set attributes: torch.compile refuses that in a checkpoint inside the compiled function."""

from __future__ import annotations

import torch


def may_store() -> bool:
    """False only while Dynamo traces the body of a checkpoint or another operator that takes functions."""
    return not torch.compiler.is_dynamo_compiling() or _traces_outermost()


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]  # runs while Dynamo traces, and not in the graph
def _traces_outermost() -> bool:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    tracer = InstructionTranslator.current_tx().output.current_tracer
    return getattr(tracer, "parent", None) is None
