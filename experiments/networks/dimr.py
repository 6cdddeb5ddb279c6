"""DiMR: a transformer at half resolution, ConvNeXt blocks at full, and norms that know the time.

Every branch has an output and a loss,

    L = sum_r r^-2 mean |v_r - r D_r(v)|^2,   D_r the mean of r x r pixels,

the upper one reads by pixel shuffle all that the lower one computed. Only the norms are told the time: their scale and bias go
from p0 to p1 with s = sigmoid((1 + w) log-SNR / 4 + b), four vectors each. `adaptive_*` is the same network with norms whose
scale and shift come from an MLP of the time (adaLN), on digits. `patch4_*` is a DiT with patches of 4, as wide as it takes to
cost at least as many operations, on crops of 16 x 16 of photographs: 8 x 8 digits are only four patches, which is no loss of
resolution but more parameters for the operations, and there the DiT is ahead (0.073, and 0.102 for the branches). Losses are of
the velocity of held-out items at the same noisy states, means over the seeds.

At the rate of the rest the vectors lag behind in 1000 steps, and the loss is 4 % above that of adaLN; at ten times the rate, for
both networks, it is less than 1 %. On the photographs the DiT has the lower loss (by 3 to 4 %) and draws high frequencies worse.

`*_high_error` is the mean |log(P / P_data)| of the power spectra of samples over frequencies in the upper half of the band,
`floor_high_error` that of the test split.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import diffjax
from diffjax import data, losses, networks, processes, solvers, times
from diffjax.networks import Branch, DiMR, DiT, sinusoids
from diffjax.networks.dimr import TimeNorm
from diffjax.networks.layers import Dense, modulate, plain_norm
from diffjax.training import flops
from experiments.networks.short_training import last, train_seeds, velocity_error
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=85,
    paper="arXiv:2406.09416",
    claim="norms between two vectors match adaLN within 2 % with a fifth of its time parameters; two branches have less "
    "high-frequency error on photographs than a patch-4 transformer of at least the operations",
    expect={
        "loss_over_adaptive": at_most(1.02),
        "adaptive_parameters_ratio": at_least(5.0),
        "time_independent_error": at_most(0.0),
        "operations_over_patch4": at_most(1.0),
        "high_error_over_patch4": at_most(1.0),
    },
    minutes=3,
)
PROCESS = processes.rectified()
LAYER_NORM = functools.partial(TimeNorm, centred=True)
VECTORS = {f"{name}_{end}" for name in ("scale", "bias") for end in ("0", "1", "slope", "shift")}
FASTER = 10.0


class AdaptiveNorm(nn.Module):
    """Layer normalisation with scale and shift from an MLP of the time."""

    @nn.compact
    def __call__(self, x, u):
        """Normalise x [B, ..., d] at u [B]."""
        d = x.shape[-1]
        code = nn.silu(Dense(d, name="hidden")(sinusoids(u, d, (0.1, 10.0))))
        shift, scale = jnp.split(Dense(2 * d, zero=True, name="out")(code), 2, axis=-1)
        return modulate(plain_norm(x), shift, scale)


def time_parameters(params):
    """How many numbers the norms of blocks hold."""
    found = jax.tree_util.tree_leaves_with_path(params)
    return sum(a.size for p, a in found if any(n in jax.tree_util.keystr(p) for n in ("norm_mlp", "norm_attention")))


def high_error(x, reference):
    """Mean |log ratio| of power spectra over the upper half of the band."""
    power = lambda x: np.mean(np.abs(np.fft.fft2(np.asarray(x, np.float64), axes=(1, 2))) ** 2, axis=(0, 3))
    f = np.abs(np.fft.fftfreq(x.shape[1]))
    high = np.maximum(f[:, None], f[None]) >= 0.25
    return np.mean(np.abs(np.log(power(x) / power(reference)))[high])


def faster(optimizer):
    """The vectors of norms at FASTER times the rate of the rest.

    Adam moves a vector by at most the rate a step, and the scale that a layer of adaLN puts out by the sum over its inputs.
    """
    vectors = lambda params: jax.tree_util.tree_map_with_path(lambda path, a: path[-1].key in VECTORS, params)
    return optax.chain(optimizer, optax.masked(optax.scale(FASTER), vectors))


def operations(net, one):
    """Of one evaluation of an item."""
    params = jax.eval_shape(net.init, jax.random.key(0), *one)["params"]
    return flops.count(networks.from_linen(net), params, *one).total


def examples(shape):
    """An item, its time and its label, of zeros."""
    return jnp.zeros((1, *shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32)


def compare(pictures, nets, *, steps, batch, seeds, made):
    """Figures `name_loss`, `name_high_error` and their spreads over the seeds, pictures, and parameters of the first seed."""
    seen, held = ({k: pictures.read(split)[k] for k in ("x", "label")} for split in ("train", "test"))
    classes = pictures.num_classes
    null = networks.null_condition(num_classes=classes)
    label = np.arange(made) % classes
    noise = PROCESS.prior(jax.random.key(2), (made, *pictures.shape))
    solver = solvers.heun(PROCESS, times.uniform(15))
    out, params = {}, {}
    for name, net in nets.items():
        aux = isinstance(net, DiMR)  # the outputs of lower branches are for the training alone
        trained = net.clone(auxiliary=True) if aux else net
        fn = networks.from_linen(trained)
        model = lambda p, fn=fn, aux=aux: diffjax.denoiser(fn, PROCESS, diffjax.from_velocity, p, null=null, aux=aux)
        loss = losses.flow_matching(sides=losses.side_outputs() if aux else None)
        starts = [
            networks.initialise(trained, jax.random.key(seed), *examples(pictures.shape)) for seed in range(seeds)
        ]
        found = [last(p) for p in train_seeds(model, loss, starts, seen, steps=steps, batch=batch, wrap=faster)]
        bare = networks.from_linen(net)
        error = velocity_error(PROCESS, bare, held["x"], held["label"])
        plain = lambda p, bare=bare: diffjax.denoiser(bare, PROCESS, diffjax.from_velocity, p, null=null)
        draw = jax.jit(lambda p, plain=plain: diffjax.sample(jax.random.key(1), plain(p).bind(label), solver, noise))
        samples = [draw(p) for p in found]
        scores = {"loss": [float(error(p)) for p in found], "high_error": [high_error(x, seen["x"]) for x in samples]}
        for kind, values in scores.items():
            out |= {f"{name}_{kind}": np.mean(values), f"{name}_{kind}_spread": np.ptp(values)}
        out[f"{name}_grid"] = samples[0][:20]
        params[name] = found[0]
    out["floor_high_error"] = high_error(held["x"], seen["x"])
    return out, params


def time_independent_error(net, params, noise):
    """How much the time changes what a network says of noise when p1 = p0 in all norms."""
    ends = lambda path, a: p_zero(params, path) if path[-1].key.endswith("_1") else a
    flat = jax.tree_util.tree_map_with_path(ends, params)
    f = jax.jit(networks.from_linen(net))
    one, other = (f(flat, noise, jnp.full(8, t), np.arange(8)) for t in (0.1, 0.9))
    return jnp.abs(one - other).max()


def run(preset):
    full = preset == "full"
    width, depth, small, seeds = (32, 3, (1, 3), 2) if full else (8, 1, (1, 1), 1)
    size = dict(steps=1000, batch=32, seeds=seeds, made=500) if full else dict(steps=2, batch=4, seeds=seeds, made=10)
    digits, photos = data.load("digits"), data.load("photos", image_size=16)

    norms = DiMR(branches=(Branch(width, depth, 2, 2), Branch(width // 2, small[0], 1)), kernel=3, num_classes=10)
    norms = {"layer_norm": norms.clone(norm=LAYER_NORM), "adaptive": norms.clone(norm=AdaptiveNorm)}
    told, params = compare(digits, norms, **size)
    numbers = {name: time_parameters(p) for name, p in params.items()}
    noise = PROCESS.prior(jax.random.key(2), (8, *digits.shape))

    ours = DiMR(branches=(Branch(width, depth, 2, 2), Branch(width // 2, small[1], 1)), kernel=5, num_classes=2)
    one = examples(photos.shape)
    rival = lambda wide: DiT(width=wide, depth=depth, heads=2, patch=4, num_classes=2)
    budget, wide = operations(ours, one), 8
    while operations(rival(wide), one) < budget:
        wide += 8
    drawn, _ = compare(photos, {"branches": ours, "patch4": rival(wide)}, **size)
    return {
        **{name: a for name, a in told.items() if "high_error" not in name},
        **drawn,
        "loss_over_adaptive": told["layer_norm_loss"] / told["adaptive_loss"],
        **{f"{name}_time_parameters": n for name, n in numbers.items()},
        "adaptive_parameters_ratio": numbers["adaptive"] / numbers["layer_norm"],
        "time_independent_error": time_independent_error(norms["layer_norm"], params["layer_norm"], noise),
        "operations_over_patch4": budget / operations(rival(wide), one),
        "loss_over_patch4": drawn["branches_loss"] / drawn["patch4_loss"],
        "high_error_over_patch4": drawn["branches_high_error"] / drawn["patch4_high_error"],
    }


def p_zero(params, path):
    """The vector p0 that belongs to the p1 at `path`."""
    *above, end = (k.key for k in path)
    for name in above:
        params = params[name]
    return params[end[:-1] + "0"]
