"""Recurrences against textbook loops, their parallel forms, and the published sizes of the layers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_cases import inputs

from diffjax import networks as nw
from diffjax.networks import rwkv, s4

DELTA = dict(B=2, T=21, H=2, D=4)


def delta_inputs(b, t, h, d, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda: rng.standard_normal((b, t, h, d)).astype(np.float32)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    direction = normal()
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    log_w = -np.exp(-0.5) * sigmoid(3 * normal())
    return normal(), log_w, normal(), normal(), -direction, direction * sigmoid(normal())


def test_the_delta_rule_is_its_textbook_loop_in_both_forms():
    args = delta_inputs(2, 21, 2, 4)
    start = np.random.default_rng(1).standard_normal((2, 2, 4, 4)).astype(np.float32)
    want = np.zeros_like(args[0])
    state = start.astype(np.float64)
    for t in range(21):
        for i in np.ndindex(2, 2):
            r, log_w, k, v, z, b = (a[i[0], t, i[1]].astype(np.float64) for a in args)
            state[i] = state[i] @ (np.diag(np.exp(log_w)) + np.outer(z, b)) + np.outer(v, k)
            want[i[0], t, i[1]] = r @ state[i].T

    @jax.jit
    def both(args, start):
        outs = [nw.delta_scan(*args, start)] + [nw.delta_chunked(*args, start, chunk=c) for c in (8, 32)]
        first = nw.delta_chunked(*(a[:, :9] for a in args), start, chunk=8)  # in two parts: the state is all there is
        rest = nw.delta_chunked(*(a[:, 9:] for a in args), first[1], chunk=8)
        return [*outs, (jnp.concatenate([first[0], rest[0]], axis=1), rest[1])]

    for out, end in both(args, start):
        np.testing.assert_allclose(out, want, atol=1e-4)
        np.testing.assert_allclose(end, state, atol=1e-4)


def test_gradients_of_both_forms_agree():
    args = delta_inputs(1, 20, 1, 4, seed=2)
    slope = lambda form: jax.grad(lambda a: jnp.sum(jnp.sin(form(*a)[0])))
    a, b = jax.jit(lambda args: (slope(nw.delta_scan)(args), slope(nw.delta_chunked)(args)))(args)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * float(np.abs(x).max()))


def test_the_selective_scan_is_its_textbook_loop_in_both_forms():
    rng = np.random.default_rng(0)
    x, b, c = (rng.standard_normal((2, 21, n)).astype(np.float32) for n in (3, 4, 4))
    step, a = rng.uniform(0.01, 1, (2, 21, 3)).astype(np.float32), -rng.uniform(0.5, 4, (3, 4)).astype(np.float32)
    start = rng.standard_normal((2, 3, 4)).astype(np.float32)
    h, want = start.astype(np.float64), np.zeros((2, 21, 3))
    for t in range(21):
        for i, d in np.ndindex(2, 3):
            h[i, d] = np.exp(step[i, t, d] * a[d]) * h[i, d] + step[i, t, d] * x[i, t, d] * b[i, t]
            want[i, t, d] = h[i, d] @ c[i, t]
    forms = (nw.selective_scan, nw.selective_chunked)
    for y, end in jax.jit(lambda *args: [f(*args) for f in forms])(x, step, a, b, c, start):
        np.testing.assert_allclose(y, want, atol=1e-4)
        np.testing.assert_allclose(end, h, atol=1e-4)


def test_the_long_convolution_is_the_recurrence_and_the_differential_equation():
    rng = np.random.default_rng(0)
    d, n, length = 2, 3, 17
    u = rng.standard_normal((1, length, d)).astype(np.float32)
    a = (-rng.uniform(0.2, 2, (d, n)) + 1j * rng.uniform(0, 5, (d, n))).astype(np.complex64)
    c = (rng.standard_normal((d, n)) + 1j * rng.standard_normal((d, n))).astype(np.complex64)
    step = np.array([0.1, 0.3], np.float32)

    @jax.jit
    def both(u, a, c, step):
        p, q = s4.discretised(a, c, step)
        return s4.long_convolution(u, s4.kernel_of(p, q, length)), s4.diagonal_scan(u, p, q)[0]

    fast, slow = both(u, a, c, step)
    np.testing.assert_allclose(fast, slow, atol=1e-4)
    h, fine = (
        np.zeros((d, n), complex),
        2000,
    )  # h' = a h + u, by many small midpoint steps, u constant in each of its own
    dt = step[:, None] / fine
    for t in range(length):
        held = u[0, t][:, None]
        for _ in range(fine):
            h = h + dt * (a * (h + dt / 2 * (a * h + held)) + held)
        np.testing.assert_allclose(slow[0, t], 2 * (c * h).sum(1).real, atol=1e-3)


def test_lengths_are_adapted_in_two_ways():
    tokens = np.arange(1.0, 4.0, dtype=np.float32).reshape(1, 3, 1)
    assert rwkv.stretch(tokens, 6).ravel().tolist() == [1, 1, 2, 2, 3, 3]
    assert rwkv.stretch(tokens, 2).ravel().tolist() == [1, 2]
    assert rwkv.pad_left(tokens, 5).ravel().tolist() == [0, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="at most as many tokens"):
        rwkv.pad_left(tokens, 2)
    with pytest.raises(ValueError, match="divisible by heads"):
        jax.eval_shape(nw.RWKV7(3).init, jax.random.key(0), np.zeros((1, 2, 4), np.float32))


def layer_count(module, *args):
    return nw.parameter_count(jax.eval_shape(module.init, jax.random.key(0), *args)["params"])


def test_the_mamba_layer_makes_up_mamba_130m():
    """The released mamba-130m has 129,135,360 parameters: 24 layers of width 768 with one norm each, a tied embedding of
    50,280 words and a last norm."""
    layer = layer_count(nw.Mamba(1), np.zeros((1, 2, 768), np.float32))
    assert 24 * (layer + 768) + 50280 * 768 + 768 == 129_135_360


def test_the_rwkv_layer_has_the_published_matrices():
    """Width 768 with ranks 64, 64, 32, 128 (decay, rate, value, gate) as in the released model of 0.1 billion; by hand."""
    x = np.zeros((1, 2, 768), np.float32)
    d, ranks = 768, 64 + 64 + 128
    first = (
        4 * d * d + 2 * d * ranks + 6 * d + 2 * d + 3 * d + 2 * d
    )  # matrices, ranks, shifts, w0 a0, k_k k_a r_k, norm
    assert layer_count(nw.RWKV7(12), x) == first
    assert layer_count(nw.RWKV7(12), x, x) == first + 2 * d * 32 + d


def late_change(net):
    """How much outputs before token 4 change when tokens from 4 on do, of the state and of a condition as long as it."""
    x, t, _ = inputs(net, (7, 3))
    tokens = np.random.default_rng(1).standard_normal((3, 7, net.token_size)).astype(np.float32)
    cond = lambda tokens: {"tokens": tokens} if net.token_size else None
    params = nw.random_parameters(net, x, t, cond(tokens))
    f = jax.jit(lambda x, tokens: net.apply({"params": params}, x, t, cond(tokens)))
    later = lambda a: np.where(np.arange(7)[None, :, None] >= 4, -a, a)
    change = np.abs(f(x, tokens) - f(later(x), later(tokens)))
    assert change[:, 4:].max() > 1e-3
    return change[:, :4].max()


@pytest.mark.parametrize("mix", [nw.RWKV7, nw.Mamba, nw.S4D])
def test_one_direction_is_causal(mix):
    assert (
        late_change(nw.StateDiT(width=8, depth=1, heads=2, mix=mix, cross=mix, bidirectional=False, token_size=2))
        < 1e-5
    )  # Fourier rounds


def test_two_directions_are_not_causal():
    assert late_change(nw.StateDiT(width=8, depth=1, heads=2, mix=nw.S4D)) > 1e-3


def swapped(heads, **how):
    return nw.RWKV7(heads, swapped=True, **how)


def left(heads, **how):
    return nw.RWKV7(heads, align=nw.pad_left, **how)


OTHERS = {
    "mamba": dict(mix=nw.Mamba, cross=nw.Mamba, encoder=1),  # an encoder and a decoder
    "s4": dict(mix=nw.S4D, cross=nw.S4D),
    "swapped": dict(mix=nw.Softmax, cross=swapped, bidirectional=False),
    "left": dict(mix=nw.Softmax, cross=left, bidirectional=False),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_other_mixers_read_every_input_and_parameter_and_no_padding(name):
    net = nw.StateDiT(width=16, depth=1, heads=2, expand=2, num_classes=3, token_size=4, **OTHERS[name])
    x, t, cond = inputs(net, (4, 6, 2))
    params = nw.random_parameters(net, x, t, cond)

    @jax.jit
    def slopes(params, x, t, tokens):
        f = lambda *a: jnp.sum(jnp.square(net.apply({"params": a[0]}, a[1], a[2], {**cond, "tokens": a[3]})))
        return jax.grad(f, argnums=(0, 1, 2, 3))(params, x, t, tokens)

    poisoned = np.where(cond["mask"][:, :, None], cond["tokens"], np.float32(np.nan))
    grads = slopes(params, x, t, poisoned)
    unread = [jax.tree_util.keystr(p) for p, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]
    assert not unread and all(np.isfinite(g).all() for g in jax.tree.leaves(grads)), unread
    assert not np.any(grads[3][~cond["mask"]]) and np.abs(grads[3][cond["mask"]]).min() > 0
    paths = [
        jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    kernels = [p for p in paths if "/mix" in p and p.endswith("out/kernel")]
    rules = [re.compile(pattern) for pattern, _ in nw.partition_rules(net)]
    assert kernels and all(any(r.search(p) for r in rules) for p in kernels)


@pytest.mark.parametrize("mix", [nw.RWKV7, nw.Mamba, nw.S4D])
def test_a_float64_state_changes_no_parameter(mix, x64):
    net = nw.StateDiT(width=8, depth=1, heads=2, mix=mix, cross=mix, token_size=4)
    args = jnp.zeros((1, 5, 2), jnp.float64), jnp.zeros(1, jnp.float64), {"tokens": jnp.zeros((1, 3, 4), jnp.float64)}
    y, v = jax.eval_shape(net.init_with_output, jax.random.key(0), *args)
    assert y.dtype == jnp.float64 and {a.dtype for a in jax.tree.leaves(v)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    "how",
    [
        *(dict(encoder=1, mix=mix, cross=nw.Softmax) for mix in (nw.RWKV7, nw.Mamba, nw.S4D, nw.Softmax)),
        dict(mix=nw.S4D, cross=swapped),
    ],
    ids=["rwkv", "mamba", "s4", "softmax", "swapped"],
)
def test_padding_a_text_changes_nothing(how):
    """Four tokens alone, and followed by three of padding: encoders and states pass it by."""
    net = nw.StateDiT(width=8, depth=1, heads=2, expand=2, token_size=4, **how)
    x, t, _ = inputs(net, (5, 2))
    text = np.random.default_rng(1).standard_normal((3, 7, 4)).astype(np.float32)
    mask = np.arange(7)[None] < np.full((3, 1), 4)
    params = nw.random_parameters(net, x, t, {"tokens": text})
    f = jax.jit(lambda cond: net.apply({"params": params}, x, t, cond))
    short = f({"tokens": text[:, :4]})
    np.testing.assert_allclose(f({"tokens": text, "mask": mask}), short, atol=2e-5)
    assert np.abs(f({"tokens": text}) - short).max() > 1e-3


def test_an_image_must_be_cut_evenly():
    net = nw.StateDiT(width=8, depth=1, heads=2)
    with pytest.raises(ValueError, match="divisible by patch=2"):
        jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, 3, 4, 1), np.float32), np.zeros(1, np.float32))
