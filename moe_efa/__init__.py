"""Mixture-of-Experts dispatch and combine between hosts joined by AWS EFA, with gradients.

Where the native extension was not built, what needs it is not here; ``moe_efa.triton_kernels`` works as ever.
"""

from importlib.util import find_spec
from typing import Any

from moe_efa._version import __version__
from moe_efa.config import ExpertParallelConfig
from moe_efa.errors import ClosedError, ConfigError, PeerLostError, PeerTimeoutError, TransportError
from moe_efa.handle import DispatchResult, Handle, PendingCombine, PendingDispatch

__all__ = [
    "ClosedError",
    "ConfigError",
    "DispatchResult",
    "ExpertParallel",
    "ExpertParallelConfig",
    "Handle",
    "MoELayer",
    "PeerLostError",
    "PeerTimeoutError",
    "PendingCombine",
    "PendingDispatch",
    "TransportError",
    "__version__",
    "build_info",
    "checkpoint_context",
    "checkpoint_policy",
]

if find_spec("moe_efa._C") is not None:
    from moe_efa import device, libfabric
    from moe_efa.checkpoint import checkpoint_context, checkpoint_policy
    from moe_efa.expert_parallel import ExpertParallel
    from moe_efa.nn import MoELayer

    def build_info() -> dict[str, Any]:
        """What is in this build: package and protocol version, what the native extension was built with, and under
        ``cuda`` whether the library for GPUs is there (`moe-efa doctor` opens it)."""
        return {"version": __version__, **libfabric.build_info(), "cuda": device.CUDA_LIBRARY.exists()}

else:
    _missing = [name for name in __all__ if name not in globals()]
    __all__ = [name for name in __all__ if name not in _missing]

    def __getattr__(name: str) -> Any:
        if name in _missing:
            raise ImportError(f"moe_efa.{name} needs the native extension moe_efa._C, which was not built")
        raise AttributeError(f"module 'moe_efa' has no attribute {name!r}")
