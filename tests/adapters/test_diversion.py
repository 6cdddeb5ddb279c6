"""DivControl: rank-one parts that are the matrix, and gates of each item."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_cases import PICTURE, TOKENS, moved, network

from diffjax import adapters
from diffjax.training.partial import named

OWN = {"image": PICTURE, "instruction": TOKENS[:, 0]}


@pytest.mark.parametrize("name", ["dit", "scanned"])
def test_with_all_gates_on_the_parts_are_the_matrices(name):
    net, base, x, t, cond = network(name)
    kind = adapters.diversion(2, 3)
    fn = adapters.adapt(net, it=kind)
    params = jax.jit(fn.init)(jax.random.key(0), base, x, t, {**cond, "it": OWN})["adapters"]["it"]
    np.testing.assert_allclose(kind.gates(params, OWN["instruction"]), 1.0, rtol=1e-6)
    start = dict(named(base))
    found = kind.matrices(params, jnp.ones(3))
    assert len(found) == (4 if name == "scanned" else 8)  # qkv, out, hidden, out of the feed-forward part
    for path, w in found.items():
        np.testing.assert_allclose(w, start[path], rtol=1e-5, atol=1e-5)


def test_it_is_a_control_transformer_whose_matrices_each_item_chooses():
    """Item by item against `control_transformer` with the matrices made."""
    net, base, x, t, cond = network("dit")
    kind, plain = adapters.diversion(2, 3, active=2), adapters.control_transformer(2)
    fn = adapters.adapt(net, it=kind)
    params = moved(jax.jit(fn.init)(jax.random.key(0), base, x, t, {**cond, "it": OWN}), 0.1)
    got = jax.jit(fn)(params, x, t, {**cond, "it": OWN})
    own = params["adapters"]["it"]
    gates = np.asarray(kind.gates(own, OWN["instruction"]))
    assert ((gates > 0).sum(1) == 2).all() and np.ptp(gates, axis=0).max() > 0.05
    control = jax.jit(adapters.adapt(net, it=plain))
    for b in range(3):
        made = kind.matrices(own, gates[b])
        copy = jax.tree.map(np.asarray, own["rest"])
        for path, w in made.items():
            *parents, last = path.split("/")
            inner = copy
            for name in parents:
                inner = inner.setdefault(name, {})
            inner[last] = w
        item = {"base": base, "adapters": {"it": {"copy": copy, "in": own["in"], "zero": own["zero"]}}}
        want = control(item, x, t, {**cond, "it": PICTURE})
        np.testing.assert_allclose(got[b], want[b], rtol=1e-4, atol=1e-4)


def test_bad_input():
    net, base, x, t, cond = network("dit")
    start = lambda adapter, own=OWN: adapters.adapt(net, it=adapter).init(
        jax.random.key(0), base, x, t, {**cond, "it": own}
    )
    with pytest.raises(ValueError, match="1 <= active <= tailors"):
        adapters.diversion(1, 3, active=4)
    with pytest.raises(ValueError, match="less than the rank of each matrix, 8; got 8"):
        start(adapters.diversion(1, 8))
    with pytest.raises(ValueError, match="'instruction'.*got float32"):
        start(adapters.diversion(1, 3), PICTURE)
    with pytest.raises(ValueError, match=r"got instruction float32 \[2, 4\]"):
        start(adapters.diversion(1, 3), {**OWN, "instruction": TOKENS[:2, 0]})
