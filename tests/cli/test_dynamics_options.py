"""Options of training that watch it or change its loss: what they log, and that the run is used as any other."""

import jax
import numpy as np
import pytest
from cli_tools import TINY, losses

import diffjax
from diffjax.cli import main

pytestmark = pytest.mark.slow
OPTIONS = (
    "--training.loss-bins=3 --training.noise-scale --training.accumulate=2 --training.magnitudes --objective.uncertainty "
    "--training.ema-power 0.1 --training.snapshot-every=10 --no-scores"
).split()


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched") / "run"
    options = [o.replace("batch-size=16", "batch-size=32") for o in TINY]
    assert main(["train", "gaussians", "--run", str(folder), *options, *OPTIONS]) == 0
    return folder


def test_what_is_asked_for_is_logged(watched):
    rows = losses(watched)
    lines = [row for row in rows if "hook" not in row]
    assert [row["step"] for row in lines] == [5, 10, 15, 20, 25, 30]
    bins = [name for name in lines[0] if name.startswith("items/")]
    assert len(bins) == 3 and all(sum(row[b] for b in bins) == 5 * 32 for row in lines)
    assert all(row[b.replace("items", "loss")] > 0 for row in lines for b in bins if row[b])
    assert all(row["weight_rms/net/in"] > 0 and row["gradient_rms/u"] > 0 for row in lines)
    assert all(np.isfinite(row["gradient_trace"]) for row in lines)
    seen = [row for row in rows if row.get("hook") == "activations"]
    assert [row["step"] for row in seen] == [15, 30] and seen[0]["activation_rms/block_0/block"] > 0


def test_the_run_is_used_without_the_learned_uncertainty(watched, call):
    for weights in ("ema_0.999", "power_0.1", "params"):
        params = diffjax.load(watched, weights=weights).denoiser.leaves
        assert all("frequencies" not in str(p) for p, _ in jax.tree_util.tree_leaves_with_path(params))
    assert call("ema", watched, "--sigma-rel", 0.1).code == 0
    code, out, _ = call("sample", watched, "--weights", "posthoc_0.1", "--n", 8, "--steps", 2, "--out", "drawn")
    assert code == 0 and "posthoc_0.1 of step 30" in out
    a, b = (diffjax.load(watched, weights=w).denoiser.leaves for w in ("posthoc_0.1", "power_0.1"))
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(u, v, atol=1e-6)


@pytest.mark.parametrize(
    "words, match",
    [
        ("--training.noise-scale", "add --training.accumulate 2"),
        ("--training.loss-bins 1", "--training.loss-bins must be 0, or in 2..100; got 1"),
    ],
)
def test_options_that_make_no_sense(call, words, match):
    code, _, err = call("train", "gaussians", *words.split())
    assert code == 2 and match in err.replace("\n", " ")
