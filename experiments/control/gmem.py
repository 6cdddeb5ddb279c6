"""GMem: a memory of what pictures look like, beside a network that need not remember them.

The snippet of a picture is what a frozen encoder says of it, normalised: here 160 features of random convolutions, which know no
label. The flow is trained with the snippet of the clean picture as its condition, now and then without, on the digits 0 to 8.
For sampling a snippet is drawn from the memory, S ~ C B, the truncated SVD of all snippets of the training pictures.

`steps_ratio` is how many times fewer steps the network with snippets needs to reach the loss that the same network with labels
has at its end, on held-out pictures, with their snippets. `svd_mmd_ratio` is the MMD^2 (to held-out pictures, means of three
draws) of what is drawn from a memory of rank 40 of 160, over that from the whole memory, and `svd_numbers` its size in that of
the whole. `new_accuracy` is of a judge that is to find the nine: the memory gets the snippets of twenty nines, which the network
has never seen, and draws from those; `new_before` is that of the network with a condition of the old snippets, `mixed_accuracy`
of points half-way between two of the twenty.

With 64 features of a classifier of the digits 0 to 8, at norm one instead of one for each feature, the ratio of steps was 1.9, and
the nine was found in .27 of the pictures: the encoder must say more than which of the old digits it is.
"""

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import data, losses, metrics, networks, solvers, times
from diffjax.data.memory import normalised
from experiments.control import bases
from experiments.loop import trainer
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=256,
    paper="arXiv:2412.08781",
    claim="with a memory of snippets a flow reaches the loss of the flow with labels in a third of the steps; a quarter of the "
    "memory is enough, and twenty snippets of a new class are drawn without training",
    expect={
        "steps_ratio": at_least(3.0),
        "svd_mmd_ratio": at_most(1.1),
        "svd_numbers": at_most(0.35),
        "new_accuracy": at_least(0.5),
        "new_before": at_most(0.05),
    },
    minutes=2,
)
NEW, RANK, MARKS = 9, 40, 20


def run(preset):
    full = preset == "full"
    steps, batch, n, width, depth = (1500, 64, 400, 48, 3) if full else (20, 4, 8, 8, 1)
    judge = bases.judge(full)
    seen, held = ({k: np.asarray(a) for k, a in bases.digits(split).items()} for split in ("train", "test"))
    old = seen["label"] != NEW
    encoder = metrics.random_convolution()
    mean, std = (f(encoder(seen["x"][old]), axis=0) for f in (np.mean, np.std))
    snippets = lambda x: (encoder(x) - mean) / (std + 1e-6)
    bank = data.memory(snippets(seen["x"][old]))
    size, nines = bank.basis.shape[1], seen["x"][~old][:20]
    scaled = lambda s: np.asarray(s) * size**0.5  # about one a feature
    known = held["label"] != NEW
    test = {"x": held["x"][known], "label": held["label"][known]}
    test["vector"] = scaled(normalised(snippets(test["x"])))
    train = {"x": seen["x"][old], "label": seen["label"][old], "vector": scaled(bank.read(np.arange(bank.size)))}

    found, curves = {}, {}
    for name, field in (("label", {"num_classes": 10}), ("vector", {"vector_size": size})):
        net = networks.from_linen(networks.DiT(width=width, depth=depth, heads=2, patch=2, **field))
        null = {"label": np.int32(10)} if name == "label" else {"vector": np.zeros(size, np.float32)}
        model = lambda p, net=net, null=null: diffjax.denoiser(net, bases.PROCESS, diffjax.from_velocity, p, null=null)
        pick = lambda arrays, name=name: {k: arrays[k] for k in ("x", name)}
        cond = lambda batch, name=name: {name: batch[name]}
        start = net.init(
            jax.random.key(0), train["x"][:1], jnp.zeros(1), cond(jax.tree.map(lambda a: a[:1], pick(train)))
        )
        run = trainer(model, losses.flow_matching(label_drop=0.1), steps, batch=batch, marks=MARKS, condition=cond)
        path = run(start, pick(train))
        again = {k: jnp.concatenate([jnp.asarray(a)] * 4) for k, a in pick(test).items()}
        error = lambda p, model=model, cond=cond, again=again: losses.flow_matching(label_drop=0.0)(
            jax.random.key(9), model(p), again["x"], cond(again)
        )[0].mean()
        curves[name] = np.asarray(jax.jit(lambda path, error=error: jax.lax.map(error, path))(path))
        found[name] = model(jax.tree.map(lambda a: a[-1], path))
    goal, curve = curves["label"].min(), curves["vector"]
    below = np.flatnonzero(curve <= goal)
    i = below[0] if below.size else MARKS - 1
    back = (goal - curve[i]) / (curve[i - 1] - curve[i]) if below.size and i else 0.0

    solver = solvers.heun(bases.PROCESS, times.uniform(15))

    @jax.jit
    def draw(denoiser, vector, seed):
        x = bases.PROCESS.prior(jax.random.key(seed), (len(vector), 8, 8, 1))
        return diffjax.sample(jax.random.key(2), denoiser.bind({"vector": vector}), solver, x)

    flat = lambda x: jnp.asarray(x).reshape(len(x), -1)
    score = jax.jit(metrics.mmd_to(flat(test["x"])))
    small = data.memory(snippets(seen["x"][old]), rank=min(RANK, bank.basis.shape[0]))
    mmds = {}
    for name, memory in (("whole", bank), ("svd", small)):
        drawn = [draw(found["vector"], scaled(memory.draw(jax.random.key(s), jnp.arange(n))), s) for s in range(3)]
        mmds[name] = np.mean([float(score(flat(x))) for x in drawn])
        if name == "whole":
            before = judge.predict(np.asarray(drawn[0]))
    more = bank.with_more(snippets(nines), grow=0)
    nth = bank.size + np.arange(100 if full else 4) % len(nines)
    new = np.asarray(draw(found["vector"], scaled(more.read(nth)), 7))
    mixed = np.asarray(draw(found["vector"], scaled(more.mixed(nth, np.roll(nth, 3), 0.5)), 8))
    return {
        "steps_ratio": steps / (steps / MARKS * (i + 1 - back)),
        "label_loss": curves["label"][-1],
        "memory_loss": curve[-1],
        "whole_mmd": mmds["whole"],
        "svd_mmd": mmds["svd"],
        "mmd_floor": float(score(flat(train["x"][:n]))),
        "svd_mmd_ratio": mmds["svd"] / mmds["whole"],
        "svd_numbers": small.numbers / bank.numbers,
        "new_accuracy": np.mean(judge.predict(new) == NEW),
        "new_before": np.mean(before == NEW),
        "mixed_accuracy": np.mean(judge.predict(mixed) == NEW),
        "curves": np.stack([curves["label"], curve]),
        "nines_grid": nines,
        "new_grid": new[:20],
        "mixed_grid": mixed[:20],
    }
