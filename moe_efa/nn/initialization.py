"""Initial values that depend on a seed alone: not on the number of ranks, the device or what was drawn before."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def draw_seed(seed: int | None) -> int:
    """The seed, or one from torch's default generator, which is the same on ranks that were seeded alike."""
    return int(torch.randint(2**62, (), device="cpu")) if seed is None else seed


@torch.no_grad()
def normal_(tensor: Tensor, *, std: float, seed: int, name: str) -> None:
    """Fill in place with what belongs to (seed, name). Skips the meta device.

    Drawn in fp32 on the CPU, so that every device and dtype gets the same values.
    """
    if tensor.is_meta:
        return
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
    tensor.copy_(torch.empty(tensor.shape, device="cpu").normal_(0.0, std, generator=generator))
