"""Networks of EDM2 from exported tensors, with the names of their own repository, as `networks.EDM2UNet`.

As those of `edm`: a folder with `model.safetensors` and `config.json`. Their files are pickles, which are never opened here;
where one is trusted, and their repository is on Python's path, PyTorch exports it so:

    net = pickle.load(open("edm2-img512-s-2147483-0.130.pkl", "rb"))["ema"]
    safetensors.torch.save_file({k: v.contiguous() for k, v in net.state_dict().items()}, "folder/model.safetensors")
    json.dump({"_class_name": type(net).__name__, **net.init_kwargs}, open("folder/config.json", "w"))

Weights are normalised where they are used, as there, with their 1e-4 beside each norm. `load_pretrained(folder,
dtype=jnp.float32)` computes in float32 with weights that were stored in float16. Conditions: a label [B], or None and
`label_dim` for no label. The head that tells the log of the loss is the tap `log_variance`.

Reference: Karras et al. 2024, arXiv:2312.02696, Figure 21 and Appendix B.
"""

from __future__ import annotations

from typing import Any

from diffjax.interop import options
from diffjax.interop.edm import edm_pieces, example, function
from diffjax.interop.edm_rules import interleaved
from diffjax.interop.kinds import conv, conv1x1, dense, same
from diffjax.interop.peer import Config, Peer
from diffjax.interop.pieces import Pieces, expect
from diffjax.interop.rules import Rule
from diffjax.networks import EDM2UNet

KIND = "Precond"
DEFAULTS = dict(
    img_resolution=None, img_channels=None, label_dim=None, use_fp16=True, sigma_data=0.5, logvar_channels=128,
    model_channels=192, channel_mult=(1, 2, 3, 4), channel_mult_noise=None, channel_mult_emb=None, num_blocks=3,
    attn_resolutions=(16, 8), label_balance=0.5, concat_balance=0.5, resample_filter=(1, 1), channels_per_head=64,
    dropout=0, res_balance=0.3, attn_balance=0.3, clip_act=256,
)  # fmt: skip


def network(config: Config) -> EDM2UNet:
    """The module of a configuration."""
    c = options.read(KIND, config, DEFAULTS)
    for name in ("img_resolution", "img_channels", "label_dim"):
        if isinstance(getattr(c, name), bool) or not isinstance(getattr(c, name), int):
            raise ValueError(
                f"{KIND}: {name} must be an int, and the configuration must have it; got {getattr(c, name)!r}"
            )
    expect(KIND, c, resample_filter=(1, 1))
    if c.res_balance != c.attn_balance:
        raise ValueError(
            f"{KIND}: res_balance={c.res_balance} and attn_balance={c.attn_balance} must be equal: one share has both"
        )
    widths = tuple(c.model_channels * m for m in c.channel_mult)
    attention = tuple(i for i in range(len(widths)) if c.img_resolution >> i in c.attn_resolutions)
    if any(widths[i] < c.channels_per_head for i in (*attention, -1)):
        raise ValueError(
            f"{KIND}: levels of {widths} channels with attention need channels_per_head={c.channels_per_head}"
        )
    return EDM2UNet(
        widths=widths,
        blocks=c.num_blocks,
        attention=attention,
        head_size=c.channels_per_head,
        num_classes=c.label_dim,
        out_channels=c.img_channels,
        residual=float(c.res_balance),
        join=float(c.concat_balance),
        clip=None if c.clip_act is None else float(c.clip_act),
        dropout=float(c.dropout),
        fourier=c.model_channels * c.channel_mult_noise if c.channel_mult_noise else widths[0],
        code=c.model_channels * c.channel_mult_emb if c.channel_mult_emb else max(widths),
        kept_fourier=True,
        zero_label=True,
        label_share=float(c.label_balance),
        middle=True,
        log_variance=c.logvar_channels,
        eps=1e-4,
    )


def config(module: EDM2UNet) -> dict[str, Any]:
    """The arguments of a module, with a nominal resolution.   Raises: ValueError: there are none."""
    base = module.fourier or module.widths[0]
    size = 2 ** max(6, len(module.widths) - 1)
    page = dict(
        img_resolution=size,
        img_channels=module.out_channels,
        label_dim=module.num_classes,
        logvar_channels=module.log_variance,
        model_channels=base,
        channel_mult=[w // base if w % base == 0 else w / base for w in module.widths],
        channel_mult_noise=1,
        channel_mult_emb=(module.code or max(module.widths)) // base,
        num_blocks=module.blocks,
        attn_resolutions=[size >> i for i in module.attention],
        label_balance=module.label_share,
        concat_balance=module.join,
        channels_per_head=module.head_size,
        dropout=module.dropout,
        res_balance=module.residual,
        attn_balance=module.residual,
        clip_act=module.clip,
    )
    made = network(page)
    if made.clone(dtype=module.dtype, remat=module.remat) != module:
        raise ValueError(f"{KIND} cannot express {module}; it would be {made}")
    return page


def rules(module: EDM2UNet, config: Config) -> list[Rule]:
    """The rules of a module; names have the resolution of the level."""
    net, size = module, config["img_resolution"]
    at = lambda way, i, name: f"unet.{way}.{size >> i}x{size >> i}_{name}"
    one = lambda ours, theirs, kind: [Rule(f"{ours}/kernel", (f"{theirs}.weight",), kind)]
    found = one("code/time", "unet.emb_noise", dense) + one("log_variance_out", "logvar_linear", dense)
    for ours, theirs in (("code/fourier", "unet.emb_fourier"), ("log_variance_fourier", "logvar_fourier")):
        found += [
            Rule(f"{ours}/frequencies", (f"{theirs}.freqs",), same),
            Rule(f"{ours}/phases", (f"{theirs}.phases",), same),
        ]
    if net.num_classes:
        found += one("code/label", "unet.emb_label", dense)
    found += one("in", at("enc", 0, "conv"), conv) + one("out", "unet.out_conv", conv)
    found.append(Rule("out_gain/gain", ("unet.out_gain",), same))

    def block(ours: str, theirs: str, width: int, *, skip: bool = False, attends: bool = False) -> list[Rule]:
        rules = one(f"{ours}/conv_in", f"{theirs}.conv_res0", conv) + one(
            f"{ours}/conv_out", f"{theirs}.conv_res1", conv
        )
        rules += one(f"{ours}/film", f"{theirs}.emb_linear", dense)
        rules.append(Rule(f"{ours}/film_gain/gain", (f"{theirs}.emb_gain",), same))
        if skip:
            rules += one(f"{ours}/skip", f"{theirs}.conv_skip", conv)
        if attends:
            kind = interleaved(width // net.head_size, kind_first=True)
            rules += one(f"{ours}/attention/qkv", f"{theirs}.attn_qkv", kind)
            rules += one(f"{ours}/attention/out", f"{theirs}.attn_proj", conv1x1)
        return rules

    before, last, skips = net.widths[0], len(net.widths) - 1, [net.widths[0]]
    for i, width in enumerate(net.widths):
        if i:
            found += block(f"down_{i}_half", at("enc", i, "down"), before)
            skips.append(before)
        for j in range(net.blocks):
            attends = i in net.attention
            found += block(f"down_{i}_{j}", at("enc", i, f"block{j}"), width, skip=before != width, attends=attends)
            before = width
            skips.append(width)
    found += block("middle_0", at("dec", last, "in0"), before, attends=bool(net.middle))
    found += block("middle_1", at("dec", last, "in1"), before)
    for i in range(last, -1, -1):
        if i < last:
            found += block(f"up_{i}_double", at("dec", i, "up"), before)
        for j in range(net.blocks + 1):
            joined, before = before + skips.pop(), net.widths[i]
            skip = joined != before
            found += block(f"up_{i}_{j}", at("dec", i, f"block{j}"), before, skip=skip, attends=i in net.attention)
    return found


def pieces(config: Config) -> Pieces:
    """EDM's preconditioning."""
    return edm_pieces(float(options.read(KIND, config, DEFAULTS).sigma_data))


PEER = Peer(network, config, rules, example, fn=function, by_config=True, pieces=pieces)
