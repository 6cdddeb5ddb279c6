"""Eight fake CPU devices, cheap compilation, a persistent cache, and every checker that JAX has, for all tests."""

import contextlib
import os
import pathlib
import resource

FAST_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_FLAGS}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax  # noqa: E402
import pytest  # noqa: E402

collect_ignore_glob = ["conftest.py", "*/conftest.py"]  # they hold no doctests, and share one module name

CACHE = pathlib.Path(os.environ.get("DIFFJAX_TEST_CACHE", pathlib.Path(__file__).parents[1] / ".cache" / "jax"))

jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture
def x64():
    """Float64 for one test."""
    with jax.enable_x64():
        yield


@pytest.fixture
def full_disk():
    """`with full_disk(size):` no file may grow over this size."""

    @contextlib.contextmanager
    def limited(size):
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    return limited


@pytest.fixture
def key():
    return jax.random.key(0)
