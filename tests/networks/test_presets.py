"""Published networks have the published numbers of parameters."""

import jax
import jax.numpy as jnp
import pytest

from diffjax import networks as nw
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


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown network 'dit-xll'.*Did you mean dit-xl"):
        nw.preset("dit-xll")
