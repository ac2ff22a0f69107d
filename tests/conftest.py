"""Shared settings and fixtures: 8 forced CPU devices, the compilation cache, golden vectors."""

import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

from bestiary.eval import libtpu  # imports no JAX

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# most of the suite's time is compilation; XLA's own passes run all the same, LLVM's are fewer
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
libtpu.quiet()
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "bestiary-test-cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`@pytest.mark.golden("spark")` runs a test once per `spark_*.npz` in the golden folder."""
    if marker := metafunc.definition.get_closest_marker("golden"):
        name = marker.args[0]
        # "spark_a" belongs to "spark"; "spark_gemma_a" would not
        paths = [
            p for p in sorted(GOLDEN.glob(f"{name}_*.npz")) if p.stem.rpartition("_")[0] == name
        ]
        metafunc.parametrize("golden", paths, ids=[p.stem for p in paths], indirect=True)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> SimpleNamespace:
    """Arrays by name in `.arrays`, hyper-parameters by name in `.hp`."""
    hp = json.loads(request.param.with_suffix(".json").read_text())
    return SimpleNamespace(arrays=dict(np.load(request.param)), hp=hp)


@pytest.fixture
def mesh():
    """The 8 forced devices as data 2, fsdp 2, tensor 2."""
    axis_types = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=axis_types)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Frees the compiled programs of a test file: each takes some of the 65530 regions of memory
    that Linux lets a process map, and all together they are more."""
    yield
    jax.clear_caches()
