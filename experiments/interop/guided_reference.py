"""The U-Net of guided diffusion in plain PyTorch, written from its paper's description with the names of its checkpoints.

Reference: Dhariwal & Nichol 2021, arXiv:2105.05233, section 3.
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

from diffjax.interop.guided import DEFAULTS, MULTIPLES


class Residual(nn.Module):
    """Two convolutions, the code between them; it halves or doubles the axes if `resize` says so."""

    def __init__(self, c: dict, n: int, out: int, resize: str = "") -> None:
        super().__init__()
        self.film, self.resize = c["use_scale_shift_norm"], resize
        norm = lambda width: nn.GroupNorm(c["norm_groups"], width)
        self.in_layers = nn.Sequential(norm(n), nn.SiLU(), nn.Conv2d(n, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * c["num_channels"], out * (2 if self.film else 1)))
        self.out_layers = nn.Sequential(
            norm(out), nn.SiLU(), nn.Dropout(c["dropout"]), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if n == out else nn.Conv2d(n, out, 1)

    def forward(self, x: Any, code: Any) -> Any:
        """The block at a code."""
        h = self.in_layers[1](self.in_layers[0](x))
        if self.resize == "down":
            x, h = (F.avg_pool2d(a, 2) for a in (x, h))
        if self.resize == "up":
            x, h = (a.repeat_interleave(2, 2).repeat_interleave(2, 3) for a in (x, h))
        h = self.in_layers[2](h)
        e = self.emb_layers(code)[:, :, None, None]
        if self.film:
            scale, shift = e[:, : h.shape[1]], e[:, h.shape[1] :]
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + e)
        return self.skip_connection(x) + self.out_layers[3](self.out_layers[1](h))


class SelfAttention(nn.Module):
    """Attention of all places to each other."""

    def __init__(self, c: dict, n: int) -> None:
        super().__init__()
        self.heads = c["num_heads"] if c["num_head_channels"] == -1 else n // c["num_head_channels"]
        self.new = c["use_new_attention_order"]
        self.norm = nn.GroupNorm(c["norm_groups"], n)
        self.qkv = nn.Conv1d(n, 3 * n, 1)
        self.proj_out = nn.Conv1d(n, n, 1)

    def forward(self, x: Any, code: Any) -> Any:
        """The state, with attention added."""
        b, n, height, width = x.shape
        y = self.qkv(self.norm(x).reshape(b, n, -1))
        if self.new:  # the kind is the slowest index of the channels, in the old order the head is
            q, k, v = y.reshape(b, 3, self.heads, n // self.heads, -1).unbind(1)
        else:
            q, k, v = y.reshape(b, self.heads, 3, n // self.heads, -1).unbind(2)
        weights = (q.transpose(2, 3) @ k / math.sqrt(n // self.heads)).softmax(-1)
        h = (v @ weights.transpose(2, 3)).reshape(b, n, -1)
        return x + self.proj_out(h).reshape(b, n, height, width)


class Down(nn.Module):
    """A convolution with stride."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(n, n, 3, stride=2, padding=1)

    def forward(self, x: Any, code: Any) -> Any:
        """Half the axes."""
        return self.op(x)


class Up(nn.Module):
    """Repeats and a convolution."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n, n, 3, padding=1)

    def forward(self, x: Any, code: Any) -> Any:
        """Twice the axes."""
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class GuidedDiffusion(nn.Module):
    """The network of a set of flags."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config
        c = DEFAULTS | config
        size, base, blocks = c["large_size"] or c["image_size"], c["num_channels"], c["num_res_blocks"]
        given = [float(m) for m in c["channel_mult"].split(",")] if c["channel_mult"] else MULTIPLES[size]
        widths = [int(base * m) for m in given]
        attends = [str(size // 2**i) in c["attention_resolutions"].split(",") for i in range(len(widths))]
        self.base = base
        self.time_embed = nn.Sequential(nn.Linear(base, 4 * base), nn.SiLU(), nn.Linear(4 * base, 4 * base))
        if c["class_cond"]:
            self.label_emb = nn.Embedding(c["num_classes"], 4 * base)
        h, channels = widths[0], 6 if c["large_size"] else 3
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(channels, h, 3, padding=1)])])
        skips = [h]
        for i, width in enumerate(widths):
            for _ in range(blocks):
                more = [SelfAttention(c, width)] if attends[i] else []
                self.input_blocks.append(nn.ModuleList([Residual(c, h, width), *more]))
                h = width
                skips.append(h)
            if i < len(widths) - 1:
                resize = Residual(c, h, h, "down") if c["resblock_updown"] else Down(h)
                self.input_blocks.append(nn.ModuleList([resize]))
                skips.append(h)
        self.middle_block = nn.ModuleList([Residual(c, h, h), SelfAttention(c, h), Residual(c, h, h)])
        self.output_blocks = nn.ModuleList([])
        for i, width in reversed(list(enumerate(widths))):
            for j in range(blocks + 1):
                made = [Residual(c, h + skips.pop(), width)] + ([SelfAttention(c, width)] if attends[i] else [])
                h = width
                if i and j == blocks:
                    made.append(Residual(c, h, h, "up") if c["resblock_updown"] else Up(h))
                self.output_blocks.append(nn.ModuleList(made))
        out = nn.Conv2d(h, 6 if c["learn_sigma"] else 3, 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(c["norm_groups"], h), nn.SiLU(), out)

    def forward(self, x: Any, t: Any, label: Any = None) -> Any:
        """The output at times t = 0 ... 999."""
        w = torch.exp(-math.log(10000.0) / (self.base // 2) * torch.arange(self.base // 2))
        phase = t[:, None] * w
        code = self.time_embed(torch.cat([phase.cos(), phase.sin()], dim=1))
        code = code if label is None else code + self.label_emb(label)
        h, skips = self.input_blocks[0][0](x), []
        skips.append(h)
        for block in self.input_blocks[1:]:
            for layer in block:
                h = layer(h, code)
            skips.append(h)
        for layer in self.middle_block:
            h = layer(h, code)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            for layer in block:
                h = layer(h, code)
        return self.out(h)


def write(model: GuidedDiffusion, folder: str) -> None:
    """Tensors and flags as a folder."""
    path = pathlib.Path(folder)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"_class_name": "GuidedDiffusion", **model.config}, indent=2) + "\n")
    save_file(model.state_dict(), path / "model.safetensors")


def read(folder: str) -> GuidedDiffusion:
    """The network of a folder; of its tensors none may be missing or left."""
    path = pathlib.Path(folder)
    config = json.loads((path / "config.json").read_text())
    model = GuidedDiffusion(**{name: value for name, value in config.items() if name != "_class_name"})
    model.load_state_dict(load_file(next(path.glob("*.safetensors"))))
    return model.eval()
