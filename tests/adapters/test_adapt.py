"""`adapt` itself: names, composition, training of a part."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_cases import made, moved, network

import diffjax
from diffjax import adapters, losses, networks, processes, training
from diffjax.networks.taps import per_layer, tap_names, tapped


def test_lora_is_a_change_of_weights_and_merges():
    net, base, x, t, cond = network("dit")
    fn = adapters.adapt(net, a=adapters.lora(2, alpha=3.0, targets="attention/out/kernel$"))
    params = moved(jax.jit(fn.init)(jax.random.key(0), base, x, t, cond))
    low = params["adapters"]["a"]["block_1"]["attention"]["out"]["kernel"]
    merged = fn.merge(params)
    want = np.asarray(base["block_1"]["attention"]["out"]["kernel"], np.float64) + 1.5 * (
        np.asarray(low["down"], np.float64) @ np.asarray(low["up"], np.float64)
    )
    np.testing.assert_allclose(merged["block_1"]["attention"]["out"]["kernel"], want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(net(merged, x, t, cond), fn(params, x, t, cond), rtol=1e-6, atol=1e-6)


def test_adapters_that_add_commute():
    net, base, x, t, cond = network("unet")
    pair = dict(a=adapters.lora(2), b=adapters.lora(1, targets="conv"))
    there, back = adapters.adapt(net, **pair), adapters.adapt(net, **dict(reversed(pair.items())))
    params = moved(jax.jit(there.init)(jax.random.key(0), base, x, t, cond))
    params["weights"] = {"a": jnp.float32(0.5), "b": jnp.float32(-2.0)}
    np.testing.assert_allclose(
        jax.jit(there)(params, x, t, cond), jax.jit(back)(params, x, t, cond), rtol=2e-5, atol=2e-5
    )


def test_a_training_step_leaves_the_base_bit_equal_and_has_no_state_for_it():
    net, base, x, t, cond = network("dit")
    fn = adapters.adapt(net, a=adapters.lora(2))
    params = jax.jit(fn.init)(jax.random.key(0), base, x, t, cond)
    model = lambda p: diffjax.denoiser(fn, processes.rectified(), diffjax.from_velocity, p)
    optimizer, emas = optax.adam(1e-2), {"mean": training.ema.decay(0.5)}
    chosen = dict(emas=emas, trainable="^adapters/")
    step = training.make_train_step(model, losses.flow_matching(label_drop=0.0), optimizer, accumulate=3, **chosen)
    state = training.init_state(params, optimizer, 0, **chosen)
    size = training.state.count_params
    assert size(state.opt_state[0].mu) == size(state.ema["mean"]) == size(params["adapters"])
    new, metrics = jax.jit(step)(state, {"x": x, **cond})
    jax.tree.map(np.testing.assert_array_equal, new.params["base"], jax.tree.map(np.asarray, base))
    before, after = (s.params["adapters"]["a"]["in"]["kernel"]["up"] for s in (state, new))
    assert np.abs(after - before).max() > 1e-3 and np.isfinite(metrics["loss"])
    full = new.averaged("mean")
    assert jax.tree.structure(full) == jax.tree.structure(params)


def test_around_replaces_the_attention_of_one_layer():
    net, base, x, t, cond = network("dit")
    uniform = lambda call, q, k, v, mask, grid: jnp.broadcast_to(v.mean(1, keepdims=True), v.shape)
    changed = tapped(net, around={"block_0/attention.mix": uniform})(base, x, t, cond)
    flat = tapped(net, write={"block_0/attention/weights": lambda w: jnp.full_like(w, 1 / w.shape[-1])})
    np.testing.assert_allclose(changed, flat(base, x, t, cond), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_around_counts_a_module_once_inside_scan_and_remat(remat):
    net, _, x, t, cond = network("scanned")
    net = networks.from_linen(net.module.clone(remat=remat))
    looped, base, *_ = network("dit")
    stacked = networks.stack_blocks(base)
    twice = {"blocks": per_layer(lambda i, call, x, *args: (call(x, *args)[0] * jnp.where(i == 1, 2.0, 1.0), None))}
    second = {"block_1": lambda call, x, *args: (2.0 * call(x, *args)[0], None)}
    np.testing.assert_allclose(
        tapped(net, around=twice)(stacked, x, t, cond),
        tapped(looped, around=second)(base, x, t, cond),
        rtol=1e-5,
        atol=1e-5,
    )


def test_taps_of_the_changed_network_are_not_those_of_what_adapters_call():
    fn, params, x, t, cond = made("controlnet")
    params, net = moved(params), fn.net
    plain = {"label": cond["label"]}
    names = ("skip_0", "bottleneck")
    assert tap_names(fn, params, x, t, cond) == tap_names(net, params["base"], x, t, plain)

    @jax.jit
    def both(params):
        out, seen = tapped(fn, read=names)(params, x, t, cond)
        # the second half sees nothing else of the adapter, nor of the picture
        skips = [f"skip_{k}" for k in range(4)]
        seen |= tapped(fn, read=skips)(params, x, t, cond)[1]
        write = {name: lambda _, value=value: value for name, value in seen.items()}
        off = tapped(fn, write=dict.fromkeys(write, jnp.zeros_like))(params, x, t, cond)
        return out, fn(params, x, t, cond), tapped(net, write=write)(params["base"], x, t, plain), off

    out, want, again, off = both(params)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(again, want, rtol=1e-5, atol=1e-5)
    silent = tapped(net, write=dict.fromkeys([*names, "skip_1", "skip_2", "skip_3"], jnp.zeros_like))
    np.testing.assert_allclose(off, jax.jit(silent)(params["base"], x, t, plain), rtol=1e-5, atol=1e-5)


def test_bad_input():
    net, base, x, t, cond = network("dit")
    with pytest.raises(ValueError, match="raw function"):
        adapters.adapt(jax.jit(net), a=adapters.lora(2))
    with pytest.raises(ValueError, match="kinds of the network's own condition"):
        adapters.adapt(net, image=adapters.lora(2))
    with pytest.raises(ValueError, match="must be an adapter"):
        adapters.adapt(net, a=3)
    fn = adapters.adapt(net, a=adapters.lora(2))
    with pytest.raises(ValueError, match="without the adapters"):
        fn({"base": base, "adapters": {}}, x, t, cond)
    with pytest.raises(ValueError, match="one number"):
        params = fn.init(jax.random.key(0), base, x, t, cond)
        fn({**params, "weights": {"a": jnp.ones(3)}}, x, t, cond)
    with pytest.raises(ValueError, match=r"weights has \['b'\]"):
        fn({**params, "weights": {"b": jnp.float32(0)}}, x, t, cond)
    with pytest.raises(ValueError, match="params must be"):
        fn(base, x, t, cond)
    with pytest.raises(ValueError, match="without the adapters"):
        fn.merge({"base": base, "adapters": {}})
    with pytest.raises(ValueError, match="key of its own"):
        tapped(fn, read="block_0/block")(params, x, t, cond, jax.random.split(jax.random.key(0), len(x)))
    with pytest.raises(ValueError, match="names no array"):
        adapters.adapt(net, a=adapters.lora(2, targets="nothing")).init(jax.random.key(0), base, x, t, cond)
    with pytest.raises(ValueError, match="rank >= 1"):
        adapters.lora(0)
    with pytest.raises(ValueError, match="not called.*block_0/attention"):
        tapped(net, around={"block_0/attentoin.mix": lambda call, *a: call(*a)})(base, x, t, cond)
    with pytest.raises(ValueError, match="chooses none"):
        training.split(base, "nothing")
