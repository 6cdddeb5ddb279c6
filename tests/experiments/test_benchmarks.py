import numpy as np
import pytest

from experiments.benchmarks import collectives, gradient, measure, sampling


@pytest.fixture(scope="module")
def counted():
    """In a process of its own, with the compiler's default flags."""
    return collectives.run(quick=True)["sampler"]


def test_a_sampler_cut_over_devices_has_no_collective(counted):
    assert counted.pop("a sum, to compare") == 1  # the count does see a collective
    assert len(counted) == 3 and set(counted.values()) == {0}, counted


def test_interleaved_runs_are_ratios():
    calls = []
    seconds = measure.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 4)
    assert calls[2:] == list("abbaabba") and seconds["a"].shape == (4,)
    assert measure.ratio({"a": np.array([2.0, 2, 9]), "b": np.array([1.0, 1, 3])}, "a", "b") == {"median": 2, "min": 2}


def test_the_baseline_draws_what_the_solver_draws():
    shared_and_own = {n: sampling.draws(sampling.build(n, 6)).sum(0).tolist() for n in ("ddim", "ddpm", "edm_heun")}
    assert shared_and_own["ddim"] == [0, 0] and shared_and_own["ddpm"] == [0, 6] and shared_and_own["edm_heun"][0] > 0


def test_one_compilation_for_every_linear_solver_and_grid():
    report = sampling.one_compilation()
    assert report["tables"] >= 50 and report["traces"] == report["executables"] == 1


def test_checkpointing_a_step_saves_memory():
    network = measure.mlp(64)
    use = {
        m: gradient.compiled(network, 30, m)[0].memory_analysis().temp_size_in_bytes for m in ("plain", "checkpoint")
    }
    assert use["checkpoint"] < 0.5 * use["plain"]
