"""Parity of LoRA files: written by PEFT and read here, written here and read by PEFT, and the layouts that are older.

Every network is one of the cases of `parity`, every adapter random. The outputs of the changed network are compared.

    python -m experiments.interop.lora [PATTERN]      needs PyTorch, diffusers and PEFT; writes results/parity_lora.json
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
import tempfile
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import adapters, interop
from experiments.interop.case import Arrays, Case, error, families, randomise
from experiments.interop.parity import LIMIT, RESULTS

KOHYA = "kohya"


class Lora(NamedTuple):
    """One adapter: the case of its network, and what PEFT is told."""

    case: str
    targets: str  # regular expression of the names of their layers
    rank: int = 3
    alpha: float = 6.0
    fields: dict[str, Any] = {}
    ours: dict[str, Any] = {}  # arguments of `adapters.lora` for the way back


LORAS = {
    "sd3-attention": Lora("SD3Transformer2DModel-deep", r".*attn2?\.(to_q|to_v|add_k_proj|to_out\.0)", ours=dict(targets="qkv")),
    "sd3-all": Lora(
        "SD3Transformer2DModel-norm", r".*(to_[qkv]|net\.2|linear|pos_embed\.proj|linear_1|proj_out|context_embedder)", 2, 2.0
    ),
    "flux-attention": Lora(
        "FluxTransformer2DModel-wide", r".*attn\.(to_q|to_k|to_v)", ours=dict(targets="qkv", parts=("q", "v"))
    ),
    "flux-all": Lora(
        "FluxTransformer2DModel-dev", r".*(to_[qk]|proj_out|proj_mlp|x_embedder|net\.2|linear_1|linear)", 4, 2.0,
        ours=dict(targets="(project|hidden|^in|^out)/kernel"),
    ),
    "flux-ranks": Lora(
        "FluxTransformer2DModel-dev", r".*(to_[qkv]|proj_out)", 4, 8.0,
        dict(rank_pattern={"to_v": 2}, alpha_pattern={r"single_transformer_blocks\.0\.proj_out": 1.0}),
        ours=dict(rank=(("single/.*project", 3), ("single/.*/out", 2))),
    ),
    "flux-rslora": Lora("FluxTransformer2DModel-schnell", r".*to_q", 4, 3.0, dict(use_rslora=True)),
    "unet-attention": Lora("UNet2DConditionModel-sd1", r".*attn[12]\.(to_q|to_v|to_out\.0)", ours=dict(targets="(kv|q_in)")),
    "unet-all": Lora("UNet2DConditionModel-sd1", r".*(to_[qkv]|conv[12]|proj_in|proj_out|proj|net\.2|conv_in|linear_2)", 2, 1.0),
}  # fmt: skip


def cases() -> dict[str, Case]:
    """All cases of parity by name."""
    return {case.name: case for group in families().values() for case in group}


def targets_of(model: Any, pattern: str) -> list[str]:
    """The linear and convolutional layers of a PyTorch network that a pattern names."""
    import torch

    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return [name for name, m in model.named_modules() if isinstance(m, kinds) and re.fullmatch(pattern, name)]


def their_output(case: Case, model: Any, inputs: Arrays) -> np.ndarray:
    """The output of their network."""
    import torch

    with torch.no_grad():
        found = case.theirs(model, {name: torch.tensor(a) for name, a in inputs.items()})
    return next(iter(found.values())).numpy()


def our_output(case: Case, model: Any, inputs: Arrays, adapter: Any, low: Any, *, merged: bool = False) -> Any:
    """The output of ours with an adapter, beside it or merged."""
    fn = adapters.adapt(model.fn, style=adapter)
    params = {"base": model.params, "adapters": {"style": low}}
    if merged:
        changed, params = model, fn.merge(params)
    else:
        changed = types.SimpleNamespace(fn=fn, module=model.module)
    call = lambda params, inputs: case.ours(changed, params, inputs)
    return next(iter(jax.jit(call)(params, {name: jnp.asarray(a) for name, a in inputs.items()}).values()))


def peer_adapter(lora: Lora, model: Any, seed: int) -> None:
    """Give their network a random adapter."""
    import peft
    import torch

    config = dict(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets_of(model, lora.targets))
    model.add_adapter(peft.LoraConfig(**config, **lora.fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))


def older(tensors: dict[str, Any], to_name: Callable[[str, str], str]) -> dict[str, Any]:
    """Tensors of PEFT under other names."""
    split = (re.fullmatch(r"(.*)\.lora_([AB])\.weight", name).groups() for name in tensors)
    return {
        to_name(name, "down" if half == "A" else "up"): a
        for (name, half), a in zip(split, tensors.values(), strict=True)
    }


def layouts(lora: Lora, model: Any, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The adapter in all layouts that can hold it, by name."""
    from safetensors.torch import load_file, save_file

    model.save_lora_adapter(folder / "peft")
    found = {"peft": folder / "peft"}
    import torch

    tensors = load_file(folder / "peft" / "pytorch_lora_weights.safetensors")
    if lora.fields:
        return found
    prefix = "unet" if "unet" in type(model).__name__.lower() else "transformer"
    alphas = {
        name.replace("lora_A.weight", "alpha"): torch.tensor(float(lora.alpha)) for name in tensors if "lora_A" in name
    }
    made = {
        "prefixed": {f"{prefix}.{name}": a for name, a in {**tensors, **alphas}.items()},
        "lora.down": older(tensors, lambda name, half: f"{prefix}.{name}.lora.{half}.weight")
        | {f"{prefix}.{name}": a for name, a in alphas.items()},
        KOHYA: older(tensors, lambda name, half: f"lora_unet_{name.replace('.', '_')}.lora_{half}.weight")
        | {f"lora_unet_{name.removesuffix('.alpha').replace('.', '_')}.alpha": a for name, a in alphas.items()},
    }
    for name, group in made.items():
        found[name] = folder / f"{name}.safetensors"
        save_file({key: a.contiguous() for key, a in group.items()}, found[name])
    return found


def measure(name: str, lora: Lora) -> dict:
    """One adapter: errors of all ways, relative to the largest value, and how much the adapter changes."""
    import torch

    case = cases()[lora.case]
    model = case.build(case)
    randomise(model, case.seed)
    inputs = case.inputs(np.random.default_rng(case.seed))
    row: dict[str, Any] = {"lora": name, "case": case.name, "rank": lora.rank, "alpha": lora.alpha}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        case.write(case, model, str(folder / "base"))
        ours = case.load(str(folder / "base"))
        plain = their_output(case, model, inputs)
        peer_adapter(lora, model, case.seed)
        wanted = their_output(case, model, inputs)
        row["change"] = error(plain, wanted)
        for layout, path in layouts(lora, model, folder).items():
            adapter, low = interop.load_lora(path, ours)
            row[layout] = error(our_output(case, ours, inputs, adapter, low), wanted)
            if layout == "peft":
                row["merged"] = error(our_output(case, ours, inputs, adapter, low, merged=True), wanted)
        (folder / "back").mkdir()
        written = interop.save_lora(folder / "back", adapter, low, ours)
        row["back"] = error(loaded(case, folder, written, inputs), wanted)
        mine = adapters.lora(**{"rank": lora.rank, "alpha": 5.0, **lora.ours})
        low = adapters.adapt(ours.fn, style=mine).init(jax.random.key(0), ours.params, *arguments(case, ours, inputs))
        draw = np.random.default_rng(1)
        low = jax.tree.map(
            lambda a: jnp.asarray(0.2 * draw.standard_normal(a.shape), jnp.float32), low["adapters"]["style"]
        )
        wanted = np.asarray(our_output(case, ours, inputs, mine, low))
        row["our_change"] = error(plain, wanted)
        row["ours"] = error(
            loaded(case, folder, interop.save_lora(folder / "ours.safetensors", mine, low, ours), inputs), wanted
        )
        again = interop.load_lora(
            interop.save_lora(folder / "kohya-ours.safetensors", mine, low, ours, layout=KOHYA), ours
        )
        row["ours_kohya"] = error(np.asarray(our_output(case, ours, inputs, *again)), wanted)
    del torch
    return row


def arguments(case: Case, model: Any, inputs: Arrays) -> tuple:
    """What the network is called with: the arguments of `init`."""
    held: list[tuple] = []

    class Spy:
        module = model.module
        fn = staticmethod(lambda params, *args: held.append(args) or model.fn(params, *args))

    jax.eval_shape(lambda i: case.ours(Spy, model.params, i), {name: jnp.asarray(a) for name, a in inputs.items()})
    return tuple(jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), arg) for arg in held[0])


def loaded(case: Case, folder: pathlib.Path, file: pathlib.Path, inputs: Arrays) -> np.ndarray:
    """The output of their network with an adapter of ours."""
    model = case.reopen(case, str(folder / "base"))
    prefix = "unet" if "unet" in case.kind.lower() else "transformer"
    model.load_lora_adapter(str(file.parent), weight_name=file.name, prefix=prefix)
    return their_output(case, model, inputs)


def main(pattern: str = "") -> int:
    """Run those whose name has the pattern; rows of others stay in the file."""
    path = RESULTS / "parity_lora.json"
    rows = {row["lora"]: row for row in json.loads(path.read_text())} if path.is_file() else {}
    failed = 0
    ways = ("peft", "merged", "prefixed", "lora.down", KOHYA, "back", "ours", "ours_kohya")
    for name, lora in LORAS.items():
        if not re.search(pattern, name):
            continue
        row = rows[name] = measure(name, lora)
        worst = max(row[way] for way in ways if way in row)
        failed += worst > LIMIT
        shown = "  ".join(f"{way} {row[way]:.1e}" for way in ways if way in row)
        print(
            f"{name:16s} change {row['change']:.2f} / {row['our_change']:.2f}  {shown}  {'ok' if worst <= LIMIT else 'FAILED'}"
        )
    path.write_text(json.dumps([rows[name] for name in LORAS if name in rows], indent=1) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
