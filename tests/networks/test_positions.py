"""Positions as values: rotary pairs against a loop, logits by difference, tables cropped, stretched and learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import networks as nw
from diffjax.networks.attention import logits_of
from diffjax.networks.positions import coordinates

RNG = np.random.default_rng(0)
normal = lambda *s: RNG.standard_normal(s).astype(np.float32)
X, T = normal(2, 4, 6, 3), np.array([0.2, 0.7], np.float32)


def textbook_rope(x, height, width, period, left_over):
    """Every pair of features of every head as a complex number, turned by one angle."""
    y = x.copy().astype(np.float64)
    size = x.shape[-1]
    n = (size - left_over) // 2  # features of each axis
    for token in range(height * width):
        for axis, place in enumerate((token // width, token % width)):
            for i in range(n // 2):
                j = left_over + axis * n + 2 * i
                turn = np.exp(1j * place / period ** (2 * i / n))
                z = (x[:, token, :, j] + 1j * x[:, token, :, j + 1]) * turn
                y[:, token, :, j], y[:, token, :, j + 1] = z.real, z.imag
    return y


@pytest.mark.parametrize("left_over", [0, 4])
def test_rope_turns_pairs_as_in_the_textbook(left_over):
    x = normal(2, 6, 3, 12)
    rope = nw.Rope(period=50.0) if not left_over else nw.Rope((4, 4), period=50.0)
    got = nw.rotate(x, rope(2, 3, 12))
    np.testing.assert_allclose(got, textbook_rope(x, 2, 3, 50.0, left_over), atol=1e-6)
    assert nw.rotate(x.astype(jnp.bfloat16), rope(2, 3, 12)).dtype == jnp.bfloat16


def test_rope_makes_logits_depend_on_differences_alone():
    """One query and one key for all places: the logits of two pairs of places with equal difference are equal."""
    q, k = (np.broadcast_to(normal(1, 1, 2, 8), (1, 20, 2, 8)) for _ in range(2))
    angles = nw.Rope()(4, 5, 8)
    logits = np.asarray(logits_of(nw.rotate(q, angles), nw.rotate(k, angles)))[0].reshape(2, 4, 5, 4, 5)
    seen = {}
    for r, c, s, d in np.ndindex(4, 5, 4, 5):
        seen.setdefault((s - r, d - c), []).append(logits[:, r, c, s, d])
    assert max(np.ptp(v, axis=0).max() for v in seen.values()) < 1e-5
    assert np.std([v[0] for v in seen.values()], axis=0).min() > 0.1  # and they do differ otherwise
    length = np.linalg.norm
    np.testing.assert_allclose(length(nw.rotate(q, angles), axis=-1), length(q, axis=-1), rtol=1e-5)


def test_rope_alone_tells_no_absolute_place():
    """Without added positions and with rope, equal patches everywhere give equal outputs; added positions break this."""
    x = np.broadcast_to(normal(1, 2, 2, 3), (1, 2, 2, 3))
    x = np.tile(x, (1, 3, 4, 1))
    spread = {}
    for name, fields in {"rope": dict(positions=None, rope=nw.Rope()), "added": {}}.items():
        net = nw.DiT(width=8, depth=1, heads=2, expand=1, **fields)
        y = np.asarray(jax.jit(nw.from_linen(net))(nw.random_parameters(net, x, T[:1]), x, T[:1], None))
        spread[name] = np.ptp(y.reshape(3, 2, 4, 2, 3), axis=(0, 2)).max()
    assert spread["rope"] < 1e-5 < 1e-2 < spread["added"]


def test_rope_reaches_the_queries_of_a_dit():
    """A DiT whose q and k are turned from outside, through its taps, is the DiT with rope."""
    nets = [nw.DiT(width=8, depth=2, heads=2, expand=1, scan_layers=True, rope=r) for r in (None, nw.Rope())]
    params = nw.random_parameters(nets[0], X, T)
    turn = lambda a: nw.rotate(a, nw.Rope()(2, 3, 4))
    write = {f"blocks/attention/{n}": turn for n in "qk"}
    outside = jax.jit(nw.tapped(nw.from_linen(nets[0]), write=write))(params, X, T, None)
    np.testing.assert_allclose(jax.jit(nw.from_linen(nets[1]))(params, X, T, None), outside, atol=1e-6)


def test_sincos_is_the_default_and_scales_crops_and_stretches():
    base = nw.grid_positions(6, 8, 16)
    np.testing.assert_array_equal(nw.Sincos()(6, 8, 16), base)
    cropped = nw.Sincos(crop=8)(6, 4, 16).reshape(6, 4, 16)
    np.testing.assert_array_equal(cropped, nw.grid_positions(8, 8, 16).reshape(8, 8, 16)[1:7, 2:6])
    halves = nw.Sincos(fit=(3, 4))(6, 8, 16).reshape(6, 8, 16)
    np.testing.assert_allclose(halves[::2, ::2], nw.grid_positions(3, 4, 16).reshape(3, 4, 16), atol=1e-6)
    np.testing.assert_allclose(
        nw.Sincos(scale=2.0)(3, 4, 16), base.reshape(6, 8, 16)[::2, ::2].reshape(12, 16), atol=1e-6
    )
    swapped = nw.Sincos(columns_first=True)(6, 8, 16)
    np.testing.assert_array_equal(swapped, np.roll(base, 8, axis=1))
    np.testing.assert_allclose(nw.Rope(fit=(3, 4))(6, 8, 8), nw.Rope()(6, 8, 8) / 2, rtol=1e-6)
    assert coordinates(2, 2, (6, 4))[0].tolist() == [0, 0, 3, 3]


def test_sd3_positions_are_those_of_a_loop():
    """Row i and column j of a grid of 3 x 2 in the middle of 192, in steps of a third, columns first."""
    got = nw.PRESETS["sd3-medium"][1]["positions"](3, 2, 8)
    for i, j in np.ndindex(3, 2):
        row, column = ((192 - 3) // 2 + i) / 3, ((192 - 2) // 2 + j) / 3
        w = np.array([1.0, 0.01])
        want = [*np.sin(w * column), *np.cos(w * column), *np.sin(w * row), *np.cos(w * row)]
        np.testing.assert_allclose(got[2 * i + j], want, atol=1e-6)


def test_learned_positions_are_parameters_and_are_interpolated():
    net = nw.DiT(width=8, depth=1, heads=2, expand=1, positions=nw.Learned(2, 3, resize=True))
    params = nw.random_parameters(net, X, T)
    table = params["positions"]["table"]
    assert table.shape == (6, 8)
    big = np.zeros((1, 8, 12, 3), np.float32)
    flat = params | {"positions": {"table": np.broadcast_to(table[:1], table.shape)}}
    plain = nw.DiT(width=8, depth=1, heads=2, expand=1, positions=None)
    without = jax.jit(nw.from_linen(plain))({k: v for k, v in flat.items() if k != "positions"}, big, T[:1], None)
    y = jax.jit(nw.from_linen(net))(flat, big, T[:1], None)
    assert np.ptp(np.asarray(y)[0, ::2, ::2], axis=(0, 1)).max() < 1e-5  # a constant table is constant at every size
    assert np.abs(y - without).max() > 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nw.Sincos(crop=4)(5, 2, 8), "cut from a grid of 4 x 4 patches; got 5 x 2.*larger crop"),
        (lambda: nw.Learned(2, 2)(2, 3, 8), r"for 2 x 2 patches; got 2 x 3.*resize=True"),
        (lambda: nw.Rope()(2, 2, 6), "multiple of 4 features; got heads of 6"),
        (lambda: nw.Rope((3, 2))(2, 2, 8), "must be even and at most 8"),
        (lambda: nw.Rope((6, 4))(2, 2, 8), r"at most 8 in all.*got \(6, 4\)"),
        (lambda: nw.Sincos()(2, 2, 6), "multiple of 4; got 6"),
    ],
)
def test_bad_positions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
