"""DiffuseVAE: a variational autoencoder draws a blurred picture, and a diffusion model refines it.

Stage 1: a VAE of 8 numbers a picture. Stage 2 sees its reconstruction xhat in one of two ways.
F1: eps([x_t, xhat], t), one more input of the same process.
F2: q(x_t | x_{t-1}) = N(a x_{t-1} + (1 - a) xhat, b I), whose marginals are those of the plain process moved by xhat; so the
network gets y_t + xhat, and all else is plain (`networks.offset_by_image`, with the reconstruction kept as an input, as in the
released code).
Draw z from N(0, I), or from a mixture of Gaussians fitted to the latents after training (ex-post), decode it, and refine in
T = 10 steps. Every model has the same network and budget, and every figure is a mean over `SEEDS` sets of samples. The process
of F2 is simulated by its moments, step by step, against the closed forms that the solvers use.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture

import diffjax
from diffjax import data, losses, metrics, networks, processes, solvers, times
from experiments.loop import trainer
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=19,
    paper="arXiv:2201.00308",
    claim="refined in 10 steps, samples of a VAE are better than it, and than 10 steps of a model without it, in both "
    "formulations; the marginals and posteriors of F2 are those simulated",
    expect={
        "f2_marginal_error": at_most(1e-3),
        "f2_posterior_error": at_most(1e-3),
        "f1_over_unconditional": at_most(1.0),
        "f2_over_unconditional": at_most(1.0),
        "f1_over_vae": at_most(1.0),
        "f2_over_vae": at_most(1.0),
        "f1_over_vae_from_normal": at_most(1.0),
        "f2_over_vae_from_normal": at_most(1.0),
        "class_kept_by_refinement": at_least(0.8),
        "largest_share_of_a_tenth_of_the_path": at_most(0.3),
    },
    minutes=2,
)
T, PROCESS = 10, processes.cosine()
SAMPLERS = {"ddpm": solvers.ddpm, "ddim": solvers.ddim}


class Net(nn.Module):
    """The residual MLP on a flattened picture, beside the picture of the condition if there is one."""

    width: int

    @nn.compact
    def __call__(self, x, t, cond=None):
        """`x` [B, 8, 8, 1]."""
        given = [x] if cond is None else [x, cond["image"]]
        flat = jnp.concatenate([a.reshape(len(x), -1) for a in given], -1)
        mlp = networks.MLP(width=self.width, depth=4, out_features=x[0].size)
        return mlp(flat, t).reshape(x.shape)


def simulated(betas):
    """Largest errors of the closed forms of F2: marginals, and posteriors by conditioning the joint law of two steps."""
    process, steps = processes.from_betas(betas), np.arange(1, len(betas) + 1) / len(betas)
    a, mean, variance = np.sqrt(1 - betas), np.array([1.0, 1.0]), 0.0  # mean = [x0, xhat] . (1, 1)
    marginal, posterior = [], []
    for k, b in enumerate(betas):
        before = variance
        mean = np.array([a[k] * mean[0], 1.0 if k == 0 else a[k] * mean[1] + 1 - a[k]])
        variance = a[k] ** 2 * before + b
        alpha, sigma = process.alpha(steps[k]), process.sigma(steps[k])
        marginal += [abs(mean[0] - alpha), abs(mean[1] - 1), abs(np.sqrt(variance) - sigma)]
        if k:
            gain = a[k] * before / variance  # of x_{k-1} given x_k and x0
            c_t, c_0, v = process.posterior(steps[k - 1], steps[k])
            exact = gain, mean[0] / a[k] - gain * mean[0], before * (1 - a[k] * gain)
            posterior += [abs(p - q) for p, q in zip((c_t, c_0, v), exact, strict=True)]
    return max(marginal), max(posterior)


def flat(pictures):
    return np.asarray(pictures).reshape(len(pictures), -1)


@jax.jit
def sample(denoiser, solver, key, start):
    return diffjax.sample(key, denoiser, solver, start)


def run(preset):
    full = preset == "full"
    n, stage1, stage2, width, seeds, pairs = (1000, 1000, 2000, 128, 4, 40) if full else (30, 3, 3, 16, 1, 3)
    digits = data.load("digits")
    x = jnp.asarray(digits.read("train")["x"])
    test, other = digits.read("test"), digits.read("classifier")
    judge = LogisticRegression(max_iter=300).fit(flat(other["x"]), other["label"])
    mmd = metrics.mmd(np.concatenate([test["x"], other["x"]]))
    score = lambda make: float(np.mean([metrics.score(mmd, np.asarray(make(jax.random.key(s)))) for s in range(seeds)]))

    vae = networks.autoencoder(
        networks.KLAutoencoder(widths=(48,), patch=4, latent_channels=2, middle_attention=False, out_channels=1)
    )
    elbo = losses.autoencoder_loss(losses.squared, kl=0.2)
    auto = vae(trainer(vae, elbo, stage1)(vae.init(jax.random.key(0), x[:1]), {"x": x}))
    posterior = jax.jit(auto.encode)(x)
    decode = jax.jit(auto.decode)
    image = decode(posterior.mean)
    shape = posterior.mean.shape[1:]
    gmm = GaussianMixture(min(20, len(x) // 20), reg_covar=1e-3, random_state=0)
    gmm.fit(flat(posterior.mean).astype(np.float64))

    def latents(key, expost=True):
        if not expost:
            return jax.random.normal(key, (n, *shape))
        gmm.random_state = seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
        z = np.random.default_rng(seed).permutation(gmm.sample(n)[0])  # which come sorted by component
        return jnp.asarray(z.reshape(n, *shape), jnp.float32)

    def draw(denoiser, solver, key):
        k_start, k_path = jax.random.split(key)
        return sample(denoiser, solver, k_path, PROCESS.prior(k_start, (n, 8, 8, 1)))

    net = networks.from_linen(Net(width))
    forms = {"unconditional": net, "f1": net, "f2": networks.offset_by_image(net, keep=True)}
    loss = losses.v_prediction(label_drop=0.0)
    models = {}
    for name, f in forms.items():
        cond = {} if name == "unconditional" else {"image": image}
        model = lambda p, f=f: diffjax.denoiser(f, PROCESS, diffjax.from_v, p, null=None)
        fresh = f.init(jax.random.key(1), x[:1], jnp.zeros(1), jax.tree.map(lambda a: a[:1], cond) or None)
        models[name] = model(trainer(model, loss, stage2, batch=128)(fresh, {"x": x, **cond}))

    out = dict(zip(("f2_marginal_error", "f2_posterior_error"), simulated(np.linspace(0.02, 0.5, T)), strict=True))
    for law, expost in (("", True), ("_normal", False)):
        out[f"vae{law}_mmd"] = score(lambda key, e=expost: decode(latents(key, e)))
        for name, model in models.items():
            for way, solver in SAMPLERS.items():
                solver = solver(PROCESS, times.uniform(T))
                given = lambda key, e=expost, name=name: (
                    None if name == "unconditional" else {"image": decode(latents(key, e))}
                )
                make = lambda key, m=model, s=solver, c=given: draw(m.bind(c(jax.random.fold_in(key, 1))), s, key)
                out[f"{name}_{way}{law if name != 'unconditional' else ''}_mmd"] = score(make)
    floor = abs(metrics.score(mmd, np.asarray(x[: len(test["x"])])))
    best = lambda name, law="": max(min(out[f"{name}_{way}{law}_mmd"] for way in SAMPLERS), floor)
    for name in ("f1", "f2"):
        out[f"{name}_over_unconditional"] = best(name) / best("unconditional")
        out[f"{name}_over_vae"] = best(name) / max(out["vae_mmd"], floor)
        out[f"{name}_over_vae_from_normal"] = best(name, "_normal") / max(out["vae_normal_mmd"], floor)

    # a straight path of latents between two pictures of other classes, refined from one noise
    rng = np.random.default_rng(0)
    first = rng.integers(0, len(x), pairs)
    label = digits.read("train")["label"]
    second = np.array([rng.choice(np.flatnonzero(label != label[i])) for i in first])
    weights = jnp.linspace(0, 1, T + 1).reshape(-1, 1, 1, 1, 1)
    z = (1 - weights) * posterior.mean[first][None] + weights * posterior.mean[second][None]
    blurred = decode(z.reshape(-1, *shape))
    noise = jnp.tile(PROCESS.prior(jax.random.key(5), (pairs, 8, 8, 1)), (T + 1, 1, 1, 1))
    solver = solvers.ddim(PROCESS, times.uniform(T))
    refined = sample(models["f1"].bind({"image": blurred}), solver, jax.random.key(6), noise)
    path = np.asarray(refined).reshape(T + 1, pairs, -1)
    moved = np.linalg.norm(np.diff(path, axis=0), axis=-1)
    picture = lambda a: np.clip(digits.transform.decode(np.asarray(a)), 0, 16)
    return {
        **out,
        "mmd_floor": floor,
        "class_kept_by_refinement": np.mean(judge.predict(flat(refined)) == judge.predict(flat(blurred))),
        "largest_share_of_a_tenth_of_the_path": np.mean(moved.max(0) / moved.sum(0)),
        "vae_grid": picture(decode(latents(jax.random.key(9)))[:40]),
        "f1_grid": picture(
            draw(models["f1"].bind({"image": decode(latents(jax.random.key(9)))}), solver, jax.random.key(9))[:40]
        ),
        "unconditional_grid": picture(draw(models["unconditional"].bind(None), solver, jax.random.key(9))[:40]),
        "path_grid": picture(
            np.asarray(refined).reshape(T + 1, pairs, 8, 8, 1)[:, :3].swapaxes(0, 1).reshape(-1, 8, 8, 1)
        ),
    }
