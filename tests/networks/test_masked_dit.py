"""The masked transformer of two views: what its masked branch sees, what it costs, published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_cases import case_of

import diffjax
from diffjax import losses, processes
from diffjax import networks as nw
from diffjax.training.flops import count


@pytest.fixture(scope="module")
def case():
    """2 x 3 patches, of which 4 are kept, with all its parameters."""
    return case_of("masked_dit", auxiliary=True, mask_ratio=0.3, token_size=0, token_parts=None)


def test_with_nothing_masked_the_masked_output_is_the_output():
    """Blocks on shuffled tokens, put back, with positions of their own and added again."""
    c = case_of("masked_dit", auxiliary=True, mask_ratio=1e-17)
    y, aux = jax.jit(c.fn)(c.params, c.x, c.t, c.cond, jax.random.key(3))
    np.testing.assert_allclose(aux["masked"], y, atol=1e-5)


def test_masked_patches_are_not_seen_and_the_source_takes_no_gradient(case):
    c = case

    @jax.jit
    def slopes(key):
        stop = {"aggregate/vector": jax.lax.stop_gradient}  # the other way from the source to the output

        def out(x, image, name):
            y, aux = nw.tapped(c.fn, write=stop)(c.params, x, c.t, {**c.cond, "image": image}, key)
            return jnp.sum(jnp.square(y if name == "y" else aux["masked"]))

        both = jax.grad(out, argnums=(0, 1))
        return both(c.x, c.cond["image"], "masked"), both(c.x, c.cond["image"], "y")

    of_masked, of_whole = slopes(jax.random.key(0))
    patch = lambda g: np.abs(np.asarray(g)).reshape(3, 2, 2, 3, 2, 2).max((2, 4, 5)) > 0
    assert patch(of_masked[0]).sum((1, 2)).tolist() == [4, 4, 4]  # int(6 * 0.7)
    assert patch(of_whole[0]).all() and not np.any(of_masked[1])
    again = patch(slopes(jax.random.key(1))[0][0])
    assert (again != patch(of_masked[0])).any()


def test_the_source_is_read_by_the_masked_branch(case):
    """Beyond the vector, which is held: a changed view changes what is filled in, and not the plain output."""
    c = case
    hold = {"aggregate/vector": lambda v: jnp.ones_like(v)}
    f = jax.jit(
        lambda image: nw.tapped(c.fn, write=hold)(c.params, c.x, c.t, {**c.cond, "image": image}, jax.random.key(0))
    )
    (y, aux), (z, other) = f(c.cond["image"]), f(-c.cond["image"])
    np.testing.assert_array_equal(y, z)
    assert np.abs(aux["masked"] - other["masked"]).max() > 1e-4


def test_a_sampler_pays_for_a_plain_transformer(case):
    plain = nw.DiT(width=32, depth=3, heads=2)
    x, t = jnp.zeros((2, 8, 8, 1)), jnp.zeros(2)

    def cost(net):
        params = jax.eval_shape(net.init, jax.random.key(0), x, t)["params"]
        return count(nw.from_linen(net), params, x, t)

    masked = nw.MaskedDiT(width=32, depth=3, heads=2, auxiliary=True)
    a, b = cost(plain), cost(masked)
    assert a.matmul == b.matmul and b.other - a.other == 2 * 16 * 32  # the positions once more
    c = case
    y, aux = jax.jit(c.fn)(c.params, c.x, c.t, c.cond)
    np.testing.assert_array_equal(y, jax.jit(nw.from_linen(c.net.clone(auxiliary=False)))(c.params, c.x, c.t, c.cond))
    assert aux == {}


def test_both_outputs_are_trained(case):
    """The loss of the two, with a key for each item, and gradients for the parts that only the masked branch has."""
    c = case
    key = lambda: jax.random.key(0)

    def loss(params):
        model = diffjax.denoiser(c.fn, processes.rectified(), diffjax.from_velocity, params, dropout=True, aux=True)
        value, aux = losses.flow_matching(sides=losses.side_outputs(), label_drop=0.0)(
            key(), model, jnp.asarray(c.x), c.cond
        )
        return value.mean(), (value, aux)

    (_, (value, aux)), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(c.params)
    np.testing.assert_allclose(value, aux["mse"] + aux["sides"], rtol=1e-5)
    assert np.abs(aux["mse"] - aux["sides"]).min() > 1e-4
    dead = [jax.tree_util.keystr(p) for p, g in jax.tree_util.tree_leaves_with_path(grad) if not np.any(g)]
    assert not dead, dead


# Millions of parameters, as published; the branch of the masks is not counted in them
PUBLISHED = {"s": 33.5, "b": 131.9, "l": 460.2}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_parameters_are_those_published(name):
    """By hand as well: DiT, two dense layers of tokens and one of all, three sets of pooling weights, seven norms.

    The released code has learned tables of positions and of relative positions too, which the published numbers leave out.
    """
    net = nw.preset(f"x-mdpt-{name}", out_channels=8)
    x = jnp.zeros((1, 32, 32, 4))
    cond = {"image": x, "tokens": jnp.zeros((1, 257, 2304))}
    n = nw.parameter_count(jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(1), cond)["params"])
    d = net.width
    dit = net.depth * (18 * d * d + 15 * d) + 17 * d + 257 * d + d * d + d + 2 * d * d + 2 * d + 32 * d + 32
    assert n == dit + (768 + 1536 + 2) * d + d * d + d + (257 + 257 + 256 + 3) + 6 * 2 * d
    assert round(n / 1e6, 1) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (dict(patch=4), "divisible by patch=4; got a state of shape"),
        (dict(decode=3), r"decode must be in \[0, 2\] and mask_ratio in \(0, 1\); got 3 and 0.3"),
        (dict(mask_ratio=1.0), "got 1 and 1.0"),
        (dict(image_channels=1), "image_channels must be 2 or 0; got 1"),
        (dict(token_size=4, token_parts=(1, 2)), r"token_parts must sum to token_size=4; got \(1, 2\)"),
    ],
)
def test_bad_fields_are_refused(case, fields, match):
    net = case.net.clone(**fields)
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(net.init, jax.random.key(0), case.x, case.t, case.cond)


def test_another_number_of_tokens_than_trained_with_is_refused(case):
    c = case
    cond = {**c.cond, "image": np.zeros((3, 4, 8, 2), np.float32)}
    with pytest.raises(ValueError, match="pool 6 tokens with a weight each; got 8 tokens"):
        jax.eval_shape(c.fn, c.params, np.zeros((3, 4, 8, 2), np.float32), c.t, cond)
