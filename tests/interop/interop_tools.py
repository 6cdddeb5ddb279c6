"""A tiny autoencoder with random weights in a folder, as another library would have written it."""

import functools
import json

import jax
import numpy as np

from diffjax import interop, networks
from diffjax.interop import pretrained, rules

CONFIG = dict(
    _class_name="AutoencoderKL", _diffusers_version="0.20.0", block_out_channels=[4, 4], norm_num_groups=2,
    down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=2,
)  # fmt: skip


@functools.cache
def arrays():
    """Their tensors by name."""
    peer = interop.CLASSES["AutoencoderKL"]
    module = peer.network(CONFIG)
    rng = np.random.default_rng(0)
    shapes = rules.shapes_of(peer.rules(module), pretrained.template_of(peer, module, CONFIG))
    return {name: rng.standard_normal(shape).astype("float32") for name, shape in shapes.items()}


def folder_of(path, config=CONFIG, tensors=None, **options):
    """A folder with these tensors and this configuration."""
    path.mkdir(parents=True, exist_ok=True)
    interop.write_folder(path, arrays() if tensors is None else tensors, {"format": "pt"}, **options)
    (path / "config.json").write_text(json.dumps(config))
    return path


def random_like(tree, seed=0):
    """Random numbers in the shapes of a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.standard_normal(a.shape).astype("float32"), tree)


def parameters(module, channels=3, side=8):
    """Random parameters of an autoencoder."""
    x = jax.ShapeDtypeStruct((1, side, side, channels), np.float32)
    return random_like(jax.eval_shape(networks.autoencoder(module).module.init, jax.random.key(0), x)["params"])


def equal(a, b):
    """Equal names, types and bits."""
    return set(a) == set(b) and all(
        np.asarray(a[n]).dtype == np.asarray(b[n]).dtype and np.asarray(a[n]).tobytes() == np.asarray(b[n]).tobytes()
        for n in a
    )
