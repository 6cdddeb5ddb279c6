"""Paris: eight experts of clusters of features, each trained in a process of its own, and top-2 routing.

Cluster the digits by k-means on the features of a classifier. Train eight experts, each on its cluster from its own seed,
and a router p(k | x_t, t, label) after them on all; sample with the two most probable experts of every item, renormalised.
The control is the same system on a random partition. Two experts are trained again in processes of their own and compared
bit for bit with the same runs one after the other here.

The experts are narrower than a picture, so they predict the clean one: noise has full rank. MMD^2 is that of pixels against
the 360 test digits, the same for all; `mmd_noise` is the spread of a score over three draws of noise by one model. The paper
scores with FID on a model a thousand times as large.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import data, losses, metrics, networks, processes, solvers, times
from diffjax.experts import mixture, router
from experiments.recipe import Recipe, at_least, at_most
from experiments.scale.isolation import Net, cluster_and_label, init, stack, train

RECIPE = Recipe(
    ledger=171,
    paper="arXiv:2510.03434",
    claim="top-2 of eight isolated experts samples no worse than all of them and better than experts of a random "
    "partition; experts of separate processes are those of a sequential run, bit for bit",
    expect={
        "top2_over_full": at_most(1.05),
        "random_over_top2": at_least(1.0),
        "experts_that_differ": at_most(0),
    },
    minutes=2,
)
PROCESS = processes.rectified()
SIZES = {  # K, steps, batch, width, depth, samples, sampling steps
    "full": (8, 600, 64, 48, 2, 1000, 20),
    "tiny": (2, 2, 8, 8, 1, 40, 2),
}


def partition(preset):
    """The digits and their clusters, alike in every process."""
    digits = data.load("digits")
    other = digits.read("classifier")
    steps, width = (400, 8) if preset == "full" else (3, 4)
    judge = metrics.classifier(other["x"], other["label"], steps=steps, width=width)
    return digits, data.clusters(digits, SIZES[preset][0], features=judge.features, seed=0)


def models(preset):
    """The networks of the experts and of the router."""
    count, _, _, width, depth, *_ = SIZES[preset]
    expert = networks.from_linen(Net(width, depth, 10))
    route = networks.from_linen(networks.Classifier(classes=count, width=width // 2, depth=1, num_classes=10))
    return (
        (expert, lambda p: diffjax.denoiser(expert, PROCESS, diffjax.from_x0, p)),
        (route, lambda p: router(route, PROCESS, p)),
    )


def experts(preset, digits, which):
    """The parameters of experts `(clusters, k)`, each trained on its cluster from seed k."""
    _, steps, batch, *_ = SIZES[preset]
    (net, model), _ = models(preset)
    parts = [data.restrict(digits, found, k) for found, k in which]
    seeds = [k for _, k in which]
    start = [init(net, k, digits.shape) for k in seeds]
    return train(model, losses.denoising_loss(label_drop=0.0), start, parts, steps=steps, batch=batch, seeds=seeds)


def systems(preset, digits, partitions):
    """`(experts side by side, router)` of each partition; one program trains the experts of all."""
    count, steps, batch, *_ = SIZES[preset]
    _, (net, model) = models(preset)
    routers = train(
        model, losses.router_loss(), [init(net, count, digits.shape)] * len(partitions),
        [data.label_clusters(digits, found) for found in partitions],
        steps=steps, batch=4 * batch, seeds=[count] * len(partitions), condition=cluster_and_label,
    )  # fmt: skip
    params = experts(preset, digits, [(found, k) for found in partitions for k in range(count)])
    return [(stack(params[i * count : (i + 1) * count]), r) for i, r in enumerate(routers)]


def run(preset):
    full = preset == "full"
    count, *_, n, sampling = SIZES[preset]
    digits, found = partition(preset)
    again = 2 if full else 1
    apart = [start_process(preset, found, k) for k in range(again)]  # they train while this process does

    shuffled = data.Clusters(
        found.dataset, found.centers, np.random.default_rng(0).permutation(found.assignment).astype(np.int32)
    )
    (_, model), (_, guide) = models(preset)
    real = digits.read("test")
    score = jax.jit(metrics.mmd_to(real["x"].reshape(len(real["x"]), -1)))
    label, solver = jnp.arange(n) % 10, solvers.ddim(PROCESS, times.uniform(sampling))

    @jax.jit
    def sample(denoiser, key):
        x = PROCESS.prior(key, (n, *digits.shape))
        return diffjax.sample(key, denoiser.bind(label), solver, x)

    mmds, pictures = {}, {}
    for name, (params, r) in zip(("", "random_"), systems(preset, digits, (found, shuffled)), strict=True):
        for kind, top in (("full", None), ("top1", 1), ("top2", 2)):
            draws = [
                sample(mixture(model(params), guide(r), top=top), jax.random.key(i)) for i in range(3 if full else 1)
            ]
            mmds[name + kind] = [float(score(x.reshape(n, -1))) for x in draws]
            pictures[f"{name}{kind}_grid"] = np.clip(digits.transform.decode(np.asarray(draws[0][:20])), 0, 16)
    mean = {name: np.mean(values) for name, values in mmds.items()}
    floor = abs(float(score(jnp.asarray(digits.read("classifier")["x"]).reshape(-1, 64))))

    here = [experts(preset, digits, [(found, k)])[0] for k in range(again)]  # the same runs, one after the other
    there = [finish(*process) for process in apart]
    differ = sum(
        not all(a.tobytes() == b.tobytes() for a, b in zip(map(np.asarray, jax.tree.leaves(p)), q, strict=True))
        for p, q in zip(here, there, strict=True)
    )
    return {
        **{f"{name}_mmd": value for name, value in mean.items()},
        "mmd_floor": floor,
        "mmd_noise": np.std(mmds["full"]),
        "smallest_cluster": found.sizes.min(),
        "top2_over_full": max(mean["top2"], floor) / max(mean["full"], floor),
        "random_over_top2": max(mean["random_top2"], floor) / max(mean["top2"], floor),
        "experts_that_differ": differ,
        **pictures,
    }


def start_process(preset, found, k):
    """Train one expert in a process of its own, which knows the clusters and its number alone."""
    folder = tempfile.TemporaryDirectory()
    path = pathlib.Path(folder.name) / "clusters.npz"
    found.save(path)
    root = pathlib.Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    if jax.config.jax_compilation_cache_dir is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(jax.config.jax_compilation_cache_dir)
    command = [sys.executable, "-m", "experiments.scale.paris", preset, str(path), str(k)]
    return subprocess.Popen(command, cwd=root, env=environment), path, folder


def finish(process, path, folder):
    """The parameters that a process has left."""
    with folder:
        try:
            code = process.wait(timeout=1200)
        finally:
            process.kill()
        if code:
            raise RuntimeError(f"the process of an expert ended with code {code}")
        with np.load(path.with_name("expert.npz")) as page:
            return [page[name] for name in page.files]


if __name__ == "__main__":
    preset, path, k = sys.argv[1:]
    params = experts(preset, data.load("digits"), [(data.load_clusters(path), int(k))])[0]
    np.savez(pathlib.Path(path).with_name("expert.npz"), *map(np.asarray, jax.tree.leaves(params)))
