"""What rematerialisation saves, policy by policy, and that it changes no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import networks as nw

POLICIES = ("none", "dots", "offload", "full")
FIELDS = {
    "dit": {"width": 32, "depth": 4, "heads": 2, "scan_layers": True},
    "unet": {"widths": (16,), "blocks": 2, "attention": ()},
    "mlp": {"width": 32, "depth": 4},
}


def setting(name, policy):
    """(loss, parameters) of a small network with that policy."""
    shape = (512, 5) if name == "mlp" else (8, 16, 16, 3)
    x, t = np.random.default_rng(0).normal(size=shape).astype(np.float32), jnp.full(shape[0], 0.3)
    net = nw.CATALOGUE[name].build(**FIELDS[name], remat=policy)
    return lambda p: jnp.square(net.apply({"params": p}, x, t)).sum(), nw.random_parameters(net, x, t)


def kept(name, policy):
    """Bytes that the backward pass is given."""
    loss, params = setting(name, policy)
    return sum(
        a.size * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params))
    )


@pytest.mark.parametrize("name", list(FIELDS))
def test_less_is_kept_from_policy_to_policy(name):
    none, dots, offload, full = (kept(name, policy) for policy in POLICIES)
    assert full < dots == offload <= none and full < 0.6 * none
    # convolutions as slices and matrix products count as dots with batch axes: they are recomputed
    assert dots < 0.8 * none or name == "mlp"


def test_policies_change_no_gradient_and_the_compiled_program_needs_less():
    memory, gradients = {}, {}
    for policy in POLICIES:
        loss, params = setting("dit", policy)
        program = jax.jit(jax.grad(loss)).lower(params).compile()
        gradients[policy] = program(params)
        memory[policy] = program.memory_analysis().temp_size_in_bytes
    for policy in POLICIES[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), gradients[policy], gradients["none"]
        )
    assert memory["full"] < memory["dots"] < 0.5 * memory["none"], memory


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="remat must be one of none, full, dots, offload; got 'half'"):
        jax.eval_shape(nw.DiT(remat="half").init, jax.random.key(0), jnp.zeros((1, 4, 4, 1)), jnp.zeros(1))
