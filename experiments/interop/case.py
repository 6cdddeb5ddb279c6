"""What is compared: one configuration of a class of another library, its inputs, and how both sides compute the outputs.

The cases of a family are `CASES` of a file `cases_<family>.py` beside this one. PyTorch and the other library are imported
inside functions alone, so that the goldens can be tested without them.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import pkgutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import interop

Arrays = dict[str, Any]


def build(case: Case) -> Any:
    """The other library's network: of diffusers, by the name of the class."""
    import diffusers

    return getattr(diffusers, case.kind)(**case.config).eval()


def write(case: Case, model: Any, folder: str) -> None:
    """The network to disk, as the other library does it."""
    model.save_pretrained(folder)


def reopen(case: Case, folder: str) -> Any:
    """The network from disk, as the other library does it."""
    import diffusers

    return getattr(diffusers, case.kind).from_pretrained(folder).eval()


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    `inputs(rng)`: arrays by name, in the layout of the other library.   `theirs(model, inputs)`: outputs by name, tensors of
    PyTorch.   `ours(model, params, inputs)`: the same outputs, in the same layout, by the `Pretrained` and its parameters.
    `gradient`: the input whose gradient is compared; None: none is.   `golden`: stored for tests, so it must be small.
    """

    name: str  # Class-variant, unique
    kind: str
    config: dict[str, Any]
    inputs: Callable[[np.random.Generator], Arrays]
    theirs: Callable[[Any, Arrays], Arrays]
    ours: Callable[[Any, Any, Arrays], Arrays]
    gradient: str | None = "x"
    golden: bool = False
    seed: int = 0
    build: Callable[[Case], Any] = build
    write: Callable[[Case, Any, str], None] = write
    reopen: Callable[[Case, str], Any] = reopen
    load: Callable[[str], Any] = interop.load_pretrained
    save: Callable[[str, Any], None] = interop.save_pretrained


def families() -> dict[str, tuple[Case, ...]]:
    """All cases by family."""
    names = [m.name for m in pkgutil.iter_modules([str(pathlib.Path(__file__).parent)]) if m.name.startswith("cases_")]
    return {name.removeprefix("cases_"): importlib.import_module(f"{__package__}.{name}").CASES for name in names}


def randomise(model: Any, seed: int) -> None:
    """Random numbers for every parameter of a PyTorch network, so that no layer hides behind a zero or a one."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 100
            std = min(max(fan_in**-0.5, 0.02), 0.2)
            around = 1.0 if p.ndim == 1 and bool((p == 1).all()) else 0.0  # the scale of a norm
            p.copy_(around + std * torch.randn(p.shape, generator=generator))


def weighting(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Fixed random numbers that make a scalar of an output: sum(weights * output)."""
    rng = np.random.default_rng(sum(name.encode()))
    return rng.standard_normal(shape).astype(np.float32)


def their_values(case: Case, model: Any, inputs: Arrays) -> Arrays:
    """Outputs of the other library, and the gradient of their weighted sum, as NumPy arrays."""
    import torch

    tensors = {name: torch.tensor(a) for name, a in inputs.items()}
    if case.gradient is None:
        with torch.no_grad():
            return {name: a.numpy() for name, a in case.theirs(model, tensors).items()}
    tensors[case.gradient].requires_grad_(True)
    found = case.theirs(model, tensors)
    sum((torch.tensor(weighting(n, tuple(a.shape))) * a).sum() for n, a in found.items()).backward()
    return {n: a.detach().numpy() for n, a in found.items()} | {"gradient": tensors[case.gradient].grad.numpy()}


def our_values(case: Case, model: Any, inputs: Arrays) -> Arrays:
    """The same of ours."""

    def scalar(params: Any, x: Any, rest: Arrays) -> tuple[Any, Arrays]:
        found = case.ours(model, params, rest if case.gradient is None else {**rest, case.gradient: x})
        return sum(jnp.vdot(weighting(n, a.shape), a) for n, a in found.items()), found

    rest = {name: jnp.asarray(a) for name, a in inputs.items()}
    if case.gradient is None:
        return jax.jit(scalar)(model.params, None, rest)[1]
    x = rest.pop(case.gradient)
    gradient, found = jax.jit(jax.grad(scalar, argnums=1, has_aux=True))(model.params, x, rest)
    return {**found, "gradient": gradient}


def error(ours: Any, theirs: np.ndarray) -> float:
    """The largest difference over the largest value."""
    ours = np.asarray(ours)
    if ours.shape != theirs.shape:
        raise ValueError(f"ours has shape {ours.shape}, theirs {theirs.shape}")
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def errors(ours: Arrays, theirs: Arrays) -> tuple[float, float | None]:
    """The largest error of the outputs, and that of the gradient."""
    if set(ours) != set(theirs):
        raise ValueError(f"ours has {sorted(ours)}, theirs {sorted(theirs)}")
    forward = max(error(ours[n], theirs[n]) for n in theirs if n != "gradient")
    return forward, error(ours["gradient"], theirs["gradient"]) if "gradient" in theirs else None


def picture(*shape: int) -> Callable[[np.random.Generator], Arrays]:
    """Inputs of one normal array `x`."""
    return lambda rng: {"x": rng.standard_normal(shape).astype(np.float32)}


def last(x: Any) -> Any:
    """Channels last.   [B, C, *n] -> [B, *n, C]"""
    return jnp.moveaxis(x, 1, -1)


def first(x: Any) -> Any:
    """Channels first.   [B, *n, C] -> [B, C, *n]"""
    return jnp.moveaxis(x, -1, 1)
