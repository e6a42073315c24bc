"""A plan as a tensor, so that it can cross the borders of torch operators and be saved for backward like any other.

The tensor holds the plan's number; its storage keeps the plan, exactly as long as a tensor of that storage is alive. A
copy finds the plan by the number, while the original lives, or somebody keeps the owner.
"""

from __future__ import annotations

import ctypes
import itertools
import secrets
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moe_efa import _C

# Read as float64, a number below 2^52 is subnormal: to torch.testing and torch.library.opcheck, which compare what two
# calls of an operator return, all plans are 0.0. The upper bits differ between processes, for tensors that travel.
DTYPE = torch.float64
_COUNTER_BITS = 36
_numbers = itertools.count((secrets.randbits(52 - _COUNTER_BITS) << _COUNTER_BITS) + 1)


class _Owner(ctypes.c_int64):
    """The memory of a plan tensor. Torch's storage refers to it, and it refers to the plan."""

    plan: _C.Plan
    group: str


_owners: weakref.WeakValueDictionary[int, _Owner] = weakref.WeakValueDictionary()


def wrap(plan: _C.Plan, group: str) -> Tensor:
    """The tensor [1] of a plan that belongs to the native group of this name."""
    number = next(_numbers)
    owner = _Owner(number)
    owner.plan, owner.group = plan, group
    _owners[number] = owner
    return torch.frombuffer(owner, dtype=DTYPE)


def unwrap(tensor: Tensor, group: str) -> _C.Plan:
    """The plan of a tensor that :func:`wrap` made for this group, or of a copy of it.

    Raises:
        ValueError: if the tensor is no plan, its plan is gone, or it belongs to another group.
    """
    if tensor.dtype != DTYPE or tensor.shape != (1,) or tensor.device.type != "cpu":
        raise ValueError(f"not a plan: {tensor.dtype} {list(tensor.shape)} on {tensor.device}")
    if not tensor.data_ptr():
        raise ValueError(f"not a plan: a {type(tensor).__name__} without memory of its own")
    owner = owner_of(tensor)
    if owner is None:
        raise ValueError("the plan of this handle is gone: a copy works only while the original is alive, here")
    if owner.group != group:
        raise ValueError("the handle belongs to another ExpertParallel (another group or configuration)")
    return owner.plan


def overflow_of(plan: _C.Plan, device: torch.device) -> Tensor:
    """[] int64 of a plan in static mode, [0] of another, on the device of its rows.

    A live word: the plan's dispatch and every combine raise it to the capacity that was needed, behind torch's back, as
    kernels in a CUDA graph would. It keeps the word alive, and not the plan; on a device, where the word lies in the
    plan's memory, that as well.
    """
    if plan.device_overflow_ptr is not None:
        (block,) = (block for block in plan.memory if block.data_ptr() == plan.device_overflow_ptr)
        return torch.empty((), dtype=torch.int64, device=device).set_(block.untyped_storage(), 0, (), ())
    flag = plan.overflow
    if flag is None:
        return torch.empty(0, dtype=torch.int64, device=device)
    storage = torch.frombuffer(flag, dtype=torch.int64).untyped_storage()
    return torch.empty((), dtype=torch.int64, device="cpu").set_(storage, 0, (), ())


def owner_of(tensor: Tensor) -> _Owner | None:
    """What keeps the plan of a plain tensor, for who must not lose it when only a copy of the tensor stays."""
    return _owners.get(ctypes.c_int64.from_address(tensor.data_ptr()).value)


def num_alive() -> int:
    """Plans that somebody keeps."""
    return len(_owners)
