"""A byte-level GPT: pre-norm blocks, causal attention, tied embeddings, learned positions.

Owns the architecture and its initial weights. Never owns training state, and knows nothing of fragments.

Shape suffixes: B sequences, T positions, D width, H heads, K width per head, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.spec_sections import GptSpec

INIT_STD = 0.02


class Attention(nn.Module):
    """Multi-head causal self-attention without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q_BHTK, k_BHTK, v_BHTK = (
            part_BTD.view(B, T, self.heads, D // self.heads).transpose(1, 2)
            for part_BTD in self.qkv(x_BTD).split(D, dim=2)
        )
        mixed_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        out: Tensor = self.out(mixed_BHTK.transpose(1, 2).reshape(B, T, D))
        return out


class Block(nn.Module):
    """Attention and a four times wider MLP, each normalised first and added to the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        out: Tensor = x_BTD + self.down(F.gelu(self.up(self.mlp_norm(x_BTD))))
        return out


class GPT(nn.Module):
    """The model of a run; ``generator`` (on the CPU) decides its initial weights."""

    def __init__(self, spec: GptSpec, generator: torch.Generator) -> None:
        super().__init__()
        self.context = spec.context
        self.tokens = nn.Embedding(spec.vocab, spec.width)
        self.positions = nn.Embedding(spec.context, spec.width)
        self.blocks = nn.ModuleList(Block(spec.width, spec.heads) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.width, bias=False)
        self._initialise(generator)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V) of the byte after each of up to ``context`` bytes (int64)."""
        positions_TD = self.positions.weight[: tokens_BT.shape[1]]
        x_BTD = self.tokens(tokens_BT) + positions_TD
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return F.linear(self.norm(x_BTD), self.tokens.weight)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Uniform weights of standard deviation 0.02; less for the projections that add to the residual stream.

        Uniform, not normal: torch draws uniform numbers as integers over 2^24, and one subtraction and one
        multiplication keep them the same bits on every processor, which its normal draws are not. So a shared
        initialisation needs no file.
        """
        residual_scale = 1 / math.sqrt(2 * len(self.blocks))
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            std = INIT_STD * (
                residual_scale if name.endswith(("attention.out.weight", "down.weight")) else 1.0
            )
            drawn = torch.rand(parameter.shape, generator=generator)
            parameter.copy_(drawn.sub_(0.5).mul_(2 * math.sqrt(3.0) * std))
