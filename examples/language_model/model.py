"""What example 03 trains: a small causal transformer over bytes, with an MoE layer in every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

import moe_efa


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model. Tokens are bytes, so there are 256."""

    num_layers: int = 4
    hidden_size: int = 128
    num_heads: int = 4
    sequence_length: int = 128
    num_experts: int = 16
    top_k: int = 2
    intermediate_size: int = 128
    num_shared_experts: int = 1


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden_size = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, hidden_size))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, ep: moe_efa.ExpertParallel) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.hidden_size)
        self.moe = moe_efa.MoELayer(
            expert_parallel=ep,  # one for all layers
            intermediate_size=config.intermediate_size,
            num_shared_experts=config.num_shared_experts,
            score_function="sigmoid",
            initializer_range=config.hidden_size**-0.5,
        )

    def forward(self, x: Tensor, topk_idx: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.moe(self.moe_norm(x), topk_idx)


class ByteModel(nn.Module):
    """Bytes [B, S] -> logits [B, S, 256]. torch's seed decides the initial values, whatever the number of ranks."""

    def __init__(self, config: ModelConfig, ep: moe_efa.ExpertParallel) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, config.hidden_size)
        self.position = nn.Embedding(config.sequence_length, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, ep) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, 256, bias=False)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, routes: Sequence[Tensor] | None = None) -> Tensor:
        """routes: a selection [B, S, K] for each layer, to pin the routing."""
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for number, block in enumerate(self.blocks):
            x = block(x, None if routes is None else routes[number])
        return self.head(self.norm(x))

    def moe_layers(self) -> list[moe_efa.MoELayer]:
        return [block.moe for block in self.blocks]

    def split_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(those that all ranks have, those of this rank's experts)."""
        experts = [parameter for layer in self.moe_layers() for parameter in layer.experts.parameters()]
        known = {id(parameter) for parameter in experts}
        return [parameter for parameter in self.parameters() if id(parameter) not in known], experts
