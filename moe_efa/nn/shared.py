"""Shared experts: a dense SwiGLU that every token passes, on the rank that has the token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_efa.nn.autocast import autocast_dtype
from moe_efa.nn.initialization import draw_seed, normal_


class SharedExperts(nn.Module):
    """``n`` shared experts of size ``I`` are one SwiGLU of size ``n * I``.

    Args:
        hidden_size, intermediate_size: H, and the size of all shared experts together.
        gated: multiply the result by a learned sigmoid of the token, as Qwen2-MoE does.
        initializer_range, seed: as in :class:`SwiGLUExperts`.

    Attributes:
        gate_up_proj: linear H -> 2 * I, the gate's rows first.
        down_proj: linear I -> H.
        gate: linear H -> 1, or None.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        gated: bool = False,
        initializer_range: float = 0.02,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.initializer_range = initializer_range
        self.seed = draw_seed(seed)

        options: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, **options)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **options)
        self.gate = nn.Linear(hidden_size, 1, **options) if gated else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values again, the same ones. Does nothing on the meta device."""
        for name, weight in self.named_parameters():
            normal_(weight.detach(), std=self.initializer_range, seed=self.seed, name=f"shared experts {name}")

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H] in x's dtype or autocast's; parameters of another dtype are cast to that of x."""
        gate, up = _linear(self.gate_up_proj, x).chunk(2, dim=-1)
        out = _linear(self.down_proj, torch.nn.functional.silu(gate) * up)
        return out if self.gate is None else _linear(self.gate, x).sigmoid() * out


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Through the module wherever that works, since it may have hooks or be one of another kind."""
    weight = layer.weight
    if weight.dtype == x.dtype or autocast_dtype(x):
        return layer(x)
    return torch.nn.functional.linear(x, weight.to(x.dtype))
