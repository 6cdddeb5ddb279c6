"""DiT in PyTorch, written from the paper and from the names of the tensors in its released files.

Reference: Peebles & Xie 2022, arXiv:2212.09748, section 3.2; SiT has the same network: Ma et al. 2024, arXiv:2401.08740.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


def normed(x: Any) -> Any:
    """Layer normalisation without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Named(nn.Module):
    """Modules under names."""

    def __init__(self, **modules: nn.Module):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


def adaptive(width: int, n: int) -> nn.Sequential:
    """n modulations from a code."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, n * width))


class Block(nn.Module):
    """A block with adaLN-zero, Figure 3."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.attn = Named(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width))
        self.mlp = Named(fc1=nn.Linear(width, hidden), fc2=nn.Linear(hidden, width))
        self.adaLN_modulation = adaptive(width, 6)

    def forward(self, x: Any, c: Any) -> Any:
        """[B, T, d], [B, d] -> [B, T, d]"""
        shift, scale, gate, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        b, n, d = x.shape
        qkv = self.attn.qkv(normed(x) * (1 + scale) + shift).reshape(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.unbind(2)
        weights = torch.einsum("bthd,bshd->bhts", q, k).div(math.sqrt(d // self.heads)).softmax(-1)
        x = x + gate * self.attn.proj(torch.einsum("bhts,bshd->bthd", weights, v).reshape(b, n, d))
        h = self.mlp.fc1(normed(x) * (1 + scale_m) + shift_m)
        return x + gate_m * self.mlp.fc2(F.gelu(h, approximate="tanh"))


def positions(side: int, width: int) -> Any:
    """Fixed sine-cosine positions: the first half of the features tells the column, the second the row."""
    w = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    row, column = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    parts = [f(a.reshape(-1, 1) * w) for a in (column, row) for f in (np.sin, np.cos)]
    return torch.tensor(np.concatenate(parts, axis=1)[None], dtype=torch.float32)


class Reference(nn.Module):
    """The network; `first`: whether only the first half of the channels is given."""

    def __init__(self, first: bool, **c: Any):
        super().__init__()
        width, p = c["hidden_size"], c["patch_size"]
        self.first, self.patch, self.channels = first and c["learn_sigma"], p, c["in_channels"] * (1 + c["learn_sigma"])
        self.x_embedder = Named(proj=nn.Conv2d(c["in_channels"], width, p, stride=p))
        self.t_embedder = Named(mlp=nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)))
        self.y_embedder = Named(embedding_table=nn.Embedding(c["num_classes"] + 1, width))
        self.register_buffer("pos_embed", positions(c["input_size"] // p, width))
        hidden = int(c["mlp_ratio"] * width)
        self.blocks = nn.ModuleList(Block(width, c["num_heads"], hidden) for _ in range(c["depth"]))
        self.final_layer = Named(linear=nn.Linear(width, p * p * self.channels), adaLN_modulation=adaptive(width, 2))

    def forward(self, x: Any, t: Any, label: Any) -> Any:
        """[B, C, H, W], [B], [B] -> [B, out, H, W]"""
        w = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        features = torch.cat([torch.cos(t[:, None] * w), torch.sin(t[:, None] * w)], dim=1)
        c = self.t_embedder.mlp(features) + self.y_embedder.embedding_table(label)
        z = self.x_embedder.proj(x)
        b, _, h, w = z.shape
        z = z.flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            z = block(z, c)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        z = self.final_layer.linear(normed(z) * (1 + scale) + shift)
        p = self.patch
        z = z.reshape(b, h, w, p, p, self.channels).permute(0, 5, 1, 3, 2, 4).reshape(b, self.channels, h * p, w * p)
        return z[:, : self.channels // 2] if self.first else z


def reference(kind: str, **config: Any) -> Reference:
    """DiT or SiT of these arguments of their classes."""
    return Reference(kind == "SiT", **dict(mlp_ratio=4.0, learn_sigma=True) | config)
