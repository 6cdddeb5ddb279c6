"""How the cuts of parameters and data along the axes `model` and `sequence` travel through a traced program.

Every array has a cut: for each of its axes the mesh axis that divides it, or None. From the cuts of the inputs follow
those of all that is computed, as the compiler's own propagation would choose in the plain cases: products keep the cuts of
their free axes, a sum over a cut axis is a sum over devices, an operand cut where the other needs it whole is gathered.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend import core
from jax.extend.core.primitives import dot_general_p

from diffjax.training.flops import count_product

Cut = tuple  # for each axis of an array: the mesh axis that divides it, or None
SUMS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin")


class Inside(str):
    """The mesh axis that divides an axis which is merged with others before it, as rows of a dense layer are.

    Traced without a mesh, `layers.product` merges what it leaves alone when the axis is cut.
    """

    before: int  # product of the axes in front of it

    def __new__(cls, axis: str, before: int) -> Inside:
        """The axis with what is before it."""
        made = super().__new__(cls, axis)
        made.before = before
        return made


@dataclasses.dataclass
class Follower:
    """Cuts of a program's values; what devices send each other in its forward pass and in the gradient's backward pass.

    `sent` maps `(kind, axis)` to the number of messages and their bytes on one device, `local` and `whole` are the
    operations of the matrix products on one device and without cuts. An operation inside `jax.checkpoint` sends again
    when it is recomputed.
    """

    sizes: Mapping[str, int]
    sent: dict[tuple[str, str], list[int]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(lambda: [0, 0])
    )
    local: float = 0.0
    whole: float = 0.0

    def run(self, jaxpr: core.Jaxpr, cuts: Sequence[Cut], times: int = 1, passes: int = 1) -> list[Cut]:
        """The cuts of the outputs.   cuts: of the inputs.   times: runs.   passes: runs of the forward pass in each."""
        known = dict(zip(jaxpr.invars, cuts, strict=True))
        reduced: set[tuple[int, str]] = set()  # operands whose gradient is already summed over an axis
        read = lambda v: whole(v) if isinstance(v, core.Literal) else known.get(v, whole(v))
        for eqn in jaxpr.eqns:
            outs = self.equation(eqn, [read(v) for v in eqn.invars], times, passes, reduced)
            known.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: core.JaxprEqn, cuts: list[Cut], times: int, passes: int, reduced: set) -> list[Cut]:
        """The cuts of one operation's outputs."""
        name, params = eqn.primitive.name, eqn.params
        inner = next((params[k] for k in ("jaxpr", "call_jaxpr", "branches") if k in params), None)
        if name == "scan":
            return self.scan(eqn, cuts, times, passes)
        if name == "while" or not any(axis for cut in cuts for axis in cut):
            self.count(eqn, cuts, times)
        elif name == "dot_general":
            return [self.product(eqn, *cuts, times, passes, reduced)]
        elif inner is not None:
            inner = inner[0] if name == "cond" else inner
            again = 2 if "policy" in params and not keeps_products(params["policy"]) else passes
            return self.run(
                getattr(inner, "jaxpr", inner), cuts[-len(getattr(inner, "jaxpr", inner).invars) :], times, again
            )
        elif name in SUMS:
            return [self.summed(eqn, cuts[0], times, passes)]
        elif name in MOVES:
            return MOVES[name](self, eqn, cuts, times, passes)
        else:
            return [self.elementwise(eqn, v, cuts, times, passes) for v in eqn.outvars]
        return [whole(v) for v in eqn.outvars]

    def product(self, eqn: Any, a: Cut, b: Cut, times: int, passes: int, reduced: set) -> Cut:
        """The cut of a product; gathers, sums over devices, and sums of the operands' gradients."""
        (over_a, over_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]
        a, b, sums = list(a), list(b), set()
        left, right = eqn.invars[:2]
        for i, j in zip(over_a, over_b, strict=True):
            if a[i] == b[j] or "model" in (a[i], b[j]):  # what is whole is sliced where it is, for nothing
                sums |= {a[i] or b[j]} - {None}
            else:
                a[i], b[j] = self.gathered(left, a, i, times, passes), self.gathered(right, b, j, times, passes)
        batch = [a[i] or b[j] for i, j in zip(batch_a, batch_b, strict=True)]
        free_a = [i for i in range(len(a)) if i not in over_a and i not in batch_a]
        free_b = [j for j in range(len(b)) if j not in over_b and j not in batch_b]
        for j in free_b:
            if b[j] is not None and b[j] in [*batch, *(a[i] for i in free_a)]:
                b[j] = self.gathered(right, b, j, times, passes)
        cut = (*batch, *(a[i] for i in free_a), *(b[j] for j in free_b))
        out = eqn.outvars[0]
        for axis in sums:
            self.send("all-reduce", axis, local_bytes(out, cut, self.sizes), times * passes)
        for mine, free, other, its in ((a, free_a, right, b), (b, free_b, left, a)):
            # The gradient of an operand that lacks the axis is a sum over it; that of parameters over the sequence is
            # part of the sum over the batch.
            if "model" in [mine[i] for i in free] and "model" not in its and (id(other), "model") not in reduced:
                reduced.add((id(other), "model"))
                self.send("all-reduce", "model", local_bytes(other, tuple(its), self.sizes), times)
        work = times * count_product(eqn)
        self.whole += work
        self.local += work / math.prod(self.sizes[axis] for axis in {*cut, *sums} - {None})
        return cut

    def gathered(self, v: Any, cut: list, i: int, times: int, passes: int) -> None:
        """Gather axis i of an operand, if it is cut; over the sequence, its gradient is a sum that is scattered."""
        if cut[i] is not None:
            axis, rest = cut[i], tuple(c for k, c in enumerate(cut) if k != i)
            size = local_bytes(v, rest, self.sizes)
            self.send("all-gather", axis, size, times * passes)
            if axis == "sequence":
                self.send("reduce-scatter", axis, size, times)

    def summed(self, eqn: Any, cut: Cut, times: int, passes: int) -> Cut:
        """A reduction: over devices too where it runs over a cut axis."""
        over = eqn.params["axes"]
        rest = tuple(c for i, c in enumerate(cut) if i not in over)
        for axis in {cut[i] for i in over} - {None}:
            self.send("all-reduce", axis, local_bytes(eqn.outvars[0], rest, self.sizes), times * passes)
        return rest

    def elementwise(self, eqn: Any, out: Any, cuts: list[Cut], times: int, passes: int) -> Cut:
        """Operands of the result's shape decide; of smaller ones, what is cut otherwise is gathered."""
        shape = out.aval.shape
        same = [c for v, c in zip(eqn.invars, cuts, strict=True) if v.aval.shape == shape]
        cut = (
            tuple(next((c[i] for c in same if c[i] is not None), None) for i in range(len(shape)))
            if same
            else whole(out)
        )
        for v, c in zip(eqn.invars, cuts, strict=True):
            if v.aval.shape != shape and len(c) == len(shape):
                for i in [i for i, axis in enumerate(c) if axis not in (None, cut[i])]:
                    self.gathered(v, list(c), i, times, passes)
        return once(cut)

    def scan(self, eqn: Any, cuts: list[Cut], times: int, passes: int) -> list[Cut]:
        """A loop: its carry gets the cut that its own body gives it."""
        p = eqn.params
        body, fixed, carried = p["jaxpr"].jaxpr, p["num_consts"], p["num_carry"]
        start = fixed + carried
        for_body = [*cuts[:start], *(c[1:] for c in cuts[start:])]
        for _ in range(3):
            outs = Follower(self.sizes).run(body, for_body)
            if outs[:carried] == for_body[fixed:start]:
                break
            for_body[fixed:start] = outs[:carried]
        outs = self.run(body, for_body, times * p["length"], passes)
        return [*outs[:carried], *((None, *c) for c in outs[carried:])]

    def split(self, eqn: Any, cuts: list[Cut], times: int, passes: int) -> list[Cut]:
        """Pieces of a cut axis lie on other devices than they are needed on: the axis is gathered."""
        cut, i = list(cuts[0]), eqn.params["axis"]
        self.gathered(eqn.invars[0], cut, i, times, passes)
        return [tuple(None if j == i else c for j, c in enumerate(cut))] * len(eqn.outvars)

    def reshape(self, eqn: Any, cuts: list[Cut], *_: int) -> list[Cut]:
        """A cut stays on the axis that begins where its own began, if that can be divided, or inside merged rows."""
        old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        begin = {math.prod(new[:j]): j for j in range(len(new)) if new[j] > 1}  # the product of the axes before
        rows = len(new) == 2 and old[-1:] == new[-1:]
        cut = [None] * len(new)
        for i, axis in enumerate(cuts[0]):
            if axis is None:
                continue
            start = math.prod(old[:i]) * getattr(axis, "before", 1)
            j = begin.get(start)
            if j is not None and new[j] % self.sizes[axis] == 0:
                cut[j] = str(axis)
            elif rows and start < new[0]:
                cut[0] = Inside(axis, start)
        return [tuple(cut)]

    def broadcast(self, eqn: Any, cuts: list[Cut], *_: int) -> list[Cut]:
        """New axes are whole."""
        out = eqn.outvars[0].aval.shape
        cut = [None] * len(out)
        for i, j in enumerate(eqn.params["broadcast_dimensions"]):
            if eqn.invars[0].aval.shape[i] == out[j]:
                cut[j] = cuts[0][i]
        return [tuple(cut)]

    def kept(self, eqn: Any, cuts: list[Cut], *_: int) -> list[Cut]:
        """Slices and joins: axes of unchanged length keep their cut."""
        (out,), old = eqn.outvars, eqn.invars[0].aval.shape
        return [tuple(c if n == m else None for c, n, m in zip(cuts[0], old, out.aval.shape, strict=True))]

    def send(self, kind: str, axis: str, size: int, times: int) -> None:
        """Note `times` messages."""
        entry = self.sent[kind, axis]
        entry[0] += times
        entry[1] += times * size

    def count(self, eqn: Any, cuts: list[Cut], times: int) -> None:
        """The products in an operation that no cut touches."""
        work = times * count_product(eqn)
        self.whole, self.local = self.whole + work, self.local + work


MOVES = {
    "split": Follower.split,
    "reshape": Follower.reshape,
    "broadcast_in_dim": Follower.broadcast,
    "transpose": lambda self, eqn, cuts, *_: [tuple(cuts[0][i] for i in eqn.params["permutation"])],
    "squeeze": lambda self, eqn, cuts, *_: [
        tuple(c for i, c in enumerate(cuts[0]) if i not in eqn.params["dimensions"])
    ],
    **dict.fromkeys(("slice", "dynamic_slice", "concatenate", "pad", "rev", "dynamic_update_slice"), Follower.kept),
}


def keeps_products(policy: Any) -> bool:
    """Whether a policy of `jax.checkpoint` keeps matrix products, and so their sums over devices."""
    kept = policy is not None and policy(dot_general_p, dimension_numbers=(((1,), (0,)), ((), ())))
    return kept is True or hasattr(kept, "src")


def whole(v: Any) -> Cut:
    """No cut."""
    return (None,) * len(getattr(v.aval, "shape", ()))


def once(cut: Cut) -> Cut:
    """Each mesh axis divides one axis only, the first."""
    return tuple(axis if axis not in cut[:i] else None for i, axis in enumerate(cut))


def local_bytes(v: Any, cut: Cut, sizes: Mapping[str, int]) -> int:
    """Bytes of a value on one device."""
    return math.prod(v.aval.shape) * v.aval.dtype.itemsize // math.prod(sizes[axis] for axis in cut if axis is not None)
