"""Rules: every kind only moves numbers, to where a loop would put them, and back; what does not fit is named."""

import jax
import ml_dtypes
import numpy as np
import pytest
from interop_tools import equal

from diffjax.interop import Rule, kinds, load, rules, save
from diffjax.training import CheckpointError

H, D, IN = 3, 2, 5  # heads, their size, inputs
MATRIX, VECTOR = (H * D, IN), (H * D,)


def numbered(*shapes):
    """Arrays without two equal numbers."""
    ends = np.cumsum([0] + [int(np.prod(s)) for s in shapes])
    return [np.arange(a, b, dtype="float32").reshape(s) for a, b, s in zip(ends, ends[1:], shapes, strict=False)]


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        (kinds.same, [(2, 3)], (2, 3)),
        (kinds.dense, [(2, 3)], (3, 2)),
        (kinds.dense, [(2,)], (2,)),
        (kinds.conv, [(4, 5, 3, 2)], (3, 2, 5, 4)),
        (kinds.conv, [(4, 5, 3)], (3, 5, 4)),
        (kinds.conv1x1, [(4, 5, 1, 1)], (5, 4)),
        (kinds.pointwise(1), [(4, 5, 1)], (5, 4)),
        (kinds.qkv(H), [MATRIX] * 3, (IN, 3 * H * D)),
        (kinds.qkv(H), [VECTOR] * 3, (3 * H * D,)),
        (kinds.kv(H), [MATRIX] * 2, (IN, 2 * H * D)),
        (kinds.by_head_fused(H, 3), [(3 * H * D, IN)], (IN, 3 * H * D)),
        (kinds.by_head_fused(H, 2), [(2 * H * D,)], (2 * H * D,)),
        (kinds.chunks((1, 2, 0)), [(6, IN)], (IN, 6)),
        (kinds.chunks((1, 2, 0)), [(6,)], (6,)),
        (kinds.shaped((4, 3), (1, 4, 3)), [(1, 4, 3)], (4, 3)),
        (kinds.stacked(kinds.dense, 2), [(3, 4)] * 2, (2, 4, 3)),
        (kinds.stacked(kinds.qkv(H), 2, 3), [MATRIX] * 6, (2, IN, 3 * H * D)),
    ],
    ids=lambda a: a.name if isinstance(a, kinds.Kind) else str(a),
)
def test_kinds_only_move_numbers_and_are_inverse(kind, theirs, ours):
    arrays = numbered(*theirs)
    read = kind.read(*arrays)
    assert read.shape == ours
    assert sorted(read.reshape(-1)) == list(range(read.size))
    back = kind.write(np.ascontiguousarray(read))
    assert len(back) == len(arrays)
    for a, b in zip(arrays, back, strict=True):
        np.testing.assert_array_equal(a, b)
    traced = jax.eval_shape(kind.write, jax.ShapeDtypeStruct(ours, np.float32))
    assert [a.shape for a in traced] == list(theirs)


def test_where_the_columns_of_a_head_go():
    q, k, v = numbered(*[MATRIX] * 3)
    found = kinds.qkv(H).read(q, k, v)
    fused = kinds.by_head_fused(H, 3).read(np.concatenate([q, k, v]))
    biases = kinds.qkv(H).read(*(a[:, 0] for a in (q, k, v)))
    column = 0
    for head in range(H):
        for a in (q, k, v):
            for row in range(head * D, (head + 1) * D):
                np.testing.assert_array_equal(found[:, column], a[row])
                np.testing.assert_array_equal(fused[:, column], a[row])
                assert biases[column] == a[row, 0]
                column += 1


def test_which_chunk_goes_where():
    (a,) = numbered((6, IN))
    found = kinds.chunks((1, 2, 0)).read(a)
    for ours, theirs in enumerate((1, 2, 0)):
        np.testing.assert_array_equal(found[:, 2 * ours : 2 * ours + 2], a[2 * theirs : 2 * theirs + 2].T)


def test_where_the_places_of_a_convolution_go():
    (a,) = numbered((4, 5, 3, 2))
    assert kinds.conv.read(a)[2, 1, 4, 3] == a[3, 4, 2, 1]


# ------------------------------------------------------------------------------------------------- both directions

RULES = [
    *rules.joined("attention/qkv", ("to_q", "to_k", "to_v"), kinds.qkv(2)),
    *rules.layer("out", "proj", bias=False),
    *rules.norm("norm", "ln"),
]
TEMPLATE = {
    "attention": {"qkv": {"kernel": (3, 12), "bias": (12,)}},
    "out": {"kernel": (3, 2)},
    "norm": {"scale": (3,), "bias": (3,)},
}
TEMPLATE = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, np.float32), TEMPLATE, is_leaf=lambda a: isinstance(a, tuple))


def theirs(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = rules.shapes_of(RULES, TEMPLATE)
    return {n: rng.standard_normal(s).astype(dtype) for n, s in shapes.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_a_round_trip_is_equal_in_every_bit(dtype):
    params = load(RULES, theirs(dtype), TEMPLATE)
    assert params["out"]["kernel"].dtype == dtype
    assert equal(save(RULES, params), theirs(dtype))


def test_a_dtype_may_be_asked_for():
    params = load(RULES, theirs("float16"), TEMPLATE, dtype=np.float32)
    assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype("float32")}
    np.testing.assert_array_equal(params["norm"]["scale"], theirs("float16")["ln.weight"].astype("float32"))


class Untouched(dict):
    """Shapes may be asked for, arrays may not."""

    source = "the file"

    @property
    def shapes(self):
        return {n: a.shape for n, a in self.items()}

    def __getitem__(self, name):
        raise AssertionError("an array was read")


def test_all_that_does_not_fit_is_named_at_once_and_nothing_is_read():
    found = theirs()
    del found["ln.weight"], found["proj.weight"]
    found |= {"to_q.weight": np.zeros((9, 3)), "mystery.weight": np.zeros(2), "steps": np.zeros(())}
    with pytest.raises(CheckpointError) as error:
        load(RULES, Untouched(found), TEMPLATE)
    text = str(error.value)
    assert "the file does not fit its configuration" in text
    assert "missing (2): ln.weight, proj.weight" in text
    assert "unexpected (2): mystery.weight, steps" in text
    assert "of another shape (1): to_q.weight: [9, 3] instead of [4, 3]" in text
    assert "from one place" in text


def test_ignored_buffers_and_older_names():
    found = theirs()
    found["steps"] = np.zeros(())
    found["attn.query.weight"] = found.pop("to_q.weight")
    with pytest.raises(CheckpointError, match="missing .1.: to_q.weight\nunexpected .2.: attn.query.weight, steps"):
        load(RULES, found, TEMPLATE)
    params = load(RULES, found, TEMPLATE, ignored=("^steps$",), renames=((r"^attn\.query\.", "to_q."),))
    assert equal(save(RULES, params), theirs())


def test_long_lists_are_cut():
    found = {f"extra.{i}": np.zeros(1) for i in range(40)}
    with pytest.raises(CheckpointError, match=r"extra[.]19, and 28 more"):
        load(RULES, theirs() | found, TEMPLATE)


@pytest.mark.parametrize(
    "table",
    [RULES[1:], [*RULES, RULES[0]], [*RULES, Rule("other/kernel", ("x",), kinds.same)]],
    ids=["less", "twice", "more"],
)
def test_rules_of_another_network(table):
    with pytest.raises(ValueError, match="the rules do not fit the network: (attention/qkv|other)/kernel"):
        load(table, theirs(), TEMPLATE)
