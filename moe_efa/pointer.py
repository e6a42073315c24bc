"""Addresses of tensors, as native calls take them."""

from __future__ import annotations

import torch
from torch import Tensor

# Null means "none of it" to the native calls, so a tensor without elements gets an address that nobody reads.
_NOTHING = torch.empty(1, device="cpu")


def pointer(tensor: Tensor | None) -> int:
    """Of the first element; 0 for None.

    Raises:
        ValueError: for a tensor without memory of its own, such as a meta tensor.
    """
    if tensor is None:
        return 0
    address = tensor.data_ptr()
    if address:
        return address
    if tensor.numel():
        raise ValueError(f"a {type(tensor).__name__} {list(tensor.shape)} without memory of its own cannot be sent")
    return _NOTHING.data_ptr()  # never read, so that it need not be on the device
