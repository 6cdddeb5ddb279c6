"""Imports point one way: types <- processes, times, prediction <- ... <- cli <- experiments (read from the source)."""

import ast
import pathlib
import subprocess
import sys

import diffjax

ROOT = pathlib.Path(diffjax.__file__).parent
BASE = {"types", "numerics"}
MIDDLE = BASE | {"processes", "times", "prediction"}
# what each part may import, beside itself
ALLOWED = {
    "numerics": set(),
    "types": {"numerics"},
    "processes": BASE,
    "times": BASE | {"processes"},
    "prediction": BASE | {"processes", "times"},
    "losses": MIDDLE,
    "solvers": MIDDLE,
    "guidance": MIDDLE,
    "metrics": BASE,
    "data": BASE,
    "networks": BASE,
    "sampling": MIDDLE | {"solvers"},
    "parallel": MIDDLE | {"solvers", "sampling"},
    "starts": MIDDLE,
    "likelihood": MIDDLE | {"losses"},
    "experts": MIDDLE,
    "cooperation": MIDDLE | {"losses"},
    "adjoint": MIDDLE | {"solvers", "sampling"},
    "testing": MIDDLE | {"solvers", "sampling"},
    "training": MIDDLE | {"losses"},
    "adapters": BASE | {"networks", "training"},
    "interop": MIDDLE | {"networks", "training", "adapters", "latent", "solvers", "guidance"},
    "latent": MIDDLE | {"networks", "data", "training"},
    "references": BASE,
    "cli": MIDDLE
    | {"losses", "solvers", "guidance", "metrics", "data", "networks", "sampling", "training", "latent", "references"}
    | {"adapters", "interop"},
    "__main__": {"cli"},
}


def imports(path):
    """The parts of diffjax that a module imports, at its top or inside functions; `import diffjax` itself is lazy."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "diffjax":
            names = [node.module.split(".")[1]] if "." in node.module else [a.name for a in node.names]
            yield from names
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("diffjax."):
                    yield alias.name.split(".")[1]


def test_imports_point_one_way():
    wrong = []
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        assert part in ALLOWED, f"{part} has no place in the layers"
        found = set(imports(path)) - {part, "__version__"}
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(found - ALLOWED[part])]
    assert wrong == []


def test_the_core_imports_no_network_library_and_no_data_library():
    heavy = ("flax", "grain", "orbax", "sklearn", "tensorflow_datasets", "tyro")
    code = f"import sys, diffjax; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
