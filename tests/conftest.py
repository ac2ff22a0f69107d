"""Shared settings and fixtures: 8 forced CPU devices, the compilation cache, golden vectors."""

import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_WORKER_ID", "0")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "bestiary-test-cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))


def golden_cases(name: str) -> list:
    """One pytest parameter per `name_*.npz` in the golden folder: arrays by name, hyper-parameters
    as attributes of `hp`. A folder without such a file gives one skipped case."""
    paths = sorted(GOLDEN.glob(f"{name}_*.npz"))
    # `dense_llama_*` must not swallow a longer name such as `dense_llama_model_a`
    paths = [p for p in paths if "_" not in p.stem.removeprefix(f"{name}_")]
    if not paths:
        return [pytest.param(None, marks=pytest.mark.skip(f"no {name}_*.npz in {GOLDEN}"))]
    return [pytest.param(path, id=path.stem) for path in paths]


def load_golden(path: Path) -> SimpleNamespace:
    arrays = dict(np.load(path))
    return SimpleNamespace(a=arrays, hp=SimpleNamespace(**json.loads(path.with_suffix(".json").read_text())))


@pytest.fixture(autouse=True, scope="session")
def _strict():
    jax.config.update("jax_numpy_rank_promotion", "allow")


@pytest.fixture
def mesh():
    """The 8 forced devices as data 2, fsdp 2, tensor 2."""
    axis_types = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=axis_types)
