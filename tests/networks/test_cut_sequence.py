"""Networks on a mesh that cuts the tokens of the state, where a block is given others: the same results, or one error."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from network_cases import FIELDS, inputs

from diffjax import networks as nw

SMALL = dict(width=8, depth=2, heads=2, expand=2)
NETS = {
    "dimr, 6 tokens and a label": (
        nw.DiMR(branches=(nw.Branch(8, 1, 2, heads=2), nw.Branch(4, 1, 1)), kernel=3, num_classes=3),
        (4, 6, 2),
    ),
    "masked_dit, 3 of 6 tokens": (
        nw.MaskedDiT(**SMALL, decode=1, mask_ratio=0.5, auxiliary=True, image_channels=2),
        (4, 6, 2),
    ),
    "state_dit, 5 tokens of the condition": (
        nw.StateDiT(**SMALL | {"depth": 1}, encoder=1, mix=nw.Softmax, cross=nw.Softmax, **FIELDS),
        (6, 3),
    ),
    "token_dit, 3 points": (nw.TokenDiT(**SMALL, latents=3, num_classes=3), (6, 3)),
}


@pytest.mark.parametrize("name", NETS)
def test_other_numbers_of_tokens_are_whole(name):
    net, shape = NETS[name]
    x, t, cond = jax.tree.map(lambda a: a[:2], inputs(net, shape))
    params = nw.random_parameters(net, x, t, cond)

    @jax.jit
    def loss(params, x):
        out = net.apply({"params": params}, x, t, cond, train=True, rngs={"dropout": jax.random.key(0)})
        return sum(abs(y).sum() for y in jax.tree.leaves(out)), out

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    want = run(params, x)
    assert len(jax.tree.leaves(want[0][1])) == 1 + name.startswith("masked")
    mesh = jax.make_mesh((2, 2), ("data", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        whole = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        got = run(whole, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "sequence"))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), got, want)


def test_tokens_of_the_state_that_cannot_be_cut_are_refused_before_any_computation():
    net = nw.DiT(width=8, depth=1, heads=2)
    mesh = jax.make_mesh((4,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    x, t, cond = inputs(net, (4, 6, 2))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"6 tokens cannot be cut into 4 parts \(sequence=4\)"):
        jax.eval_shape(nw.from_linen(net), nw.random_parameters(net, x, t, cond), x, t, cond)
