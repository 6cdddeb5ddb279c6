"""EDM and EDM2: presets as their configurations, solvers without scheduler, options that have no counterpart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import interop, networks
from diffjax.interop import edm, edm2
from diffjax.interop.rules import shapes_of
from experiments.interop.goldens import FOLDER

CIFAR = dict(img_resolution=32, img_channels=3, model_type="SongUNet", channel_mult=[2, 2, 2], dropout=0.13)
PUBLISHED = {
    # arXiv:2206.00364: about 56 million parameters for CIFAR-10, 296 for ImageNet-64; arXiv:2312.02696, Table 2
    "ddpm++-edm": ("EDMPrecond", CIFAR, 55.7),
    "ncsn++-edm": (
        "EDMPrecond",
        CIFAR
        | dict(embedding_type="fourier", channel_mult_noise=2, encoder_type="residual", resample_filter=[1, 3, 3, 1]),
        56.5,
    ),
    "adm-64": ("EDMPrecond", dict(img_resolution=64, img_channels=3, label_dim=1000, model_type="DhariwalUNet"), 295.9),
    "edm2-xs": ("Precond", dict(img_resolution=64, img_channels=4, label_dim=1000, model_channels=128), 124.7),
    "edm2-s": ("Precond", dict(img_resolution=64, img_channels=4, label_dim=1000), 280.2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    kind, config, millions = PUBLISHED[name]
    peer = interop.CLASSES[kind]
    net, preset = peer.network(config), networks.preset(name)
    assert net.widths == preset.widths and net.blocks == preset.blocks and net.attention == preset.attention
    template = jax.eval_shape(net.init, jax.random.key(0), *peer.example(net, config))["params"]
    assert sum(a.size for a in jax.tree.leaves(template)) / 1e6 == pytest.approx(millions, abs=0.3)
    shapes_of(peer.table(net, config), template)  # every parameter has its tensors, and no other


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["EDMPrecond", "VPPrecond", "VEPrecond", "Precond"])
def test_denoisers_need_no_scheduler(kind):
    model = interop.load_pretrained(FOLDER / ("Precond-edm2-plain" if kind == "Precond" else "EDMPrecond-ncsnpp"))
    if kind in ("VPPrecond", "VEPrecond"):  # the same network with another preconditioning
        config = {"_class_name": kind, **edm.config(kind, model.module), "img_resolution": 8, "attn_resolutions": [4]}
        model = interop.Pretrained(kind, model.module, model.params, config)
    d, s = model.denoiser(), model.schedule()
    p = d(jnp.ones((2, 8, 8, 3)), jnp.array([0.2, 0.9]))
    alpha, sigma = (f(jnp.array([0.2, 0.9])).reshape(-1, 1, 1, 1) for f in (s.process.alpha, s.process.sigma))
    np.testing.assert_allclose(alpha * p.x0 + sigma * p.eps, 1.0, rtol=1e-4, atol=1e-4)
    assert s.solver(3).evaluations == (6 if kind == "VEPrecond" else 5)  # Heun; a step to sigma = 0 is first order


def test_samples_of_a_class_and_of_none():
    model = interop.load_pretrained(FOLDER / "Precond-edm2")
    d, s = model.denoiser(), model.schedule()
    x = s.process.prior(jax.random.key(0), (2, 8, 8, 3))
    run = jax.jit(diffjax.sample)
    free, bound = (run(jax.random.key(1), d.bind(c), s.solver(2), x) for c in (None, jnp.array([5, 1])))
    np.testing.assert_allclose(free[0], bound[0], rtol=1e-5, atol=1e-5)  # label_dim is no label
    assert float(jnp.abs(free[1] - bound[1]).max()) > 1e-3


def test_weights_are_normalised_where_they_are_used():
    model = interop.load_pretrained(FOLDER / "Precond-edm2-plain")
    x, t = jnp.ones((1, 8, 8, 3)), jnp.array([0.1])
    larger = jax.tree_util.tree_map_with_path(lambda path, a: 1e3 * a if path[-1].key == "kernel" else a, model.params)
    y, z = (model.fn(params, x, t) for params in (model.params, larger))
    assert float(jnp.abs(z - y).max()) < 2e-2 * float(jnp.abs(y).max())  # but for the 1e-4 beside the norms


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("EDMPrecond", dict(model_type="iUNet"), "model_type='iUNet' has no counterpart here; accepted is 'SongUNet'"),
        (
            "EDMPrecond",
            dict(img_resolution=None),
            "img_resolution must be an int >= 1, and the configuration must have it",
        ),
        (
            "EDMPrecond",
            dict(CIFAR, encoder_type="residual"),
            r"encoder_type='residual' needs resample_filter=\[1, 3, 3, 1\]",
        ),
        ("EDMPrecond", dict(CIFAR, resample_filter=[1, 2, 1]), r"resample_filter=\(1, 2, 1\) has no counterpart"),
        ("EDMPrecond", dict(CIFAR, C_1=0.001), "EDMPrecond has no field C_1=0.001"),
        ("EDMPrecond", dict(img_resolution=8, img_channels=3, model_channels=32), "with attention need at least 64"),
        (
            "Precond",
            dict(img_channels=3, label_dim=0),
            "img_resolution must be an int, and the configuration must have it",
        ),
        (
            "Precond",
            dict(PUBLISHED["edm2-s"][1], resample_filter=[1, 3, 3, 1]),
            r"resample_filter=\(1, 3, 3, 1\) has no",
        ),
        (
            "Precond",
            dict(PUBLISHED["edm2-s"][1], res_balance=0.5),
            "res_balance=0.5 and attn_balance=0.3 must be equal",
        ),
        ("Precond", dict(PUBLISHED["edm2-s"][1], model_channels=8), "with attention need channels_per_head=64"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(kind, config, message):
    with pytest.raises(ValueError, match=message):
        interop.CLASSES[kind].network(config)


def test_networks_that_edm_cannot_express():
    with pytest.raises(ValueError, match="EDMPrecond cannot express this UNet"):
        edm.config("EDMPrecond", edm.network("EDMPrecond", CIFAR).clone(late=False))
    with pytest.raises(ValueError, match="Precond cannot express"):
        edm2.config(edm2.network(PUBLISHED["edm2-s"][1]).clone(eps=0.0))
