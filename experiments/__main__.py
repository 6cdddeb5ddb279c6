"""`python -m experiments run | table | tiny`."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
import traceback

import jax

from experiments import recipe

CACHE = recipe.ROOT.parent / ".cache" / "jax"


def run(slug: str, preset: str) -> int:
    """Run one recipe and print its figures beside what is expected of them."""
    expect = recipe.load(slug).RECIPE.expect
    figures, arrays, seconds = recipe.measure(slug, preset)
    for name, value in figures.items():
        bound = expect.get(name)
        verdict = "" if bound is None or preset == "tiny" else "ok" if bound.holds(value) else "FAILS"
        print(f"{name:32s} {value:12.6g}  {'' if bound is None else str(bound):16s} {verdict}".rstrip())
    print(f"{seconds / 60:.2f} minutes")
    if preset == "tiny":  # too small to judge the claim; nothing is written over the results of a full run
        return 0
    print(recipe.write(slug, figures, arrays, seconds))
    return 0 if all(bound.holds(figures[name]) for name, bound in expect.items()) else 1


def table() -> int:
    """Write `experiments/README.md`."""
    path = recipe.ROOT / "README.md"
    path.write_text(recipe.table(), encoding="utf-8")
    print(path)
    return 0


def changed(revision: str) -> list[str]:
    """The recipes whose file differs from a git revision; a folder's helper module counts for every recipe in it."""
    git = lambda *args: subprocess.run(
        ["git", *args, "--", "."], cwd=recipe.ROOT, capture_output=True, text=True, check=False
    )
    diff, new = git("diff", "--name-only", "--relative", revision), git("ls-files", "--others", "--exclude-standard")
    if diff.returncode or new.returncode:
        raise recipe.RecipeError(f"--changed {revision}: {(diff.stderr or new.stderr).strip().splitlines()[0]}")
    files = {f.removesuffix(".py") for f in (diff.stdout + new.stdout).splitlines() if f.endswith(".py")}
    known = recipe.slugs()
    helped = {f.rpartition("/")[0] for f in files - set(known)}
    return [slug for slug in known if slug in files or slug.rpartition("/")[0] in helped]


def share(part: str) -> list[str]:
    """Part K of N of all recipes; K may be any counter, such as the number of a build: it is taken modulo N."""
    try:
        k, n = (int(word) for word in part.split("/"))
        if n < 1:
            raise ValueError
    except ValueError:
        raise recipe.RecipeError(f"--share must be K/N with integers, N >= 1, for example 3/20; got {part!r}") from None
    return recipe.slugs()[k % n :: n]


def tiny(part: str | None, revision: str | None) -> int:
    """Run tiny presets in this process, one line each: every figure there and finite, or the reason why not."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(CACHE))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    chosen = recipe.slugs() if part is None and revision is None else []
    chosen += share(part) if part is not None else []
    chosen += changed(revision) if revision is not None else []
    failed = 0
    for slug in sorted(set(chosen)):
        start = time.perf_counter()
        try:
            figures, arrays, _ = recipe.measure(slug, "tiny")
            recipe.picture(arrays)
            bad = [name for name, value in figures.items() if not math.isfinite(value)]
            reason = f"not finite: {', '.join(bad)}" if bad else ""
        except Exception as error:  # one broken recipe must not hide the others
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        failed += bool(reason)
        print(
            f"{'FAILED' if reason else 'passed'} {slug} {time.perf_counter() - start:.1f} s {reason}".rstrip(),
            flush=True,
        )
        jax.clear_caches()  # hundreds of recipes share this process
    print(f"{len(set(chosen)) - failed} passed, {failed} failed")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """The command line.   Returns: 0, 1 if a claim or a tiny run fails, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description=recipe.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="run one recipe, write its results, compare them with its claim")
    one.add_argument("slug", help="family/method")
    one.add_argument("--preset", default="full", choices=recipe.PRESETS)
    commands.add_parser("table", help="write experiments/README.md")
    many = commands.add_parser("tiny", help="run tiny presets, by default of all recipes")
    many.add_argument("--share", metavar="K/N", help="part K (modulo N) of N parts")
    many.add_argument("--changed", metavar="REV", help="recipes that differ from a git revision")
    args = parser.parse_args(argv)
    try:
        if args.command == "run":
            return run(args.slug, args.preset)
        return table() if args.command == "table" else tiny(args.share, args.changed)
    except recipe.RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
