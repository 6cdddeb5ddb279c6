"""Published networks have the published numbers of parameters."""

import jax
import jax.numpy as jnp
import pytest

from diffjax import networks as nw
from diffjax.networks import magnitude
from diffjax.training import flops

# Millions of parameters of the four sizes with patches of 2, for 32 x 32 x 4 latents, 1000 classes and learned variances:
# arXiv:2212.09748. The fixed table of positions is no parameter.
PUBLISHED = {"dit-s/2": 33, "dit-b/2": 130, "dit-l/2": 458, "dit-xl/2": 675}


def count(name):
    net = nw.preset(name, num_classes=1000, out_channels=8, scan_layers=True)
    x, t, label = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    return nw.parameter_count(jax.eval_shape(net.init, jax.random.key(0), x, t, label)["params"])


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_parameters_are_those_published(name):
    assert round(count(name) / 1e6) == PUBLISHED[name]


def test_dit_xl_2_to_the_last_parameter():
    """By hand: patches, time, labels, 28 blocks, last layer. With its positions the released network has 675,129,632."""
    d, out = 1152, 2 * 2 * 8
    block = 4 * d * d + 4 * d + 8 * d * d + 5 * d + 6 * d * d + 6 * d
    rest = 16 * d + d + 256 * d + d + d * d + d + 1001 * d + d * out + out + 2 * d * d + 2 * d
    n = count("dit-xl/2")
    assert n == 28 * block + rest == 675_129_632 - 256 * d


# Parameters to the last one and, where published, multiply-adds in 10^9 with convolutions that multiply their padding.
# name: size, channels, fields, parameters, multiply-adds.
# Released weights: ddpm-32 of google/ddpm-cifar10-32, ddpm-256 of google/ddpm-celebahq-256; ddpm++ and ncsn++ of
# arXiv:2011.13456 (the fixed frequencies of the time, 128 numbers, are no parameters); adm-256 of guided-diffusion (its
# network without labels has 552,814,086: 1000 rows of 1024 fewer; ours has one more row, of "no label"); sd-1, sd-2 and sdxl
# of Stable Diffusion 1.x, 2.x and XL. The printed figures in millions: adm-64, -128 and -512 296, 422 and 559
# (arXiv:2105.05233, Table 11) and 312 and 309 (Table 13), ldm-4 and -8 400 and 395 and ldm-4-ffhq 274 (arXiv:2112.10752,
# appendix E).
# Multiply-adds: arXiv:2212.09748, section 5.1 (ADM-U is adm-64 and adm-64-256, or adm-128 and adm-128-512).
LABELS = dict(num_classes=1000, out_channels=6)
UNETS = {
    "ddpm-32": (32, 3, {}, 35_746_307, None),
    "ddpm-64": (64, 3, {}, 78_700_803, None),
    "ddpm-256": (256, 3, {}, 113_673_219, None),
    "ddpm++": (32, 3, {}, 61_804_419, None),
    "ddpm++-edm": (32, 3, {}, 55_732_739, None),
    "ncsn++": (32, 3, {}, 62_758_787, None),
    "ncsn++-edm": (32, 3, {}, 56_395_523, None),
    "ncsn++-256": (256, 3, {}, 65_574_421, None),
    "iddpm-32": (32, 3, dict(out_channels=6), 52_546_438, None),
    "iddpm-64-64": (64, 3, dict(out_channels=6), 30_303_494, None),
    "iddpm-64-96": (64, 3, dict(out_channels=6), 68_126_598, None),
    "iddpm-64-128": (64, 3, dict(out_channels=6), 121_063_942, None),
    "iddpm-64-192": (64, 3, dict(out_channels=6), 272_281_350, None),
    "adm-64": (64, 3, LABELS, 295_904_454 + 768, None),
    "adm-128": (128, 3, LABELS, 421_529_606 + 1024, None),
    "adm-256": (256, 3, LABELS, 552_814_086 + 1001 * 1024, 1120),
    "adm-512": (512, 3, LABELS, 558_997_638 + 1024, 1983),
    "adm-64-256": (256, 3, LABELS, 311_795_910 + 768, 742 - 109.7),
    "adm-128-512": (512, 3, LABELS, 308_835_270 + 768, 2813 - 306.9),
    "ldm-4": (64, 3, {}, 400_920_579, 103.6),
    "ldm-8": (32, 4, {}, 394_984_196, None),
    "ldm-4-ffhq": (64, 3, {}, 274_056_163, None),
    "sd-1": (64, 4, {}, 859_520_964, None),
    "sd-2": (96, 4, {}, 865_910_724, None),
    "sdxl": (128, 4, {}, 2_567_463_684, None),
}
QUICK = {"ddpm-32", "ncsn++", "adm-256", "sd-1"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in UNETS])
def test_published_unets(name):
    size, channels, fields, parameters, multiply_adds = UNETS[name]
    net = nw.preset(name, conv=nw.slices, **fields)
    one = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    x, t = one(size, size, channels), one()
    cond = {"label": jnp.zeros(1, jnp.int32)} if net.num_classes else {}
    kinds = {"vector": (net.vector_size,), "tokens": (1, net.token_size), "image": (size, size, net.image_channels)}
    cond |= {kind: one(*shape) for kind, shape in kinds.items() if shape[-1]}
    mask = {"mask": jnp.ones((1, 1), bool)} if net.token_size else {}
    variables = jax.eval_shape(lambda c: net.init(jax.random.key(0), jnp.zeros(x.shape), jnp.zeros(1), c | mask), cond)
    assert nw.parameter_count(variables) == parameters
    if multiply_adds:
        f = lambda v, x, t, c: net.apply(v, x, t, c | mask)
        assert flops.count(f, variables, x, t, cond).matmul / 2e9 == pytest.approx(multiply_adds, rel=0.007)


def test_every_unet_preset_is_counted():
    assert set(UNETS) == {name for name, (make, _) in nw.PRESETS.items() if make is nw.UNet}


# Millions of parameters: arXiv:2209.12152, Table 1; shapes and classes of its released configurations.
UVIT = {
    "uvit-s/2": (44, (32, 32, 3), 0, 0),
    "uvit-s-deep/2": (58, (32, 32, 4), 0, 768),
    "uvit-m/4": (131, (64, 64, 3), 1000, 0),
    "uvit-l/2": (287, (32, 32, 4), 1000, 0),
    "uvit-h/2": (501, (32, 32, 4), 1000, 0),
}


def shapes(name, shape, **fields):
    net = nw.preset(name, **fields)
    sizes = {"tokens": (1, 77, getattr(net, "token_size", 0)), "vector": (1, net.vector_size)}
    cond = {k: jnp.zeros(s) for k, s in sizes.items() if s[-1]}
    cond |= {"label": jnp.zeros(1, jnp.int32)} if net.num_classes else {}
    args = jnp.zeros((1, *shape)), jnp.zeros(1), cond
    return net, jax.eval_shape(net.init, jax.random.key(0), *args)["params"], args


@pytest.mark.parametrize("name", list(UVIT))
def test_uvit_parameters_are_those_published(name):
    millions, shape, num_classes, token_size = UVIT[name]
    _, params, _ = shapes(name, shape, num_classes=num_classes, token_size=token_size)
    assert round(nw.parameter_count(params) / 1e6) == millions


# Millions of parameters and billions of multiply-adds of a forward pass: arXiv:2401.11605, Tables 7 and 8.
HDIT = {
    "hdit-s/16": (116, 29),
    "hdit-m/16": (267, 68),
    "hdit-l/16": (507, 129),
    "hdit-s/8": (134, 44),
    "hdit-m/8": (294, 91),
    "hdit-l/8": (547, 163),
    "hdit-s/4": (139, 60),
    "hdit-m/4": (302, 115),
    "hdit-l/4": (557, 198),
    "hdit-ffhq-1024": (85, 206),
}


@pytest.mark.parametrize("name", list(HDIT))
def test_hdit_parameters_and_operations_are_those_published(name):
    millions, operations = HDIT[name]
    side, num_classes = (1024, 0) if "ffhq" in name else (256, 1000)
    net, params, args = shapes(name, (side, side, 3), num_classes=num_classes)
    assert round(nw.parameter_count(params) / 1e6) == millions
    counted = flops.count(net.apply, {"params": params}, *args).matmul / 2e9
    # a tile of queries is multiplied with the keys of all its windows, 14 x 14 where a window has 7 x 7
    assert operations - 0.5 < counted < operations * 1.09


def test_uvit_s_2_to_the_last_parameter_and_operation():
    """By hand: 13 blocks without bias of q, k, v; 6 joins; 257 learned positions; the end. Multiply-adds of matrices alone."""
    d, n = 512, 257
    block = 3 * d * d + d * d + d + 8 * d * d + 5 * d + 4 * d
    rest = 6 * (2 * d * d + d) + 12 * d + d + n * d + 2 * d + 12 * d + 12 + 84
    net, params, args = shapes("uvit-s/2", (32, 32, 3))
    assert nw.parameter_count(params) == 13 * block + rest == 44_255_328
    work = flops.count(lambda p, x, t, c: net.apply({"params": p}, x, t, c), params, *args)
    tokens = n * (13 * (12 * d * d + 2 * n * d) + 6 * 2 * d * d)
    assert abs((work.matmul + work.conv) / 2 - tokens - 2 * 256 * 12 * d - 32 * 32 * 81) < 0.001 * tokens


# To the last parameter: of the released networks, whose table of positions is fixed and no parameter. FLUX.1-dev:
# 11,901,408,320 and stable-diffusion-3-medium: 2,028,328,000 are the sizes of their files; 3.5 and schnell by hand.
RELEASED = {
    "sd3-medium": (16, 2_028_328_000),
    "sd3.5-medium": (16, 2_243_171_520),
    "sd3.5-large": (16, 8_056_627_520),
    "flux-dev": (16, 11_901_408_320),
    "flux-schnell": (16, 11_901_408_320 - 256 * 3072 - 3072 - 3072 * 3072 - 3072),  # no code of a guidance weight
}


@pytest.mark.parametrize("name", list(RELEASED))
def test_mmdit_parameters_are_those_released(name):
    channels, want = RELEASED[name]
    assert nw.parameter_count(shapes(name, (32, 32, channels), scan_layers=True)[1]) == want


@pytest.mark.parametrize("d", [15, 18, 21, 30, 38])
def test_mmdit_by_depth_by_hand(d):
    """Width 64 d. All blocks but the last have two streams of 18 w^2 + 15 w; its text has a norm, q, k and v."""
    w = 64 * d
    block, text = 18 * w * w + 15 * w, 5 * w * w + 5 * w
    code = 256 * w + w + w * w + w + 2048 * w + w + w * w + w
    ends = 64 * w + w + 4096 * w + w + 2 * w * w + 2 * w + 64 * w + 64
    n = nw.parameter_count(shapes(f"mmdit-{d}", (32, 32, 16), scan_layers=True)[1])
    assert n == (2 * d - 1) * block + text + code + ends
    if d == 38:
        assert round(n / 1e9) == 8  # arXiv:2403.03206: 8 billion


def test_sit_has_the_networks_of_dit():
    """arXiv:2401.08740, Table 1: 33, 130, 458 and 675 million."""
    for size in ("s", "b", "l", "xl"):
        assert nw.preset(f"sit-{size}/2") == nw.preset(f"dit-{size}/2")


# Millions of parameters and "gigaflops" for 64 x 64 x 4 latents and 1000 classes: arXiv:2312.02696, Table 2. There a
# multiplication with its addition counts as one, with the zeros around a picture too, and so does every other operation.
EDM2 = {"xs": (125, 46), "s": (280, 102), "m": (498, 181), "l": (777, 282), "xl": (1119, 406), "xxl": (1523, 552)}


@pytest.mark.parametrize("name", list(EDM2))
def test_edm2_has_the_published_parameters_and_operations(name, monkeypatch):
    monkeypatch.setattr(magnitude, "choose_form", lambda backend: nw.slices)  # products, those with zeros included
    net = nw.preset(f"edm2-{name}", num_classes=1000)
    x, t, label = jnp.zeros((1, 64, 64, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), x, t, label)["params"]
    counted = flops.count(nw.from_linen(net), params, x, t, label)
    found = nw.parameter_count(params) / 1e6, ((counted.matmul + counted.conv) / 2 + counted.other) / 1e9
    assert found == pytest.approx(EDM2[name], abs=0.505)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown network 'dit-xll'.*Did you mean dit-xl"):
        nw.preset("dit-xll")
