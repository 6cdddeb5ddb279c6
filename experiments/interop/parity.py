"""Parity of networks read from other libraries' files, and of files written for them.

Every case is built by the other library, all its parameters random, and written to disk by it; read here, its outputs and a
gradient are compared in float32; written here and read there again, its tensors must be the same bits.

    python -m experiments.interop.parity [PATTERN]      needs PyTorch and diffusers; writes results/parity_<family>.json
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
import tempfile

import numpy as np

from experiments.interop.case import Case, errors, families, our_values, randomise, their_values

RESULTS = pathlib.Path(__file__).parent / "results"
LIMIT = 1e-4


def measure(case: Case) -> dict:
    """One case: errors relative to the largest value, and whether their tensors come back bit by bit."""
    import torch

    model = case.build(case)
    randomise(model, case.seed)
    inputs = case.inputs(np.random.default_rng(case.seed))
    wanted = their_values(case, model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        case.write(case, model, f"{folder}/theirs")
        ours = case.load(f"{folder}/theirs")
        forward, gradient = errors(our_values(case, ours, inputs), wanted)
        case.save(f"{folder}/ours", ours)
        again = case.reopen(case, f"{folder}/ours")
    state, other = model.state_dict(), again.state_dict()
    equal = list(state) == list(other) and all(torch.equal(a, other[name]) for name, a in state.items())
    back, _ = errors(their_values(case, again, inputs), wanted)
    size = sum(p.numel() for p in model.parameters())
    row = {"case": case.name, "class": case.kind, "parameters": size, "forward": forward, "gradient": gradient}
    return row | {"back": back, "back_bit_equal": equal, "config": case.config}


def passes(row: dict) -> bool:
    """Whether a case holds."""
    return max(row["forward"], row["gradient"] or 0.0, row["back"]) <= LIMIT and row["back_bit_equal"]


def main(pattern: str = "") -> int:
    """Run the cases whose family or name has the pattern; rows of others stay in the file."""
    failed = 0
    for family, cases in families().items():
        chosen = [case for case in cases if re.search(pattern, f"{family}/{case.name}")]
        path = RESULTS / f"parity_{family}.json"
        old = json.loads(path.read_text()) if path.is_file() else []
        rows = {row["case"]: row for row in old}
        for case in chosen:
            row = rows[case.name] = measure(case)
            failed += not passes(row)
            gradient = "   -   " if row["gradient"] is None else f"{row['gradient']:.1e}"
            print(
                f"{case.name:44s} {row['parameters']:>9,}  forward {row['forward']:.1e}  gradient {gradient}  "
                f"back {row['back']:.1e} {'ok' if passes(row) else 'FAILED'}",
                flush=True,
            )
        if chosen:
            RESULTS.mkdir(exist_ok=True)
            kept = [rows[case.name] for case in cases if case.name in rows]
            path.write_text(json.dumps(kept, indent=1) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
