"""Norms of a decoder that read its latent: the equation in NumPy, and that every norm of the decoder is one."""

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.networks import VQAutoencoder
from diffjax.networks.coders import SpatialNorm
from diffjax.training.partial import named


def test_the_norm_is_its_equation():
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(2, 4, 6, 8)).astype("float32"), rng.normal(size=(2, 2, 3, 5)).astype("float32")
    net = SpatialNorm(2, jnp.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, z)["params"]
    p = jax.tree.map(lambda a: rng.normal(size=a.shape).astype("float32"), shapes)
    groups = x.reshape(2, 24, 2, 4)
    mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    normal = ((groups - mean) / np.sqrt(var + 1e-6)).reshape(x.shape) * p["norm"]["scale"] + p["norm"]["bias"]
    side = np.stack([np.kron(plane, np.ones((2, 2, 1))) for plane in z])  # each place as a square
    wanted = (
        normal * (side @ p["scale"]["kernel"] + p["scale"]["bias"]) + side @ p["shift"]["kernel"] + p["shift"]["bias"]
    )
    np.testing.assert_allclose(net.apply({"params": p}, x, z), wanted, rtol=2e-5, atol=2e-5)


def test_all_norms_of_the_decoder_read_the_latent_and_those_of_the_encoder_do_not():
    x = jnp.zeros((1, 8, 8, 3))
    shapes = lambda **fields: dict(
        named(
            jax.eval_shape(VQAutoencoder(widths=(8, 8), attention=(1,), **fields).init, jax.random.key(0), x)["params"]
        )
    )
    plain, spatial = shapes(), shapes(spatial_norm=True)
    norms = [n.rsplit("/", 1)[0] for n in plain if n.endswith("scale") and n.startswith("decoder")]
    assert len(norms) == 2 * 6 + 3 + 1  # six blocks, three attentions, the last
    assert all(spatial[f"{n}/{side}/kernel"].shape == (4, 8) for n in norms for side in ("scale", "shift"))
    own = lambda found: {n: a for n, a in found.items() if not any(n.startswith(f"{norm}/") for norm in norms)}
    assert own(plain) == own(spatial)
