"""The DiT and the default U-Net of this library in PyTorch, with the same parameters: what `benchmarks.networks` compares with.

As one writes them there: eager modules' functions, channels-last convolutions, `scaled_dot_product_attention`. Needs torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from diffjax.networks import grid_positions

Tree = dict[str, Any]


def tensors(params: Tree) -> Tree:
    """Parameters as tensors with gradients, in PyTorch's layouts: [out, in] and channels-last [out, in, kh, kw]."""

    def leaf(name: str, a: Any) -> torch.Tensor:
        t = torch.from_numpy(np.array(a, np.float32))
        if name == "kernel":
            t = t.T if t.ndim == 2 else t.permute(3, 2, 0, 1)
            t = t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t.contiguous()
        return t.requires_grad_()

    return {k: tensors(v) if isinstance(v, dict) else leaf(k, v) for k, v in params.items()}


def leaves(tree: Tree) -> list[torch.Tensor]:
    """All tensors."""
    return [leaf for v in tree.values() for leaf in (leaves(v) if isinstance(v, dict) else [v])]


def dense(p: Tree, x: torch.Tensor) -> torch.Tensor:
    """`nn.Linear`."""
    return F.linear(x, p["kernel"], p.get("bias"))


def code(p: Tree, t: torch.Tensor, size: int) -> torch.Tensor:
    """The code of the time."""
    w = torch.from_numpy(np.geomspace(1.0, 256.0, size // 2).astype(np.float32))
    phase = t[:, None] * w
    h = torch.cat([phase.cos(), phase.sin()], -1)
    return F.silu(dense(p["time"]["out"], F.silu(dense(p["time"]["hidden"], h))))


def attention(p: Tree, x: torch.Tensor, heads: int) -> torch.Tensor:
    """Self-attention of [B, T, d]; columns of q, k, v are sorted by head."""
    b, n, d = x.shape
    q, k, v = dense(p["qkv"], x).view(b, n, heads, 3, d // heads).permute(3, 0, 2, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v)
    return dense(p["out"], y.transpose(1, 2).reshape(b, n, d))


def norm(x: torch.Tensor) -> torch.Tensor:
    """Layer normalisation without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def dit(p: Tree, x: torch.Tensor, t: torch.Tensor, *, heads: int, patch: int) -> torch.Tensor:
    """The DiT without conditions.   [B, H, W, C] -> [B, H, W, C]"""
    b, h, w, c = x.shape
    width = p["in"]["kernel"].shape[0]
    k = code(p["code"], t, width)
    z = x.view(b, h // patch, patch, w // patch, patch, c).permute(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)
    z = dense(p["in"], z) + torch.from_numpy(grid_positions(h // patch, w // patch, width))
    for i in range(sum(name.startswith("block_") for name in p)):
        q = p[f"block_{i}"]
        sa, ca, ga, sm, cm, gm = dense(q["film"], k)[:, None].chunk(6, -1)
        z = z + ga * attention(q["attention"], norm(z) * (1 + ca) + sa, heads)
        y = dense(q["hidden"], norm(z) * (1 + cm) + sm)
        z = z + gm * dense(q["out"], F.gelu(y, approximate="tanh"))
    shift, scale = dense(p["film"], k)[:, None].chunk(2, -1)
    y = dense(p["out"], norm(z) * (1 + scale) + shift)
    y = y.view(b, h // patch, w // patch, patch, patch, c).permute(0, 1, 3, 2, 4, 5)
    return y.reshape(b, h, w, c)


def group_norm(p: Tree, x: torch.Tensor) -> torch.Tensor:
    """Groups of at least four channels, at most 32."""
    c = x.shape[1]
    groups = max(g for g in range(1, 33) if c % g == 0 and (g == 1 or c // g >= 4))
    return F.group_norm(x, groups, p["scale"], p["bias"], eps=1e-6)


def conv(p: Tree, x: torch.Tensor) -> torch.Tensor:
    """A convolution that keeps the size."""
    return F.conv2d(x, p["kernel"], p["bias"], padding=p["kernel"].shape[-1] // 2)


def block(p: Tree, x: torch.Tensor, k: torch.Tensor, head_size: int) -> torch.Tensor:
    """A residual block with FiLM, then attention if it has parameters."""
    h = conv(p["conv_in"], F.silu(group_norm(p["norm_in"], x)))
    shift, scale = dense(p["film"], k)[:, :, None, None].chunk(2, 1)
    h = conv(p["conv_out"], F.silu(group_norm(p["norm_out"], h) * (1 + scale) + shift))
    if "skip" in p:
        x = F.conv2d(x, p["skip"]["kernel"][:, :, None, None], p["skip"]["bias"])
    x = x + h
    if "attention" in p:
        b, n, height, width = x.shape
        h = group_norm(p["norm_attention"], x).permute(0, 2, 3, 1).reshape(b, -1, n)
        h = attention(p["attention"], h, max(1, n // head_size))
        x = x + h.view(b, height, width, n).permute(0, 3, 1, 2)
    return x


def unet(p: Tree, x: torch.Tensor, t: torch.Tensor, *, levels: int, blocks: int, head_size: int = 16) -> torch.Tensor:
    """The default U-Net without conditions.   [B, C, H, W] channels-last -> the same"""
    k = code(p["code"], t, p["code"]["time"]["hidden"]["kernel"].shape[1])
    h = conv(p["in"], x)
    skips = [h]
    for i in range(levels):
        for j in range(blocks):
            h = block(p[f"down_{i}_{j}"], h, k, head_size)
            skips.append(h)
        if i < levels - 1:
            h = F.avg_pool2d(h, 2)
            skips.append(h)
    h = block(p["middle_1"], block(p["middle_0"], h, k, head_size), k, head_size)
    for i in reversed(range(levels)):
        for j in range(blocks + 1):
            h = block(p[f"up_{i}_{j}"], torch.cat([h, skips.pop()], 1), k, head_size)
        if i:
            h = F.interpolate(h, scale_factor=2)
    return conv(p["out"], F.silu(group_norm(p["norm_out"], h)))
