"""CrossWKV: RWKV-7's recurrence over the picture, read by the words of the condition.

The state S_t = S_{t-1} (diag(w_t) - h_t^T (a_t h_t)) + v_t^T k_t runs over the tokens of the picture, and the receptance that
reads it comes from the tokens of the text: linear in their number, with a state of constant size. Three things are
measured.
- The recurrence and its form in chunks of matrix products give the same, the second with the faster gradient. Twice the
  tokens cost twice the operations, and the seconds grow as the tokens: `*seconds_ratio` is 2^p of the power law that fits
  1024 to 8192 tokens (4096 for attention of all to all, which grows faster), with the least processor time of many runs.
- On digits whose condition is the spelt name ("seven", letter by letter) four small transformers differ in nothing but how
  they read it: CrossWKV, the same with the roles swapped (the state runs over the text, the picture reads it), softmax
  cross-attention, and not at all. The last one shows what the text is worth; `gain_kept` is the part of it that CrossWKV
  keeps. Flow-matching loss on held-out digits, mean over seeds.
- Three things are exchanged two at a time, or left as they are, and after every exchange their order, an element of S_3, is
  asked for; a sequence starts with a token of its own, for a state that is zero has nothing to exchange. RWKV-7 in two layers
  and one direction, with learning rates up to 2 so that a state can be reflected, is trained on short sequences, as is a
  transformer of the same width and depth; both are asked about four times longer ones too.
"""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import diffjax
from diffjax import data, losses, networks, processes, solvers, times, training
from diffjax.training import flops
from experiments.recipe import Recipe, at_least, at_most, between

RECIPE = Recipe(
    ledger=190,
    paper="arXiv:2504.14260",
    claim="recurrent and chunked forms agree; cost is linear in tokens, that of attention is not; as reader of the text within "
    "5 % of the loss of softmax cross-attention; tracks products of S_3 where attention does not",
    expect={
        "chunked_error": at_most(1e-4),
        "operations_ratio": between(1.9, 2.1),
        "seconds_ratio": between(1.8, 2.3),
        "attention_seconds_ratio": at_least(2.3),  # above all that is linear here
        "gradient_speedup": at_least(1.0),
        "loss_over_softmax": at_most(1.05),
        "s3_accuracy": at_least(0.95),
        "s3_accuracy_4x": at_least(0.95),
    },
    minutes=3,
)
PROCESS = processes.rectified()
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SPELT = np.zeros((10, 5, 26), np.float32)  # one letter a token
for digit, name in enumerate(NAMES):
    SPELT[digit, np.arange(len(name)), [ord(letter) - ord("a") for letter in name]] = 1
MASK = SPELT.any(-1)
PERMUTATIONS = list(itertools.permutations(range(3)))
EXCHANGES = [i for i, p in enumerate(PERMUTATIONS) if sum(a == b for a, b in enumerate(p)) in (1, 3)]  # one or all stay
PRODUCT = np.array([[PERMUTATIONS.index(tuple(a[i] for i in b)) for b in PERMUTATIONS] for a in PERMUTATIONS])


def swapped(heads, **how):
    """The state over the text, read by the picture."""
    return networks.RWKV7(heads, swapped=True, **how)


def reflecting(heads, **how):
    """RWKV-7 with learning rates up to 2."""
    return networks.RWKV7(heads, reach=2.0, **how)


READERS = {"cross_wkv": networks.RWKV7, "softmax": networks.Softmax, "swapped": swapped, "none": None}


def fastest(runs, rounds):
    """The least processor seconds of each run, by turns: what else the machine does only adds."""
    seconds = dict.fromkeys(runs, np.inf)
    for run in runs.values():
        run().block_until_ready()  # compiles
    for name in rounds * (*runs,):
        start = time.process_time()
        runs[name]().block_until_ready()
        seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds


def growth(f, xs, lengths, rounds):
    """How many times the seconds of f grow at twice the tokens: 2^p of the power p that fits all lengths best.

    The pictures of xs, [K, 1, N, C], follow each other in one program, which shares what a call costs.
    """
    one_by_one = jax.jit(lambda xs: jax.lax.map(lambda x: f(x).sum(), xs))
    parts = {n: jnp.asarray(xs[:, :, :n]) for n in lengths}
    seconds = fastest({n: lambda n=n: one_by_one(parts[n]) for n in lengths}, rounds)
    return 2 ** np.polyfit(np.log(lengths), np.log([seconds[n] for n in lengths]), 1)[0]


def forms(length, rounds):
    """How far the two forms of a layer differ, and what twice the tokens cost: operations, seconds, those of attention."""
    rng = np.random.default_rng(0)
    lengths = [length * 2**i for i in range(4)]
    xs = rng.standard_normal((2, 1, lengths[-1], 32)).astype(np.float32)  # small enough for a cache at all lengths
    x, text = jnp.asarray(xs[0, :, : 2 * length]), rng.standard_normal((1, 64, 32)).astype(np.float32)
    layer, scan, attention = networks.RWKV7(1), networks.RWKV7(1, form=networks.delta_scan), networks.Attention(1)
    params = {"params": networks.random_parameters(layer, x, None, text)}
    weights = {"params": networks.random_parameters(attention, x, None)}
    read = lambda x, layer=layer: layer.apply(params, x, None, text)[0]
    attend = lambda x: attention.apply(weights, x)
    y, slow = jax.jit(read)(x), jax.jit(lambda x: read(x, scan))(x)
    slopes = {
        name: jax.jit(jax.grad(lambda x, each=each: jnp.sum(read(x, each))))
        for name, each in {"chunked": layer, "scan": scan}.items()
    }
    seconds = fastest({name: lambda slope=slope: slope(x[:, :length]) for name, slope in slopes.items()}, 4 * rounds)
    ratio = lambda f: flops.count(f, x).total / flops.count(f, x[:, :length]).total
    return {
        "chunked_error": np.abs(y - slow).max() / np.abs(slow).max(),
        "operations_ratio": ratio(read),
        "attention_operations_ratio": ratio(attend),
        "seconds_ratio": growth(read, xs, lengths, 4 * rounds),
        "attention_seconds_ratio": growth(attend, xs, lengths[:3], rounds),
        "gradient_speedup": seconds["scan"] / seconds["chunked"],
    }


def trainer(model, loss, steps, rate, condition):
    """The function (parameters, stacked batches) -> parameters after a step on each, averaged over the last ones."""
    optimizer = training.adamw(training.optimizer.linear_tail(rate, steps, warmup=max(steps // 10, 1)), clip=1.0)
    emas = {"mean": training.ema.decay(0.99 if steps > 100 else 0.5)}
    step = training.make_train_step(model, loss, optimizer, emas=emas, condition=condition)
    train = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches)[0].ema["mean"])
    return lambda params, batches: train(training.init_state(params, optimizer, 0, emas=emas), batches)


def spelt(batch):
    """The condition of a batch: the names of its labels."""
    return {"tokens": jnp.asarray(SPELT)[batch["label"]], "mask": jnp.asarray(MASK)[batch["label"]]}


def read_text(readers, steps, batch, width, depth, seeds):
    """Held-out losses of the readers, [seeds] each, and digits that the last network of the first one draws."""
    digits = data.load("digits")
    given, held = digits.read("train"), digits.read("test")
    flow, out = losses.flow_matching(label_drop=0.0), {}
    for name in readers:
        cross = READERS[name]
        size, condition = (0, lambda batch: None) if cross is None else (26, spelt)
        net = networks.StateDiT(
            width=width,
            depth=depth,
            heads=2,
            mix=networks.Softmax,
            bidirectional=False,
            cross=cross or networks.Softmax,
            token_size=size,
        )
        f = networks.from_linen(net)
        model = lambda params, f=f: diffjax.denoiser(f, PROCESS, diffjax.from_velocity, params)
        judge = jax.jit(
            lambda params, key, model=model, condition=condition: flow(
                key, model(params), jnp.asarray(held["x"]), condition(held)
            )[0].mean()
        )
        train = trainer(model, flow, steps, 3e-3, condition)
        out[name] = []
        for seed in range(seeds):
            rows = np.random.default_rng(seed).integers(len(given["x"]), size=(steps, batch))
            stacked = {k: jnp.asarray(given[k])[rows] for k in ("x", "label")}
            one = {k: v[0, :1] for k, v in stacked.items()}
            start = f.init(jax.random.key(seed), one["x"], jnp.zeros(1), condition(one))
            end = train(start, stacked)
            out[name].append(np.mean([judge(end, jax.random.key(100 + i)) for i in range(8)]))
        if name == readers[0]:
            drawn = draw(model(end), 3)
    return {name: np.array(values) for name, values in out.items()}, drawn


def draw(denoiser, each):
    """So many digits of each name, [10 each, 8, 8, 1]."""
    asked = spelt({"label": jnp.tile(jnp.arange(10), each)})
    x = PROCESS.prior(jax.random.key(2), (10 * each, 8, 8, 1))
    solver = solvers.heun(PROCESS, times.uniform(20))
    return jax.jit(diffjax.sample)(jax.random.key(3), denoiser.bind(asked), solver, x)


def products(seed, count, length):
    """A beginning (6) and random exchanges [count, 1 + length], and their running products."""
    drawn = np.random.default_rng(seed).choice(EXCHANGES, (count, length))
    drawn = np.concatenate([np.zeros((count, 1), int), drawn], axis=1)
    product = np.stack(list(itertools.accumulate(drawn.T, lambda a, b: PRODUCT[a, b])), axis=1)
    return np.concatenate([np.full((count, 1), 6), drawn[:, 1:]], axis=1), product


def name_products(key, logits, x0, cond, items=None):
    """Cross-entropy of the running products."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(x0), cond).mean(-1), {}


def track(net, steps, batch, length, rate):
    """The share of running products that a network trained on `length` exchanges names, there and at four times that."""
    f = networks.from_linen(net)
    drawn, product = products(0, steps * batch, length)
    cut = lambda a: jnp.asarray(a.reshape(steps, batch, 1 + length))
    hot = lambda a: jax.nn.one_hot(a, 7)
    model = lambda params: lambda x: f(params, x, 0.0)
    start = f.init(jax.random.key(0), jnp.zeros((1, 1 + length, 7)), jnp.zeros(1))
    batches = {"x": hot(cut(drawn)), "product": cut(product)}
    end = trainer(model, name_products, steps, rate, lambda batch: batch["product"])(start, batches)
    asked = [products(1, 256, n) for n in (length, 4 * length)]
    return [float((model(end)(hot(drawn)).argmax(-1) == product)[:, 1:].mean()) for drawn, product in asked]


def run(preset):
    full = preset == "full"
    figures = forms(*((1024, 5) if full else (32, 1)))
    readers = list(READERS) if full else ["cross_wkv", "softmax"]
    held, drawn = read_text(readers, *((400, 64, 48, 2, 2) if full else (2, 8, 8, 1, 1)))
    figures |= {f"{name}_loss": values.mean() for name, values in held.items()}
    figures["loss_over_softmax"] = figures["cross_wkv_loss"] / figures["softmax_loss"]
    figures["loss_spread"] = max(values.std() for values in held.values())
    if full:
        worth = figures["none_loss"] - figures["softmax_loss"]
        figures["gain_kept"] = (figures["none_loss"] - figures["cross_wkv_loss"]) / worth

    figures["digits_grid"] = drawn
    sizes = dict(width=32 if full else 8, depth=2 if full else 1, heads=2, expand=2, out_channels=6)
    wkv = networks.StateDiT(**sizes, mix=reflecting, bidirectional=False)
    train = (1500, 32, 8, 5e-3) if full else (2, 8, 4, 1e-3)
    figures["s3_accuracy"], figures["s3_accuracy_4x"] = track(wkv, *train)
    figures["s3_softmax_accuracy"], figures["s3_softmax_accuracy_4x"] = track(networks.TokenDiT(**sizes), *train)
    return figures
