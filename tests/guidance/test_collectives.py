"""A batch-sharded guided sampler moves no data between devices; compiled in a subprocess with the default flags."""

import os
import subprocess
import sys

SCRIPT = """
import jax, jax.numpy as jnp, diffjax
from diffjax import processes, solvers, times
from diffjax.guidance import cfg, chain, clip_x0, interval
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
p = processes.cosine()
net = lambda w, x, t, c: jnp.tanh(x @ w) + c[:, None] + t[:, None]
d = diffjax.denoiser(net, p, diffjax.from_x0, jnp.ones((4, 4)), null=0.0)
d = chain(interval(cfg(2.0), 0.2, 0.8), clip_x0(1.0))(d)
x, c = jax.device_put((jnp.ones((16, 4)), jnp.ones(16)), split)
run = jax.jit(lambda d, x, c: diffjax.sample(jax.random.key(0), d.bind(c), solvers.ddim(p, times.uniform(5)), x))
text = run.lower(d, x, c).compile().as_text()
assert "while" in text
names = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
print("found:", [n for n in names if n + "(" in text or n + "-start(" in text])
"""


def test_a_sharded_guided_sampler_has_no_collectives():
    env = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu")
    out = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    assert "found: []" in out.stdout
