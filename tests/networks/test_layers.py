"""Convolution forms, norms, attention, embeddings, against NumPy and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import networks as nw
from diffjax.networks import convolution, layers
from diffjax.networks.attention import MATMUL_LENGTH, Attention, logits_of, softmax, weighted
from diffjax.networks.dit import patches, unpatches
from diffjax.networks.resample import double, halve, per_axis

normal = lambda *shape, seed=0: np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (5, 3), (2, 4)])
def test_convolution_forms_agree_with_their_gradients(kernel):
    x, k, g = normal(2, 6, 5, 3), normal(*kernel, 3, 4, seed=1), normal(2, 6, 5, 4, seed=2)
    run = lambda form: jax.jit(lambda x, k: (form(x, k), jax.grad(lambda *a: jnp.sum(form(*a) * g), (0, 1))(x, k)))(
        x, k
    )
    for form in (nw.slices, nw.canonical):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), run(nw.native), run(form))


@pytest.mark.parametrize("n, k, s", [((7,), (3,), 2), ((4, 6), (3, 3), (1, 2)), ((2, 4, 3), (1, 3, 2), (1, 2, 1))])
def test_the_canonical_form_has_the_derivatives_of_the_native_one(n, k, s):
    """Reverse, forward over reverse, and under vmap; in a loop its gradients name the axes as the plain convolution."""
    x, kernel = jnp.asarray(normal(2, *n, 3)), jnp.asarray(normal(*k, 3, 4, seed=1))

    def found(form):
        loss = lambda x, kernel: jnp.sum(jnp.sin(form(x, kernel, s, 0)))
        grad = jax.grad(loss, (0, 1))
        each = jax.vmap(lambda x: jax.grad(loss)(x[None], kernel))(x)
        return (
            grad(x, kernel),
            jax.jvp(grad, (x, kernel), (x, kernel)),
            jax.jvp(lambda x: form(x, kernel, s), (x,), (x,)),
            each,
        )

    a, b = (jax.jit(found, static_argnums=0)(form) for form in (nw.native, nw.canonical))
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, atol=2e-5, rtol=1e-4), a, b)
    text = str(jax.make_jaxpr(jax.grad(lambda x, k: jnp.sum(nw.canonical(x, k)), (0, 1)))(x, kernel))
    rank = x.ndim
    plain = f"lhs_spec=(0, {rank - 1}"
    assert text.count("conv_general_dilated[") == text.count(plain) == 3, text


@pytest.mark.parametrize("before", [None, 0])
@pytest.mark.parametrize("n, k, s", [((7,), (3,), 2), ((4, 6), (3, 3), 2), ((2, 4, 3), (1, 3, 2), (1, 2, 1))])
def test_convolutions_of_any_rank_and_stride_equal_a_loop(n, k, s, before):
    x, kernel = normal(2, *n, 3), normal(*k, 3, 4, seed=1)
    strides = per_axis(s, x, "stride")
    lows = [(m - 1) // 2 if before is None else before for m in k]
    big = np.pad(x, [(0, 0), *((low, m) for low, m in zip(lows, k, strict=True)), (0, 0)])
    out = [-(-m // q) for m, q in zip(n, strides, strict=True)]
    want = np.zeros((2, *out, 4), np.float32)
    for at in np.ndindex(*out):
        for by in np.ndindex(*k):
            place = tuple(i * q + j for i, q, j in zip(at, strides, by, strict=True))
            want[(slice(None), *at)] += big[(slice(None), *place)] @ kernel[by]
    for form in (nw.native, nw.slices, nw.canonical):
        np.testing.assert_allclose(form(x, kernel, s, before), want, atol=1e-5)
    with pytest.raises(ValueError, match="stride=.* one number for each axis"):
        nw.slices(x, kernel, (1, 1, 1, 1))


def test_convolution_equals_a_loop():
    x, k = normal(1, 4, 4, 2), normal(3, 3, 2, 3, seed=1)
    p = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    want = [[np.einsum("hwc,hwcd->d", p[0, i : i + 3, j : j + 3], k) for j in range(4)] for i in range(4)]
    np.testing.assert_allclose(nw.slices(x, k)[0], want, atol=1e-5)


def test_both_forms_have_the_same_parameters_and_the_rule_is_the_documented_one():
    x = normal(1, 4, 4, 2)
    trees = [nw.random_parameters(nw.UNet(widths=(4, 8), conv=f), x, 0.5) for f in (nw.native, nw.slices, None)]
    jax.tree.map(np.testing.assert_array_equal, trees[0], trees[1])
    outs = [nw.from_linen(nw.UNet(widths=(4, 8), conv=f)) for f in (nw.native, nw.slices, nw.canonical)]
    a, b, c = (jax.jit(f)(trees[0], x, 0.5) for f in outs)
    np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(a, c, atol=1e-5)
    assert convolution.choose_form("cpu") is nw.canonical
    assert convolution.choose_form("gpu") is convolution.choose_form("tpu") is nw.native
    text = str(jax.make_jaxpr(nw.from_linen(nw.UNet(widths=(4, 8))))(trees[2], x, 0.5))
    assert ("custom_jvp_call" in text) == (jax.default_backend() == "cpu")


def test_norms_against_numpy():
    x = normal(2, 3, 2, 8) + 3
    y = layers.GroupNorm().apply({"params": {"scale": np.full(8, 2.0, "f"), "bias": np.ones(8, "f")}}, x)
    z = x.reshape(2, -1, 2, 4)
    z = (z - z.mean((1, 3), keepdims=True)) / z.std((1, 3), keepdims=True)
    np.testing.assert_allclose(y, 2 * z.reshape(x.shape) + 1, atol=1e-4)
    np.testing.assert_allclose(layers.plain_norm(jnp.asarray(x)).std(-1), 1, atol=1e-4)


def test_halve_undoes_double_and_unpatches_undoes_patches():
    x = jnp.asarray(normal(2, 4, 6, 3))
    np.testing.assert_allclose(halve(double(x)), x, atol=1e-6)
    np.testing.assert_array_equal(double(x)[:, 1::2, ::2], x)
    np.testing.assert_array_equal(unpatches(patches(x, 2), 2, 4, 6), x)
    np.testing.assert_array_equal(patches(x, 2)[0, 1, :3], x[0, 0, 2])


def test_both_attention_forms_equal_numpy():
    for length in (4, MATMUL_LENGTH + 1):
        q, k, v = normal(1, length, 2, 3), normal(1, 5, 2, 3, seed=1), normal(1, 5, 2, 3, seed=2)
        logits = np.einsum("bthd,bshd->bhts", q, k)
        np.testing.assert_allclose(logits_of(jnp.asarray(q), jnp.asarray(k)), logits, atol=1e-5)
        w = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        np.testing.assert_allclose(softmax(jnp.asarray(logits)), w, atol=1e-5)
        y = weighted(jnp.asarray(w), jnp.asarray(v))
        np.testing.assert_allclose(y, np.einsum("bhts,bshd->bthd", w, v), atol=1e-5)


def test_attention_to_nothing_is_exactly_zero_with_finite_gradient():
    net, x, tokens, mask = Attention(2), normal(2, 3, 4), normal(2, 5, 6), np.zeros((2, 5), bool)
    mask[1] = True
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, tokens, mask)
    variables = jax.tree.map(lambda a: normal(*a.shape), shapes)
    y = net.apply(variables, x, tokens, mask)
    np.testing.assert_array_equal(y[0], 0)
    assert np.abs(y[1]).min() > 0
    g = jax.grad(lambda v: net.apply(v, x, tokens, mask).sum())(variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(g))


def test_sinusoids_range_and_errors():
    y = nw.sinusoids(np.array([0.25, 1.0], np.float32), 6, (1.0, 100.0))
    w = np.array([1.0, 10.0, 100.0])
    np.testing.assert_allclose(y[0], [*np.cos(w / 4), *np.sin(w / 4)], atol=1e-5)
    for size, frequencies in ((3, (1.0, 2.0)), (0, (1.0, 2.0)), (4, (2.0, 1.0)), (4, (0.0, 1.0))):
        with pytest.raises(ValueError, match="size of time|frequencies"):
            nw.sinusoids(0.5, size, frequencies)


def test_positions_tell_all_places_apart():
    p = nw.grid_positions(4, 5, 16)
    distance = np.linalg.norm(p[:, None] - p[None], axis=-1) + 9 * np.eye(20)
    assert distance.min() > 0.1


def test_labels_out_of_range_are_nan_under_jit_and_refused_outside():
    table = {"params": {"table": np.ones((4, 2), np.float32)}}
    rows = jax.jit(nw.LabelEmbedding(3, 2).apply)(table, np.array([0, 3, 4, -1], np.int32))
    np.testing.assert_array_equal(np.isnan(rows[:, 0]), [False, False, True, True])
    for bad in ([0, 4], [-1, 0]):
        with pytest.raises(ValueError, match=r"\[0, 3\]"):
            nw.read_condition(np.array(bad), np.zeros((2, 1)), num_classes=3)


def test_malformed_conditions_are_refused():
    x = np.zeros((2, 4, 4, 1), np.float32)
    tokens = np.zeros((2, 3, 5), np.float32)
    sizes = dict(num_classes=3)
    for cond, options, match in (
        ("seven", sizes, "cond must be None"),
        (np.zeros(2, np.float32), sizes, "float32 array"),
        ({"class": np.zeros(2, int)}, sizes, "'class' is not|not a kind"),
        (np.zeros(3, int), sizes, "integers .2."),
        (np.zeros((2, 1), int), sizes, "integers .2."),
        (None, sizes, "needs cond.'label'"),
        ({"label": np.zeros(2, int), "mask": np.ones((2, 3), bool)}, sizes, "no 'tokens'"),
        ({"vector": np.zeros((2, 4), np.float32)}, dict(vector_size=3), "vector.*3"),
        ({"tokens": tokens[0]}, dict(token_size=5), "tokens"),
        ({"tokens": tokens}, dict(token_size=4), "tokens"),
        ({"tokens": tokens, "mask": np.ones((2, 3))}, dict(token_size=5), "mask.*bool"),
        ({"tokens": tokens, "mask": np.ones((2, 2), bool)}, dict(token_size=5), "mask.*bool"),
        ({"image": np.zeros((2, 4, 5, 1), np.float32)}, dict(image_channels=1), "image"),
        ({"image": np.zeros((2, 4, 4, 3), np.float32)}, dict(image_channels=1), "image"),
    ):
        with pytest.raises(ValueError, match=match):
            nw.read_condition(cond, x, **options)


def test_null_condition_of_each_kind():
    assert nw.null_condition() is None
    assert nw.null_condition(num_classes=4).shape == ()
    null = nw.null_condition(num_classes=4, vector_size=2, token_size=3, token_length=5, image_shape=(4, 4, 1))
    shapes = {k: v.shape for k, v in null.items()}
    assert shapes == {"label": (), "vector": (2,), "tokens": (5, 3), "mask": (5,), "image": (4, 4, 1)}
