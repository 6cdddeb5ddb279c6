"""New words and new labels: where they stand, and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_cases import moved, network

from diffjax import adapters
from diffjax.prediction import broadcast_null


def test_a_word_stands_for_the_token_it_starts_from_and_its_vector():
    net, base, x, t, cond = network("text")
    fn = adapters.adapt(net, word=adapters.textual_inversion(2))
    params = moved(fn.init(jax.random.key(0), base, x, t, cond))
    vectors = params["adapters"]["word"]["vectors"]
    places = np.array([[-1, 1, -1, 0], [-1] * 4, [0, 0, -1, -1]])
    want = np.array(cond["tokens"])
    for b, i in np.argwhere(places >= 0):
        want[b, i] += 0.5 * vectors[places[b, i]]
    changed = jax.jit(fn)({**params, "weights": {"word": jnp.float32(0.5)}}, x, t, {**cond, "word": places})
    plain = jax.jit(net)
    np.testing.assert_allclose(changed, plain(base, x, t, {"tokens": want}), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(jax.jit(fn)(params, x, t, cond), plain(base, x, t, cond))  # no word stands anywhere


def test_a_new_label_is_a_row_of_its_own():
    """The same as a table that has the row."""
    net, base, x, t, cond = network("dit")
    fn = adapters.adapt(net, new=adapters.label_inversion(2))
    params = moved(fn.init(jax.random.key(0), base, x, t, cond))
    row = params["adapters"]["new"]["vectors"][1]
    table = np.array(base["code"]["label"]["table"])
    table[2] += row
    larger = {**base, "code": {**base["code"], "label": {"table": table}}}
    own = {"label": np.array([0, 2, 2], np.int32)}
    got = jax.jit(fn)(params, x, t, {**own, "new": np.array([-1, 1, -1])})
    want = [jax.jit(net)(p, x, t, own) for p in (base, larger)]
    np.testing.assert_allclose(got, [want[0][0], want[1][1], want[0][2]], rtol=1e-5, atol=1e-5)
    null = broadcast_null({"label": 3, "new": -1}, {**own, "new": np.array([-1, 1, -1])}, 3)
    np.testing.assert_array_equal(jax.jit(fn)(params, x, t, null), jax.jit(net)(base, x, t, {"label": null["label"]}))


def test_bad_input():
    net, base, x, t, cond = network("text")
    fn = adapters.adapt(net, word=adapters.textual_inversion(2))
    params = fn.init(jax.random.key(0), base, x, t, cond)
    call = lambda places: fn(params, x, t, {**cond, "word": places})
    with pytest.raises(ValueError, match=r"integers \[3, 4\].*got int64 of shape \(3, 3\)"):
        call(np.zeros((3, 3), int))
    with pytest.raises(ValueError, match="got float32"):
        call(np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match=r"2 learned vectors, 0..1; got \[2, 2"):
        call(np.full((3, 4), 2))
    with pytest.raises(ValueError, match="vectors >= 1"):
        adapters.textual_inversion(0)
    with pytest.raises(ValueError, match="vectors >= 1"):
        adapters.label_inversion(0)
    net, base, x, t, cond = network("dit")
    with pytest.raises(ValueError, match="needs cond"):
        adapters.adapt(net, word=adapters.textual_inversion()).init(jax.random.key(0), base, x, t, cond)
    with pytest.raises(ValueError, match="no embedding of labels.*code/label/table"):
        far = adapters.label_inversion(at="code/labels")
        adapters.adapt(net, new=far).init(jax.random.key(0), base, x, t, cond)
