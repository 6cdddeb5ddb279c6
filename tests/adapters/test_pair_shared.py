"""What the branches of a pair have in common: no branch holds an array that does nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_cases import moved

from diffjax import adapters, networks
from diffjax.training.partial import named

NETS = {
    "learned": networks.DiT(width=8, depth=1, heads=2, positions=networks.Learned(2, 2), num_classes=3),
    "experts": networks.DiT(width=8, depth=2, heads=2, feed_forward=networks.sparse(2, 1, 1), scan_layers=True),
    "uvit": networks.UViT(width=8, depth=1, heads=2, patch=2, positions=networks.Learned(2, 2)),
}
SHARED = {
    "learned": {"positions/table"},
    "experts": {f"blocks/experts/{name}/kernel" for name in ("gate", "up", "down")},
    "uvit": {"positions/table", "extra_positions/table"},
}
X = np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype(np.float32)
T = np.float32([0.2, 0.7])


def base_of(name):
    cond = {"label": np.array([0, 1], np.int32)} if name == "learned" else None
    return networks.from_linen(NETS[name]), networks.random_parameters(NETS[name], X, T, cond), cond


@pytest.mark.parametrize("name", NETS)
def test_a_branch_has_what_it_uses_and_no_more(name):
    net, base, cond = base_of(name)
    fn = adapters.adapt(net, pair=adapters.jointnet())
    params = moved(jax.jit(fn.init)(jax.random.key(0), base, X, T, cond))
    branch = params["adapters"]["pair"]["branch"]
    left_out = {path for path, _ in named(base)} - {path for path, _ in named(branch)}
    assert {path for path in left_out if "experts/shared" not in path} == SHARED[name]
    rest = params["adapters"]["pair"]

    def loss(own):
        of_both = {"base": base, "adapters": {"pair": {**rest, "branch": own}}}
        return jnp.square(fn(of_both, {"x": X, "y": X[::-1]}, T, cond)["y"]).sum()

    grads = dict(named(jax.jit(jax.grad(loss))(branch)))
    idle = [path for path, g in grads.items() if not np.abs(g).max() > 0]
    assert [path for path in idle if not path.endswith("router/bias")] == []


def test_low_rank_additions_to_what_is_shared_are_refused():
    net, base, cond = base_of("learned")
    far = adapters.adapt(net, pair=adapters.unicon(2, branch="table$|kernel$"))
    with pytest.raises(
        ValueError, match=r"names \['positions/table'\], which both branches have in common.*Give a branch"
    ):
        jax.eval_shape(far.init, jax.random.key(0), base, X, T, cond)
    near = adapters.adapt(net, pair=adapters.unicon(2))
    assert "pair" in jax.eval_shape(near.init, jax.random.key(0), base, X, T, cond)["adapters"]
