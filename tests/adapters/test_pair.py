"""Two branches of one network: what a fresh pair leaves as it is, what each branch receives, and how several compose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_cases import moved, network

import diffjax
from diffjax import adapters, guidance, losses, processes, solvers, times, training

KINDS = {"jointnet": adapters.jointnet(), "unicon": adapters.unicon(2)}
PLAIN = {"xla_disable_hlo_passes": "fusion"}  # fusions of another program round in another way


def made(kind, net):
    net, base, x, t, cond = network(net)
    fn = adapters.adapt(net, pair=KINDS[kind])
    y, s = np.ascontiguousarray(x[:, ::-1]), t[::-1].copy()
    return net, fn, jax.jit(fn.init, compiler_options=PLAIN)(jax.random.key(0), base, x, t, cond), (x, y), (t, s), cond


@pytest.mark.parametrize("net", ["unet", "scanned"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_fresh_branches_are_the_base_at_their_own_states_and_times(kind, net):
    base, fn, params, (x, y), (t, s), cond = made(kind, net)
    run = jax.jit(fn, compiler_options=PLAIN)
    plain = jax.jit(base, compiler_options=PLAIN)
    out = run(params, {"x": x, "y": y}, {"x": t, "y": s}, cond)
    np.testing.assert_array_equal(out["x"], plain(params["base"], x, t, cond))
    np.testing.assert_array_equal(out["y"], plain(params["base"], y, s, cond))


@pytest.mark.parametrize("kind", list(KINDS))
def test_one_part_as_the_state_is_the_pair_with_the_other_in_the_condition(kind):
    _, fn, params, (x, y), (t, s), cond = made(kind, "scanned")
    params, run = moved(params), jax.jit(fn)
    whole = run(params, {"x": x, "y": y}, {"x": t, "y": s}, cond)
    of_x = run(params, x, t, {**cond, "pair": {"y": y, "t": s}})
    of_y = run(params, y, s, {**cond, "pair": {"x": x, "t": t}})
    np.testing.assert_allclose(of_x, whole["x"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_y, whole["y"], rtol=1e-5, atol=1e-5)
    other = run(params, x, t, {**cond, "pair": {"y": y + 1, "t": s}})
    later = run(params, x, t, {**cond, "pair": {"y": y, "t": s + 0.1}})
    assert np.abs(other - of_x).max() > 1e-3 and np.abs(later - of_x).max() > 1e-3


def test_jointnet_adds_a_linear_map_of_the_other_branch_at_the_taps():
    net, base, x, t, cond = network("dit")
    fn = adapters.adapt(net, pair=adapters.jointnet("^block_0/block$"))
    y = np.ascontiguousarray(x[:, ::-1])
    params = moved(jax.jit(fn.init)(jax.random.key(0), base, x, t, cond))
    own = params["adapters"]["pair"]
    read = lambda p, x: diffjax.networks.tapped(net, read="block_0/block")(p, x, t, cond)[1]["block_0/block"]
    h_x, h_y = read(base, x), read(own["branch"], y)
    mapped = lambda to, h: np.asarray(h) @ own[to]["block_0"]["block"]["kernel"] + own[to]["block_0"]["block"]["bias"]
    put = lambda value: diffjax.networks.tapped(net, write={"block_0/block": lambda h: jnp.asarray(value)})
    out = jax.jit(fn)(params, {"x": x, "y": y}, t, cond)
    np.testing.assert_allclose(out["x"], put(h_x + mapped("to_x", h_y))(base, x, t, cond), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        out["y"], put(h_y + mapped("to_y", h_x))(own["branch"], y, t, cond), rtol=1e-4, atol=1e-4
    )


def test_unicon_is_the_networks_attention_to_the_other_branch():
    """With no change but one in `post`, x receives softmax(q_x k_y) v_y of the same projections; y has its own way."""
    net, base, x, t, cond = network("dit")
    at = "block_0/attention"
    fn = adapters.adapt(net, pair=adapters.unicon(1, targets=f"^{at}$"))
    y = np.ascontiguousarray(x[:, ::-1])
    params = jax.jit(fn.init)(jax.random.key(0), base, x, t, cond)
    z = np.random.default_rng(3).normal(size=(8, 8)).astype(np.float32)
    other = moved({"adapters": params["adapters"]["pair"]["to_y"]})["adapters"]
    params["adapters"]["pair"]["to_x"]["post"] = {"block_0": {"attention": {"kernel": z}}}
    names = [f"{at}/{kind}" for kind in "qkv"]
    taps = {n: diffjax.networks.tapped(net, read=names)(base, a, t, cond)[1] for n, a in (("x", x), ("y", y))}
    q, k, v = (np.asarray(taps[part][n], np.float64) for part, n in zip("xyy", names, strict=True))
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    mixed = np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v).reshape(len(x), -1, 8)
    extra = (mixed @ np.asarray(base["block_0"]["attention"]["out"]["kernel"]) @ z).astype(np.float32)
    around = {at: lambda call, h, **kwargs: call(h, **kwargs) + extra}
    want = diffjax.networks.tapped(net, around=around)(base, x, t, cond)
    run = jax.jit(fn)
    got = run(params, {"x": x, "y": y}, t, cond)
    np.testing.assert_allclose(got["x"], want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got["y"], net(base, y, t, cond), rtol=1e-4, atol=1e-4)
    params["adapters"]["pair"]["to_y"] = other
    both = run(params, {"x": x, "y": y}, t, cond)
    np.testing.assert_array_equal(both["x"], got["x"])
    assert np.abs(both["y"] - got["y"]).max() > 1e-3


def test_several_pairs_commute_and_one_of_weight_zero_is_not_there():
    net, base, x, t, cond = network("dit")
    pair = dict(a=adapters.unicon(2), b=adapters.unicon(1))
    there, back = adapters.adapt(net, **pair), adapters.adapt(net, **dict(reversed(pair.items())))
    params = moved(jax.jit(there.init)(jax.random.key(0), base, x, t, cond))
    own = {"a": {"y": x[::-1].copy(), "t": t}, "b": {"y": x[:, ::-1].copy(), "t": t[::-1].copy()}}
    one, two = jax.jit(there), jax.jit(back)
    weights = {"a": jnp.float32(1), "b": jnp.float32(0.5)}
    whole = one({**params, "weights": weights}, x, t, {**cond, **own})
    np.testing.assert_allclose(whole, two({**params, "weights": weights}, x, t, {**cond, **own}), rtol=1e-4, atol=1e-4)
    alone = jax.jit(adapters.adapt(net, a=pair["a"]))(
        {"base": base, "adapters": {"a": params["adapters"]["a"]}}, x, t, {**cond, "a": own["a"]}
    )
    off = one({**params, "weights": {**weights, "b": jnp.float32(0)}}, x, t, {**cond, **own})
    np.testing.assert_allclose(off, alone, rtol=1e-4, atol=1e-4)
    assert np.abs(whole - alone).max() > 1e-3
    joint = one({**params, "weights": weights}, {"x": x, "y": own["a"]["y"]}, t, {**cond, "b": own["b"]})
    np.testing.assert_allclose(joint["x"], whole, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_pair_trains_with_times_of_its_own_and_samples_each_way():
    net, base, x, t, cond = network("scanned")
    fn = adapters.adapt(net, pair=KINDS["unicon"])
    params = jax.jit(fn.init, compiler_options=PLAIN)(jax.random.key(0), base, x, t, cond)
    process = processes.rectified()
    model = lambda p: diffjax.denoiser(fn, process, diffjax.from_velocity, p)
    law = times.laws.separate(x=times.laws.uniform(), y=times.laws.uniform())
    chosen = dict(trainable="^adapters/")
    import optax

    step = training.make_train_step(model, losses.flow_matching(law, label_drop=0.0), optax.adam(1e-2), **chosen)
    state = training.init_state(params, optax.adam(1e-2), 0, **chosen)
    new, metrics = jax.jit(step)(state, {"x": {"x": x, "y": x[:, ::-1]}, **cond})
    assert np.isfinite(metrics["loss"]) and metrics["t/x"] != metrics["t/y"]
    jax.tree.map(np.testing.assert_array_equal, new.params["base"], jax.tree.map(np.asarray, base))

    noise = process.prior(jax.random.key(1), {"x": x, "y": x})
    draw = jax.jit(lambda d, x: diffjax.sample(jax.random.key(2), d, solvers.ddim(process, times.uniform(2)), x))
    d = model(moved(params))
    given = draw(d.bind({**cond, "pair": {"y": x, "t": np.zeros(3, np.float32)}}), noise["x"])
    both = draw(d.bind(cond), noise)
    held = draw(guidance.known({"x": x, "y": x}, {"x": False, "y": True})(d).bind(cond), noise)
    assert given.shape == both["x"].shape == x.shape
    np.testing.assert_allclose(held["y"], x, atol=1e-5)
    assert np.abs(held["x"] - both["x"]).max() > 1e-3


def test_dropout_keys_by_item_go_with_times_by_part():
    _, fn, params, (x, y), (t, s), cond = made("jointnet", "scanned")
    keys = jax.random.split(jax.random.key(0), 3)
    out = jax.jit(fn)(params, {"x": x, "y": y}, {"x": t, "y": s}, cond, keys)
    want = jax.jit(fn)(params, {"x": x, "y": y}, {"x": t, "y": s}, cond)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), out, want)


def test_bad_input():
    _, fn, params, (x, y), (t, _), cond = made("jointnet", "scanned")
    with pytest.raises(ValueError, match="give the pair"):
        fn(params, x, t, cond)
    with pytest.raises(ValueError, match="give the pair"):
        fn(params, x, t, {**cond, "pair": {"y": y}})
    with pytest.raises(ValueError, match='a pair must be {"x", "y"}'):
        fn(params, {"x": x, "z": y}, t, cond)
    with pytest.raises(ValueError, match="one shape"):
        fn(params, {"x": x, "y": y[:, :2]}, t, cond)
    with pytest.raises(ValueError, match="names no tap"):
        adapters.adapt(fn.net, pair=adapters.jointnet("nothing")).init(jax.random.key(0), params["base"], x, t, cond)
    with pytest.raises(ValueError, match="names no self-attention"):
        adapters.unicon(targets="nothing").places(params["base"])
    with pytest.raises(ValueError, match="ranks >= 1"):
        adapters.unicon(2, joint_rank=0)
    with pytest.raises(ValueError, match="a law for each part"):
        times.laws.separate()
