"""Messages of a transformer's training step in every layout, counted in the compiled program, against theory."""

import jax
from collectives import BATCH, DIT, SIDE, dit_parts, of_dit

from diffjax import networks
from diffjax.networks import DiT
from diffjax.training import Layout

SCALAR = 4


def dit_bytes(spec=lambda path, shape: True):
    """Bytes of the transformer's parameters that `spec` chooses."""
    params = dit_parts(depth=1)[1]
    named = jax.tree_util.tree_flatten_with_path(params)[0]
    path = lambda p: jax.tree_util.keystr(p, simple=True, separator="/")
    return sum(a.nbytes for p, a in named if spec(path(p), a.shape))


def leaves_cut(n):
    """How many parameters have an axis that n divides, and their bytes."""
    cut = lambda path, shape: any(size % n == 0 for size in shape)
    return sum(any(s % n == 0 for s in a.shape) for a in jax.tree.leaves(dit_parts(depth=1)[1])), dit_bytes(cut)


def test_fsdp_gathers_parameters_and_scatters_gradients_once():
    """gather: bytes of the parameters;   scatter: of a device's part;   all-reduce: of that part and of what is not cut."""
    n, size = leaves_cut(4)
    found = of_dit("data and fsdp")
    assert found["all-gather"] == (n, size) and found["reduce-scatter"] == (n, size // 4)
    floor = size // 4 + dit_bytes() - size
    assert floor <= found["all-reduce"][1] <= floor + SCALAR * (n + 4)
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"}


def test_fsdp_by_the_compiler_moves_the_bytes_of_theory():
    """On a CPU the compiler has no reduce-scatter and reduces whole gradients; GPUs and TPUs turn that into scatters.

    Where a table is looked up it exchanges rows instead of gathering the table, which is less.
    """
    n, size = leaves_cut(8)
    found = of_dit("fsdp by the compiler")
    ids = BATCH * 4  # the labels are told to all
    table = 5 * DIT["width"] * 4
    assert found["all-gather"][0] <= n and size - table <= found["all-gather"][1] <= size + ids
    assert found["all-reduce"][1] <= dit_bytes() + SCALAR * (n + 4)
    assert found.get("all-to-all", (0, 0))[1] <= table


def test_tensor_parallelism_sends_two_sums_of_activations_per_block_and_direction():
    """all-reduce over model: attention and MLP, forward and backward; the projection to q, k, v and the split send nothing."""
    found = of_dit("model")
    b, tokens, d = BATCH // 4, (SIDE // DIT["patch"]) ** 2, DIT["width"]
    layout = Layout(data=4, model=2, rules=networks.partition_rules(DiT()))
    cut = dit_bytes(lambda path, shape: "model" in layout.spec(path, shape))
    gradient = dit_bytes() - cut // 2
    blocks = 4 * b * tokens * d * 4
    code = (1 + 3) * b * d * 4  # of time forward; its gradients from the two modulations, and through its hidden layer
    low = gradient + blocks
    assert low <= found["all-reduce"][1] <= low + code + SCALAR * 100, (found, low, code)
    modulation = (6 + 2) * b * d * 4
    assert found["all-gather"] == (2, modulation)  # one of the block, one of the output
    assert set(found) == {"all-reduce", "all-gather"}


def test_sequence_parallelism_gathers_keys_and_values():
    """Gathered forward, summed backward; the gradient is summed along sequence, then along data, each its own message.

    Two messages, because a weight's gradient sums over items and over tokens, two axes of one product, and the compiler
    sends one message for each that is cut.
    """
    found = of_dit("sequence")
    b, tokens, d = BATCH // 4, (SIDE // DIT["patch"]) ** 2, DIT["width"]
    kv = 2 * b * tokens * d * 4
    assert found["all-gather"] == (2, kv)
    gradient = dit_bytes()
    assert gradient + kv <= found["all-reduce"][1] <= 2 * gradient + kv + SCALAR * 200
    assert set(found) == {"all-reduce", "all-gather"}


def test_all_axes_by_hand_and_by_the_compiler_together():
    """FSDP of what tensor parallelism leaves to a device, and no message of parameters along `model`."""
    found = of_dit("data, fsdp and model")
    layout = Layout(data=2, fsdp=2, model=2, rules=networks.partition_rules(DiT()))
    own = 0
    for path, a in jax.tree_util.tree_flatten_with_path(dit_parts(depth=1)[1])[0]:
        spec = layout.spec(jax.tree_util.keystr(path, simple=True, separator="/"), a.shape)
        own += ("fsdp" in spec) * a.nbytes // (2 if "model" in spec else 1)
    modulation = (6 + 2) * BATCH // 4 * DIT["width"] * 4
    assert found["all-gather"][1] == own + modulation
    assert found["reduce-scatter"][1] == own // 2
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"}
