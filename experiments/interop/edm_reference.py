"""The networks of EDM in plain PyTorch, written from their paper's description with the names of their files.

Reference: Karras et al. 2022, arXiv:2206.00364, Table 1 and appendix C.2.
"""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812

from diffjax.interop import edm
from experiments.interop.edm2_reference import Precond


class Conv(nn.Module):
    """A convolution of odd length, or none, after or before a resampling filter."""

    def __init__(self, n: int, out: int, length: int, way: str = "", taps: Any = (1, 1), late: bool = False) -> None:
        super().__init__()
        self.way, self.late = way, late
        self.weight = nn.Parameter(torch.zeros(out, n, length, length)) if length else None
        self.bias = nn.Parameter(torch.zeros(out)) if length else None
        f = torch.tensor(taps, dtype=torch.float32)
        self.register_buffer("resample_filter", (f[:, None] * f / f.sum() ** 2)[None, None] if way else None)

    def filtered(self, x: Any, pad: int) -> Any:
        """The signal halved or doubled along both axes, channel by channel."""
        f = self.resample_filter
        each = x.flatten(0, 1)[:, None]
        if self.way == "down":
            y = F.conv2d(each, f, stride=2, padding=pad)
        else:
            y = F.conv_transpose2d(each, 4 * f, stride=2, padding=pad)
        return y.reshape(*x.shape[:2], *y.shape[-2:])

    def forward(self, x: Any) -> Any:
        """The layer."""
        pad = (self.resample_filter.shape[-1] - 1) // 2 if self.way else 0
        if self.late:  # the convolution first, on zeros that the filter sees too
            y = F.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2 + pad)
            return self.filtered(y, 0) + self.bias[:, None, None]
        x = self.filtered(x, pad) if self.way else x
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


def group_norm(n: int, eps: float) -> nn.GroupNorm:
    """At most 32 groups of at least four channels."""
    return nn.GroupNorm(min(32, n // 4), n, eps=eps)


class Block(nn.Module):
    """A residual block of either network, with one or more heads of attention."""

    def __init__(self, c: Any, n: int, out: int, way: str = "", attends: bool = False) -> None:
        super().__init__()
        song = self.song = c.model_type == "SongUNet"
        eps, taps = (1e-6, c.resample_filter) if song else (1e-5, (1, 1))
        self.n, self.heads = n, (1 if song else out // c.channels_per_head) if attends else 0
        self.norm0, self.conv0 = group_norm(n, eps), Conv(n, out, 3, way, taps)
        self.affine = nn.Linear(c.model_channels * c.channel_mult_emb, out * (1 if song else 2))
        self.norm1, self.conv1 = group_norm(out, eps), Conv(out, out, 3)
        self.skip = Conv(n, out, 1 if song or n != out else 0, way, taps) if n != out or way else None
        if self.heads:
            self.norm2, self.qkv, self.proj = group_norm(out, eps), Conv(out, 3 * out, 1), Conv(out, out, 1)

    def forward(self, x: Any, code: Any) -> Any:
        """The block at a code."""
        h = self.conv0(F.silu(self.norm0(x)))
        p = self.affine(code)[:, :, None, None]
        if self.song:
            h = self.norm1(h + p)
        else:
            scale, shift = p.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        share = math.sqrt(0.5) if self.song else 1.0
        x = share * (self.conv1(F.silu(h)) + (x if self.skip is None else self.skip(x)))
        if not self.heads:
            return x
        q, k, v = self.qkv(self.norm2(x)).unflatten(1, (self.heads, -1, 3)).flatten(4).unbind(3)
        w = torch.einsum("bhdi,bhdj->bhij", q, k) / math.sqrt(q.shape[2])
        y = torch.einsum("bhij,bhdj->bhdi", w.softmax(-1), v).reshape(x.shape)
        return share * (x + self.proj(y))


class Features(nn.Module):
    """Features of the time code."""

    def __init__(self, n: int, kind: str) -> None:
        super().__init__()
        self.kind, self.n = kind, n // 2
        if kind == "fourier":
            self.register_buffer("freqs", 16 * torch.randn(self.n))

    def forward(self, t: Any) -> Any:
        """Sines first in those of score-based models, cosines first in ADM's."""
        if self.kind == "fourier":
            w = 2 * math.pi * self.freqs
        else:
            w = 10000.0 ** (-torch.arange(self.n) / (self.n - (self.kind == "positional")))
        parts = [(t[:, None] * w).sin(), (t[:, None] * w).cos()]
        return torch.cat(parts[::-1] if self.kind == "adm" else parts, dim=1)


class UNet(nn.Module):
    """DDPM++, NCSN++ or ADM."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.c, song = c, c.model_type == "SongUNet"
        base, code, picture = c.model_channels, c.model_channels * c.channel_mult_emb, c.img_channels
        noise = base * c.channel_mult_noise if song else base
        self.map_noise = Features(noise, c.embedding_type if song else "adm")
        if c.label_dim:
            self.map_label = nn.Linear(c.label_dim, noise if song else code, bias=song)
        if c.augment_dim:
            self.map_augment = nn.Linear(c.augment_dim, noise, bias=False)
        self.map_layer0, self.map_layer1 = nn.Linear(noise, code), nn.Linear(code, code)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        widths = [base * m for m in c.channel_mult]
        sizes = [c.img_resolution >> i for i in range(len(widths))]
        here, beside, widest = base if song else widths[0], picture, []
        self.enc[f"{sizes[0]}x{sizes[0]}_conv"] = Conv(picture, here, 3)
        widest.append(here)
        for i, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            at = f"{size}x{size}_"
            if i:
                self.enc[at + "down"] = Block(c, here, here, "down")
                widest.append(here)
                if song and c.encoder_type == "skip":
                    self.enc[at + "aux_down"] = Conv(beside, beside, 0, "down", c.resample_filter)
                    self.enc[at + "aux_skip"] = Conv(beside, here, 1)
                if song and c.encoder_type == "residual":
                    self.enc[at + "aux_residual"] = Conv(beside, here, 3, "down", c.resample_filter, late=True)
                    beside = here
            for j in range(c.num_blocks):
                self.enc[f"{at}block{j}"] = Block(c, here, width, attends=size in c.attn_resolutions)
                here = width
                widest.append(here)
        for i in reversed(range(len(widths))):
            at, attends = f"{sizes[i]}x{sizes[i]}_", sizes[i] in c.attn_resolutions
            if i == len(widths) - 1:
                self.dec[at + "in0"], self.dec[at + "in1"] = Block(c, here, here, attends=True), Block(c, here, here)
            else:
                self.dec[at + "up"] = Block(c, here, here, "up")
            for j in range(c.num_blocks + 1):
                late = j == c.num_blocks or not song
                self.dec[f"{at}block{j}"] = Block(c, here + widest.pop(), widths[i], attends=attends and late)
                here = widths[i]
            if song and (i == 0 or c.decoder_type == "skip"):
                if i < len(widths) - 1 and c.decoder_type == "skip":
                    self.dec[at + "aux_up"] = Conv(picture, picture, 0, "up", c.resample_filter)
                self.dec[at + "aux_norm"], self.dec[at + "aux_conv"] = group_norm(here, 1e-6), Conv(here, picture, 3)
        if not song:
            self.out_norm, self.out_conv = group_norm(here, 1e-5), Conv(here, picture, 3)

    def code(self, t: Any, label: Any, augment: Any) -> Any:
        """The code of time, class (vectors of zeros and ones) and augmentation."""
        song, h = self.c.model_type == "SongUNet", self.map_noise(t)
        if song and self.c.label_dim:
            h = h + self.map_label(label * math.sqrt(self.c.label_dim))
        if augment is not None:
            h = h + self.map_augment(augment)
        h = self.map_layer1(F.silu(self.map_layer0(h)))
        if not song and self.c.label_dim:
            h = h + self.map_label(label)
        return F.silu(h)

    def forward(self, x: Any, t: Any, label: Any = None, augment: Any = None) -> Any:
        """The network."""
        code = self.code(t, label, augment)
        kept, beside = [], x
        for name, layer in self.enc.items():
            if "aux_down" in name:
                beside = layer(beside)
            elif "aux_skip" in name:
                x = kept[-1] = x + layer(beside)
            elif "aux_residual" in name:
                x = kept[-1] = beside = (x + layer(beside)) * math.sqrt(0.5)
            else:
                x = layer(x, code) if isinstance(layer, Block) else layer(x)
                kept.append(x)
        y = None
        for name, layer in self.dec.items():
            if "aux_up" in name:
                y = layer(y)
            elif "aux_norm" in name:
                h = F.silu(layer(x))
            elif "aux_conv" in name:
                y = layer(h) if y is None else layer(h) + y
            else:
                x = layer(torch.cat([x, kept.pop()], dim=1) if "block" in name else x, code)
        return y if y is not None else self.out_conv(F.silu(self.out_norm(x)))


class Preconditioned(nn.Module):
    """A network of EDM and its preconditioning: `forward` is D(x; sigma)."""

    def __init__(self, kind: str, config: dict) -> None:
        super().__init__()
        self.kind, self.config = kind, config
        self.c = edm.read(kind, config)
        self.model = UNet(self.c)

    def forward(self, x: Any, sigma: Any, label: Any = None, augment: Any = None) -> dict[str, Any]:
        """The denoised picture, and what the network returns."""
        c, s, x = self.c, sigma[:, None, None, None], x.float()
        if c.label_dim:
            label = (
                x.new_zeros(len(x), c.label_dim) if label is None else F.one_hot(label.long(), c.label_dim + 1)[:, :-1]
            )
        if self.kind == "EDMPrecond":
            n = (s**2 + c.sigma_data**2).sqrt()
            skip, out, scale, code = c.sigma_data**2 / n**2, s * c.sigma_data / n, 1 / n, sigma.log() / 4
        elif self.kind == "VPPrecond":
            t = ((c.beta_min**2 + 2 * c.beta_d * (1 + sigma**2).log()).sqrt() - c.beta_min) / c.beta_d
            skip, out, scale, code = 1, -s, 1 / (s**2 + 1).sqrt(), (c.M - 1) * t
        else:
            skip, out, scale, code = 1, s, 1, (sigma / 2).log()
        f = self.model(scale * x, code, label if label is None else label.float(), augment)
        return {"f": f, "x0": skip * x + out * f}


def make(kind: str, config: dict) -> nn.Module:
    """The reference of a class."""
    torch.manual_seed(0)  # of the frequencies, which are no parameters
    return (Precond if kind == "Precond" else Preconditioned)(kind, config).eval()


def write(model: nn.Module, folder: str) -> None:
    """Tensors and arguments as a folder."""
    path = pathlib.Path(folder)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"_class_name": model.kind, **model.config}, indent=2) + "\n")
    save_file(model.state_dict(), path / "model.safetensors")


def read(folder: str) -> nn.Module:
    """The network of a folder; of its tensors none may be missing or left."""
    path = pathlib.Path(folder)
    config = json.loads((path / "config.json").read_text())
    model = make(config.pop("_class_name"), config)
    model.load_state_dict(load_file(next(path.glob("*.safetensors"))))
    return model.eval()
