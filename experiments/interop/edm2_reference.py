"""The network of EDM2 in plain PyTorch, written from its paper's description with the names of its files.

Reference: Karras et al. 2024, arXiv:2312.02696, Figure 21 and Appendix B.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from diffjax.interop import edm2, options


def unit(x: Any, axes: tuple[int, ...]) -> Any:
    """x over its root mean square along the axes, and 1e-4."""
    return x / (1e-4 + x.square().mean(axes, keepdim=True).sqrt())


class Unit(nn.Module):
    """A dense layer or convolution whose weights have unit magnitude."""

    def __init__(self, n: int, out: int, *length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, n, *length))

    def forward(self, x: Any, gain: Any = 1.0) -> Any:
        """The layer."""
        w = unit(self.weight, tuple(range(1, self.weight.ndim))) * (gain / math.sqrt(self.weight[0].numel()))
        return x @ w.T if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class Waves(nn.Module):
    """Cosines of random frequencies and phases."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(n))
        self.register_buffer("phases", 2 * math.pi * torch.rand(n))

    def forward(self, t: Any) -> Any:
        """The features at t."""
        return math.sqrt(2) * (t[:, None] * self.freqs + self.phases).cos()


def silu(x: Any) -> Any:
    """SiLU of unit magnitude."""
    return F.silu(x) / 0.596


def mixed(a: Any, b: Any, t: float) -> Any:
    """A weighted sum of unit magnitude."""
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


class UnitBlock(nn.Module):
    """A block of EDM2."""

    def __init__(self, c: Any, n: int, out: int, encoder: bool, way: str = "", attends: bool = False) -> None:
        super().__init__()
        code = c.model_channels * (c.channel_mult_emb or max(c.channel_mult))
        self.c, self.encoder, self.way = c, encoder, way
        self.heads = out // c.channels_per_head if attends else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0, self.conv_res1 = Unit(out if encoder else n, out, 3, 3), Unit(out, out, 3, 3)
        self.emb_linear = Unit(code, out)
        self.conv_skip = Unit(n, out, 1, 1) if n != out else None
        if attends:
            self.attn_qkv, self.attn_proj = Unit(out, 3 * out, 1, 1), Unit(out, out, 1, 1)

    def forward(self, x: Any, code: Any) -> Any:
        """The block at a code."""
        if self.way:
            x = F.avg_pool2d(x, 2) if self.way == "down" else F.interpolate(x, scale_factor=2)
        skip = (lambda a: a) if self.conv_skip is None else self.conv_skip
        if self.encoder:
            x = unit(skip(x), (1,))
        h = silu(self.conv_res0(silu(x)) * (1 + self.emb_linear(code, self.emb_gain))[:, :, None, None])
        x = mixed(x if self.encoder else skip(x), self.conv_res1(h), self.c.res_balance)
        if self.heads:
            y = self.attn_qkv(x).unflatten(1, (self.heads, -1, 3)).flatten(4)
            q, k, v = unit(y, (2,)).unbind(3)
            w = (torch.einsum("bhdi,bhdj->bhij", q, k) / math.sqrt(q.shape[2])).softmax(-1)
            y = self.attn_proj(torch.einsum("bhij,bhdj->bhdi", w, v).reshape(x.shape))
            x = mixed(x, y, self.c.attn_balance)
        return x if self.c.clip_act is None else x.clip(-self.c.clip_act, self.c.clip_act)


class UnitUNet(nn.Module):
    """The network of EDM2."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.c, widths = c, [c.model_channels * m for m in c.channel_mult]
        sizes = [c.img_resolution >> i for i in range(len(widths))]
        noise = c.model_channels * (c.channel_mult_noise or c.channel_mult[0])
        code = c.model_channels * (c.channel_mult_emb or max(c.channel_mult))
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier, self.emb_noise = Waves(noise), Unit(noise, code)
        if c.label_dim:
            self.emb_label = Unit(c.label_dim, code)
        here, kept = widths[0], [widths[0]]
        self.enc = nn.ModuleDict({f"{sizes[0]}x{sizes[0]}_conv": Unit(c.img_channels + 1, here, 3, 3)})
        for i, width in enumerate(widths):
            at, attends = f"{sizes[i]}x{sizes[i]}_", sizes[i] in c.attn_resolutions
            if i:
                self.enc[at + "down"] = UnitBlock(c, here, here, True, "down")
                kept.append(here)
            for j in range(c.num_blocks):
                self.enc[f"{at}block{j}"] = UnitBlock(c, here, width, True, attends=attends)
                here = width
                kept.append(here)
        self.dec = nn.ModuleDict()
        for i in reversed(range(len(widths))):
            at, attends = f"{sizes[i]}x{sizes[i]}_", sizes[i] in c.attn_resolutions
            if i == len(widths) - 1:
                self.dec[at + "in0"] = UnitBlock(c, here, here, False, attends=True)
                self.dec[at + "in1"] = UnitBlock(c, here, here, False)
            else:
                self.dec[at + "up"] = UnitBlock(c, here, here, False, "up")
            for j in range(c.num_blocks + 1):
                self.dec[f"{at}block{j}"] = UnitBlock(c, here + kept.pop(), widths[i], False, attends=attends)
                here = widths[i]
        self.out_conv = Unit(here, c.img_channels, 3, 3)

    def forward(self, x: Any, t: Any, label: Any = None) -> Any:
        """The network."""
        code, share = self.emb_noise(self.emb_fourier(t)), self.c.concat_balance
        if self.c.label_dim:
            code = mixed(code, self.emb_label(label * math.sqrt(self.c.label_dim)), self.c.label_balance)
        code, x, kept = silu(code), torch.cat([x, torch.ones_like(x[:, :1])], dim=1), []
        for layer in self.enc.values():
            x = layer(x, code) if isinstance(layer, UnitBlock) else layer(x)
            kept.append(x)
        for name, layer in self.dec.items():
            if "block" in name:
                parts = [((1 - share), x), (share, kept.pop())]
                total = math.sqrt(sum(a.shape[1] for _, a in parts)) / math.hypot(1 - share, share)
                x = torch.cat([total * by / math.sqrt(a.shape[1]) * a for by, a in parts], dim=1)
            x = layer(x, code)
        return self.out_conv(x, self.out_gain)


class Precond(nn.Module):
    """A network of EDM2 with EDM's preconditioning, and what it tells of its loss."""

    def __init__(self, kind: str, config: dict) -> None:
        super().__init__()
        self.kind, self.config = kind, config
        self.c = options.read(kind, config, edm2.DEFAULTS)
        self.unet = UnitUNet(self.c)
        self.logvar_fourier, self.logvar_linear = Waves(self.c.logvar_channels), Unit(self.c.logvar_channels, 1)

    def forward(self, x: Any, sigma: Any, label: Any = None, augment: Any = None) -> dict[str, Any]:
        """The denoised picture, what the network returns, and the log of its loss."""
        c, s, d = self.c, sigma[:, None, None, None], self.c.sigma_data
        if c.label_dim:
            label = (
                x.new_zeros(len(x), c.label_dim) if label is None else F.one_hot(label.long(), c.label_dim + 1)[:, :-1]
            )
        n, code = (s**2 + d**2).sqrt(), sigma.log() / 4
        f = self.unet(x / n, code, label if label is None else label.float())
        told = self.logvar_linear(self.logvar_fourier(code))[:, 0]
        return {"f": f, "x0": (d / n) ** 2 * x + s * d / n * f, "log_variance": told}
