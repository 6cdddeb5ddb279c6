"""DiT-MoE: the MLP of every block of a DiT is many experts, of which each token visits two, and one part for all.

y = sum_{i in top 2} p_i E_i(x) + E_shared(x), p = softmax(x W_r). Beside the loss, the experts are balanced:
alpha sum_i f_i P_i for each layer, f_i = E / (K N) times the tokens that visit expert i, P_i its mean probability.

On the digits, three trainings each: with the penalty, without it, and of a dense network with as many parameters in all.
Operations are counted from the traced program of a forward pass, in which each token meets the experts that it visits alone.
The load is that of the test digits over all times; its coefficient of variation over the experts is the mean over layers.
"""

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import losses, networks, processes
from diffjax.networks import feed_forward
from diffjax.training import flops
from experiments.networks.digit_runs import CLASSES, DIGITS, EXAMPLE, LOSS, shades, test_loss, train
from experiments.recipe import Recipe, at_least, at_most

RECIPE = Recipe(
    ledger=103,
    paper="arXiv:2407.11633",
    claim="at half of the activated operations as good as a dense network of equal size; the penalty brings the coefficient of "
    "variation of the load below 0.2, without it experts collapse; K = E is the dense mixture",
    expect={
        "loss_over_dense": at_most(1.0),
        "activated_over_dense_operations": at_most(0.5),
        "parameters_over_dense": at_most(1.0),
        "load_variation": at_most(0.2),
        "load_variation_without": at_least(0.5),
        "error_of_all_experts": at_most(1e-5),
    },
    minutes=3,
)
K = 2


def all_experts(forms, experts=4, width=16):
    """Largest difference between K = E in every form and the mixture of all experts, written out."""
    x = jax.random.normal(jax.random.key(0), (8, 16, width))
    net = lambda form: networks.SparseMLP(experts, experts, 0, form)
    p = jax.jit(net(feed_forward.dense).init)(jax.random.key(1), x)["params"]

    def expert(gate, up, down):
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    each = jnp.stack([expert(*(p[k]["kernel"][i] for k in ("gate", "up", "down"))) for i in range(experts)], axis=-1)
    want = (each * jax.nn.softmax(x @ p["router"]["kernel"])[:, :, None]).sum(-1)
    return max(float(jnp.abs(jax.jit(net(form).apply)({"params": p}, x) - want).max()) for form in forms)


def run(preset):
    full = preset == "full"
    steps, batch, width, depth, seeds, experts = (400, 48, 32, 2, 3, 8) if full else (3, 8, 8, 1, 1, 4)
    dit = lambda **fields: networks.from_linen(
        networks.DiT(width=width, depth=depth, heads=2, num_classes=CLASSES, act=jax.nn.silu, **fields)
    )
    sparse = lambda form: dit(expand=2, feed_forward=networks.sparse(experts, K, 1, form))
    net, dense = sparse(feed_forward.dense), dit(expand=(3 * 2 * experts + 3) // 2 + 1)
    routers = [f"block_{i}/experts/probabilities" for i in range(depth)]
    tapped = networks.tapped(net, read=routers)

    make = lambda fn, aux: lambda p: diffjax.denoiser(fn, processes.rectified(), diffjax.from_velocity, p, aux=aux)
    balanced = losses.flow_matching(label_drop=0.0, penalty=losses.balance(K, 0.1))
    cases = {
        "balanced": (net, make(tapped, True), balanced),
        "without": (net, make(tapped, True), LOSS),
        "dense": (dense, make(dense, False), LOSS),
    }
    found = {}
    for name, (fn, model, loss) in cases.items():
        starts = [fn.init(jax.random.key(seed), *EXAMPLE) for seed in range(seeds)]
        ends = [params for params, _ in train(model, loss, starts, steps=steps, batch=batch)]
        found[name] = ends, np.array([float(test_loss(model, p)) for p in ends])

    test = DIGITS.read("test")
    t = jnp.linspace(0.02, 0.98, len(test["x"]))
    x = processes.rectified().add_noise(
        jnp.asarray(test["x"]), jax.random.normal(jax.random.key(3), test["x"].shape), t
    )
    seen = jax.jit(lambda p: tapped(p, x, t, jnp.asarray(test["label"]))[1])

    def loads(params):  # [layers, experts]
        return np.stack([np.asarray(losses.expert_load(p, K)) for p in losses.routers(seen(params))])

    variation = {
        name: np.array([(loads(p).std(1) / loads(p).mean(1)).mean() for p in found[name][0]])
        for name in ("balanced", "without")
    }
    work = {
        "sparse": flops.count(sparse(feed_forward.ragged), found["balanced"][0][0], *EXAMPLE).total,
        "dense": flops.count(dense, found["dense"][0][0], *EXAMPLE).total,
    }
    count = lambda name: networks.parameter_count(found[name][0][0])
    return {
        "loss_over_dense": found["balanced"][1].mean() / found["dense"][1].mean(),
        "loss_over_dense_without_balance": found["without"][1].mean() / found["dense"][1].mean(),
        "loss_spread": found["balanced"][1].std() / found["dense"][1].mean(),
        "activated_over_dense_operations": work["sparse"] / work["dense"],
        "parameters_over_dense": count("balanced") / count("dense"),
        "load_variation": variation["balanced"].max(),
        "load_variation_without": variation["without"].min(),
        "largest_load_without": max(loads(p).max() for p in found["without"][0]),
        "error_of_all_experts": all_experts((feed_forward.dense, feed_forward.ragged, feed_forward.capacity(1.0))),
        "dense_loss": found["dense"][1].mean(),
        "loads_image": shades(np.concatenate([experts * loads(found[n][0][0]) / 2 for n in variation])),
    }
