"""UniCon: one model of a pair, asked for either part, for both, or for anything between by its two times.

The base is a transformer that draws digits. Two branches of it run side by side, one for a digit x, one for a picture y of its
edges. Frozen weights serve both; low-rank additions make the second branch, and in every block each branch attends to the
other by the network's own self-attention with low-rank additions and a linear map from zero, others for x than for y. The
times of the two are drawn apart:

    t_x, t_y ~ U(0, 1),   loss = mean (velocity error of x at t_x and of y at t_y)

Then the times say what is asked: t_y = 0 for x given y, t_x = 0 for y given x, t_x = t_y for both, and a t_y between for coarse
control by a noised y. Three specialists of the same size and training have one of these tasks each; the one for both has seen
equal times alone, and fails when it is given a clean part. `*_distance_over_specialist` compares the energy distance of pairs
(given and drawn) from test pairs, as a root, with that of the specialist. The estimate of the square is unbiased, so of real
pairs it is as often below zero as above; one below the root mean square of that of other real pairs counts as that. `*_error`
is the root mean square difference between y and the edges of x, over that with pictures in another order.

The distances of the one model and of the specialists are those of chance, 0.15; with equal times they are 0.28 and 0.51. The
specialists, which have one task each, have the smaller errors: 0.21 and 0.18, where the one model has 0.37 for x given y and 0.58
for y given x (0.42 and 0.65 after 800 batches).
"""

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import adapters, guidance, losses, metrics, networks, solvers, times, training
from experiments.control import bases, hints, runs
from experiments.loop import trainer
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=53,
    paper="arXiv:2410.11439",
    claim="one model with <= 25 % more parameters gives x of y, y of x and both, with distances within 1.2 of three specialists; "
    "trained with equal times it fails as soon as one part is given clean",
    expect={
        "parameters_over_base": at_most(0.25),
        "base_moved": at_most(0.0),
        "x_given_y_distance_over_specialist": at_most(1.2),
        "y_given_x_distance_over_specialist": at_most(1.2),
        "joint_distance_over_specialist": at_most(1.2),
        "x_given_y_error": at_most(0.5),
        "y_given_x_error": at_most(0.7),
        "equal_times_x_given_y_distance_over_ours": at_least(1.3),
        "equal_times_y_given_x_distance_over_ours": at_least(1.3),
        "coarse_error_over_fine": at_least(1.1),
    },
    minutes=3,
)
ADAPTER = adapters.unicon(4, joint_rank=6)


def edged(x):
    """The edges of pictures, in [-1, 1]."""
    return 2 * jnp.clip(1.5 * hints.edges(x), 0, 1) - 1


def run(preset):
    full = preset == "full"
    steps, n, sampling = (1200, 240, 10) if full else (2, 4, 2)
    base = bases.load("dit", preset)
    scanned = networks.from_linen(base.fn.module.clone(scan_layers=True))  # compiled once for all blocks
    base = bases.Base(scanned, networks.stack_blocks(base.params))
    digits, held = bases.digits("train"), runs.first(bases.digits("test"), n)
    nothing = lambda a: jnp.full(len(a), 10)
    x, y = digits["x"], edged(digits["x"])
    truth = {"x": held["x"], "y": edged(held["x"])}
    fn = adapters.adapt(base.fn, pair=ADAPTER)
    fresh = jax.jit(fn.init)(jax.random.key(0), base.params, x[:1], jnp.zeros(1), nothing(x[:1]))

    def trained(arrays, law=None):
        loss = losses.flow_matching(law, label_drop=0.0)
        model = lambda p: base.denoiser(p, fn)
        run = trainer(model, loss, steps, batch=32, rate=5e-3, trainable="^adapters/")
        return run(fresh, {"label": nothing(x), **arrays})

    uniform = times.laws.uniform()
    clean = jnp.zeros(len(x))
    models = {
        "ours": trained({"x": {"x": x, "y": y}}, times.laws.separate(x=uniform, y=uniform)),
        "equal": trained({"x": {"x": x, "y": y}}),
        "x_given_y": trained({"x": x, "pair": {"y": y, "t": clean}}),
        "y_given_x": trained({"x": y, "pair": {"x": x, "t": clean}}),
    }

    noise = bases.PROCESS.prior(jax.random.key(1), truth)
    solver = solvers.heun(bases.PROCESS, times.uniform(sampling))
    label = {"label": nothing(held["x"])}
    draw = jax.jit(lambda d, x: diffjax.sample(jax.random.key(2), d, solver, x))

    def given(name, part, t=0.0):  # the other part of a pair, with this part at time t
        other = "y" if part == "x" else "x"
        noised = bases.PROCESS.add_noise(truth[part], noise[part], t)
        own = {part: noised, "t": jnp.full(n, t, jnp.float32)}
        drawn = draw(base.denoiser(models[name], fn).bind({**label, "pair": own}), noise[other])
        return {part: truth[part], other: drawn}

    joint = {name: draw(base.denoiser(models[name], fn).bind(label), noise) for name in ("ours", "equal")}
    half = jnp.arange(8)[None, None, :, None] < 4  # of y, told; the rest of the pair is drawn
    guide = guidance.known(truth, {"x": False, "y": half})
    guided = draw(guide(base.denoiser(models["ours"], fn)).bind(label), noise)

    flat = lambda pair: np.concatenate([np.asarray(pair[k]).reshape(n, -1) for k in "xy"], 1)
    far = metrics.energy(flat(truth))
    others = [digits["x"][i : i + n] for i in range(0, 4 * n, n)]
    real = [metrics.score(far, flat({"x": a, "y": edged(a)})) for a in others]
    chance = np.mean(np.square(real)) ** 0.5  # unbiased, the estimate is as often below zero as above
    distance = lambda pair: max(metrics.score(far, flat(pair)), chance) ** 0.5
    order = jnp.roll(jnp.arange(n), 1)
    apart = lambda pair, order=slice(None): hints.far(edged(pair["x"]), pair["y"][order]).mean()
    error = lambda pair: apart(pair) / apart(truth, order)
    pairs = {f"{a}_given_{b}": given("ours", b) for a, b in ("xy", "yx")}
    special = {name: given(name, name[-1]) for name in pairs}
    equal = {name: given("equal", name[-1]) for name in pairs}
    coarse = given("ours", "y", 0.6)
    return {
        "parameters_over_base": training.state.count_params(fresh["adapters"])
        / training.state.count_params(base.params),
        "base_moved": runs.moved(base.params, models["ours"]["base"]),
        **{f"{k}_distance_over_specialist": distance(pairs[k]) / distance(special[k]) for k in pairs},
        "joint_distance_over_specialist": distance(joint["ours"]) / distance(joint["equal"]),
        "distance_of_chance": chance**0.5,
        **{f"specialist_{k}_distance": distance(special[k]) for k in pairs},
        **{f"equal_times_{k}_distance_over_ours": distance(equal[k]) / distance(pairs[k]) for k in pairs},
        "specialist_joint_distance": distance(joint["equal"]),
        **{f"{k}_error": error(pairs[k]) for k in pairs},
        **{f"specialist_{k}_error": error(special[k]) for k in pairs},
        "joint_error": error(joint["ours"]),
        "specialist_joint_error": error(joint["equal"]),
        **{f"equal_times_{k}_error_over_ours": error(equal[k]) / error(pairs[k]) for k in pairs},
        "coarse_error_over_fine": error(coarse) / error(pairs["x_given_y"]),
        "guided_error": error(guided),
        "x_grid": truth["x"][:20],
        "y_grid": truth["y"][:20],
        "x_given_y_grid": pairs["x_given_y"]["x"][:20],
        "y_given_x_grid": pairs["y_given_x"]["y"][:20],
        "joint_x_grid": joint["ours"]["x"][:20],
        "joint_y_grid": joint["ours"]["y"][:20],
        "equal_times_x_given_y_grid": equal["x_given_y"]["x"][:20],
    }
