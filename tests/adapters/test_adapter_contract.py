"""What every adapter promises: one table of cases, one test for each promise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_cases import CASES, made, moved, network

from diffjax import adapters, training

PARAMETRISED = pytest.mark.parametrize("name", list(CASES))


@pytest.fixture(scope="module")
def compiled():
    """`f(name)`: the jitted changed network of a case."""
    found = {}
    return lambda name: found.setdefault(name, jax.jit(made(name)[0]))


def test_every_catalogue_line_has_a_case():
    built = {adapters.files.describe(case.adapter)["name"] for case in CASES.values()}
    assert built == set(adapters.CATALOGUE)


def unchanging(name, params):
    """Fresh parameters; of `control_next`, which is no identity when fresh, with the weight zero."""
    return {**params, "weights": {"it": jnp.float32(0)}} if name.startswith("control_next") else params


@PARAMETRISED
def test_a_fresh_adapter_changes_no_bit(name, compiled):
    _, params, x, t, cond = made(name)
    params = unchanging(name, params)
    net, base, *_ = network(CASES[name].net)
    own = {k: v for k, v in cond.items() if k != "it"} if isinstance(cond, dict) else cond
    np.testing.assert_array_equal(compiled(name)(params, x, t, cond), jax.jit(net)(base, x, t, own or None))


@PARAMETRISED
def test_weight_zero_changes_no_bit_and_one_is_none(name, compiled):
    _, params, x, t, cond = made(name)
    far, weighted = moved(params), compiled(name)
    plain = weighted(unchanging(name, params), x, t, cond)
    off = weighted({**far, "weights": {"it": jnp.float32(0)}}, x, t, cond)
    traces = weighted._cache_size()
    on = weighted({**far, "weights": {"it": jnp.float32(1)}}, x, t, cond)
    assert weighted._cache_size() == traces  # another weight is no other program
    np.testing.assert_array_equal(off, plain)
    changed = weighted(far, x, t, cond)
    np.testing.assert_allclose(on, changed, rtol=1e-5, atol=1e-5)
    assert np.abs(changed - plain).max() > 1e-3


@PARAMETRISED
def test_items_do_not_see_each_other(name, compiled):
    _, params, x, t, cond = made(name)
    whole = compiled(name)(moved(params), x, t, cond)
    one = lambda tree: jax.tree.map(lambda a: a[1:2], tree)
    np.testing.assert_allclose(compiled(name)(moved(params), *one((x, t, cond))), one(whole), rtol=2e-5, atol=2e-5)


@PARAMETRISED
def test_training_moves_the_adapter_alone(name):
    fn, params, x, t, cond = made(name)
    trained, rest = training.split(params, "^adapters/")
    # a target, because the output of a network may have a symmetric loss
    loss = lambda p: jnp.square(fn(training.join(p, rest), x, t, cond) - 1.0).mean()
    grads = jax.jit(jax.grad(loss))(trained)
    assert jax.tree.leaves(grads["base"]) == [] and optax.tree.norm(grads) > 0


@PARAMETRISED
def test_a_file_gives_it_back_and_refuses_another_base(name, tmp_path):
    _, params, *_ = made(name)
    adapter, base, own = CASES[name].adapter, params["base"], moved(params)["adapters"]["it"]
    file = adapters.save_adapter(tmp_path / "it.safetensors", adapter, own, base, {"note": "one"})
    loaded, found, about = adapters.load_adapter(file, base)
    assert loaded == adapter and hash(loaded) == hash(adapter) and about["note"] == "one"
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(np.asarray, own))
    with pytest.raises(training.CheckpointError, match="another network"):
        adapters.load_adapter(file, {"w": np.ones(2)})


def test_a_file_says_what_it_is_itself(tmp_path):
    adapter, own, file = adapters.lora(1), {"w": np.ones(2, np.float32)}, tmp_path / "it.safetensors"
    with pytest.raises(ValueError, match=r"about cannot have \['base', 'kind'\]"):
        adapters.save_adapter(file, adapter, own, own, {"kind": "style", "base": "digits", "note": "one"})
    described = adapters.files.describe(adapter)
    for text in ({"adapter": described}, {"adapter": {**described, "fields": [1]}, "base": "0"}):
        training.export_safetensors(own, file, {"kind": "adapter", **text})
        with pytest.raises(training.CheckpointError, match="cannot build"):
            adapters.load_adapter(file)
