"""Adapters trained on eight devices, cut along fsdp: the numbers of one device, and a base that stays."""

import io

import jax
import numpy as np
import optax
import pytest
from adapter_cases import network

import diffjax
from diffjax import adapters, losses, processes, training
from diffjax.training.layouts import Layout


class Batches:
    """Batches that a place tells."""

    def __init__(self):
        self.i = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.i += 1
        return {"x": np.random.default_rng(self.i).normal(size=(8, 2)).astype(np.float32)}

    def get_state(self):
        return {"next": self.i}

    def set_state(self, state):
        self.i = state["next"]


@pytest.mark.slow
def test_fit_with_fsdp_equals_one_device_and_resumes(tmp_path):
    net, base, x, t, _ = network("mlp")
    fn = adapters.adapt(net, a=adapters.lora(2), b=adapters.difference("^out/"))
    params = fn.init(jax.random.key(0), base, x, t)
    optimizer, chosen = optax.adam(1e-2), dict(emas={"mean": training.ema.decay(0.5)}, trainable="^adapters/")
    model = lambda p: diffjax.denoiser(fn, processes.rectified(), diffjax.from_velocity, p)
    step = training.make_train_step(model, losses.flow_matching(label_drop=0.0), optimizer, **chosen)
    state = training.init_state(params, optimizer, 0, **chosen)
    quiet = {"stream": io.StringIO(), "watchdog": None, "per_dispatch": 2}
    one = training.fit(state, step, Batches(), steps=4, devices=jax.devices()[:1], **quiet).state
    cut = dict(layout=Layout(data=2, fsdp=4), **quiet)
    with training.CheckpointStore(tmp_path) as store:
        batches = Batches()
        training.fit(state, step, batches, steps=2, store=store, **cut)
        many = training.fit(state, step, batches, steps=4, store=store, resume=True, **cut).state
    jax.tree.map(np.testing.assert_array_equal, many.params["base"], jax.tree.map(np.asarray, base))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, (many.params, many.ema), (one.params, one.ema))
    assert np.abs(many.params["adapters"]["a"]["out"]["kernel"]["up"]).max() > 1e-2
    assert jax.tree.leaves(many.opt_state[0].mu["base"]) == []
