"""Memory of large results on the CPU: what a dead tensor leaves is used again, so no page is faulted in twice.

Such a tensor's storage cannot be resized. Safe because the memory belongs to the storage: it returns to the pool when
the last view of it is gone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._prims_common import make_contiguous_strides_for

from moe_efa import _C, env

_LEAST_BYTES = 1 << 20  # smaller ones come from torch's allocator, which reuses them anyway
_pool: _C.HostPool | None = None


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor, like ``torch.empty(*shape, dtype=dtype, device="cpu")``."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LEAST_BYTES:
        return torch.empty(*shape, dtype=dtype, device="cpu")
    return over(pool().take(nbytes), *shape, dtype=dtype)


def over(buffer: _C.HostBuffer, *shape: int, dtype: torch.dtype) -> Tensor:
    """The tensor of this shape over memory that is its alone."""
    if math.prod(shape) == 0:
        return torch.empty(*shape, dtype=dtype, device="cpu")
    storage = torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
    # Not a view of another tensor, so it may be changed in place.
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, make_contiguous_strides_for(shape))


def pool() -> _C.HostPool:
    """The pool of this process."""
    global _pool
    if _pool is None:
        _pool = _C.HostPool(max_idle_bytes=env.output_cache_bytes())
    return _pool


def release_idle() -> None:
    """Return the memory that nobody uses to the system."""
    if _pool is not None:
        _pool.trim(0)
