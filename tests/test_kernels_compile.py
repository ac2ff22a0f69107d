"""Programs of the operations in `kernels` for machines that are not here.

TPU programs are compiled in full by libtpu; CUDA programs are lowered, and compiled in full where
a CUDA plugin is installed. Nothing runs.
"""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec as P

from bestiary.kernels import rowwise_tpu
from bestiary.kernels.attention import attention
from bestiary.kernels.attention.masks import CAUSAL, longformer
from bestiary.kernels.poly_norm import poly_norm
from bestiary.kernels.poly_norm import specs as poly_norm_specs
from bestiary.kernels.stat_topk_glu import normal_quantile, stat_topk_glu
from bestiary.kernels.stat_topk_glu import specs as stat_topk_glu_specs

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
H100 = """platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 patch: 0 }
gpu_device_info { name: "NVIDIA H100 80GB HBM3" device_vendor: "NVIDIA Corporation"
 platform_version: "Compute Capability 9.0a"
 cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
 threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
 shared_memory_per_block: 49152 shared_memory_per_core: 233472
 shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
 registers_per_core_limit: 65536 registers_per_block_limit: 65536 device_address_bits: 64
 driver_version: "12.9.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
 dnn_version: "9.10.0" }"""


@pytest.fixture(autouse=True, scope="module")
def _no_compilation_cache():
    """The persistent cache cannot read back programs of devices that are not here."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it remembers that it was in use
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture
def tpu_devices(request):
    """The devices of the topology that the parameter names."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (extra [plan])")
    topology = CHIPS[request.param]
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def on(device, shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))


def poly_norm_program(case, impl="auto", spec=None):
    """Value and gradients, and the shapes of the arguments."""

    def f(x, weight, bias, d_y):
        y, vjp = jax.vjp(partial(poly_norm, impl=impl, spec=spec), x, weight, bias)
        return y, vjp(d_y)

    x = ((case.rows, case.features), case.dtype)
    return f, [x, ((case.order,), "float32"), ((), "float32"), x]


def stat_topk_glu_program(case, impl="auto", spec=None):
    """Value and gradients, and the shapes of the arguments."""

    def f(scores, values, d_y):
        quantile = normal_quantile(case.k, case.features)
        options = {"ddof": case.ddof, "activation": case.activation, "impl": impl, "spec": spec}
        y, vjp = jax.vjp(partial(stat_topk_glu, quantile=quantile, **options), scores, values)
        return y, vjp(d_y)

    return f, [((case.rows, case.features), case.dtype)] * 3


def cases(table):
    """(program, case) of both operations, from the tables of that name in their `specs`."""
    both = ((poly_norm_program, poly_norm_specs), (stat_topk_glu_program, stat_topk_glu_specs))
    return [
        pytest.param(program, case, id=f"{program.__name__}-{name}")
        for program, specs in both
        for name, case in getattr(specs, table).items()
    ]


def kernels_of(program):
    name = program.__name__.removesuffix("_program")
    return f"{name}_forward", f"{name}_backward"


def compiled(f, arguments):
    return jax.jit(f).lower(*arguments).compile().as_text() or ""


def assert_compiles(device, program, case):
    """`impl="auto"`, on a machine without TPU, puts both kernels into the TPU's program."""
    f, shapes = program(case)
    text = compiled(f, [on(device, *s) for s in shapes])
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert all(name in text for name in kernels_of(program))


@pytest.mark.parametrize("tpu_devices", CHIPS, indirect=True)
@pytest.mark.parametrize(
    ("program", "case"),
    [
        (poly_norm_program, poly_norm_specs.MODEL["polycom_1b_dense"]),
        (stat_topk_glu_program, stat_topk_glu_specs.MODEL["spark_gemma2_2b"]),
    ],
)
def test_compiles_for_every_tpu(tpu_devices, program, case):
    assert_compiles(tpu_devices[0], program, case)


@pytest.mark.parametrize("tpu_devices", ["v5e"], indirect=True)
@pytest.mark.parametrize(("program", "case"), cases("TINY") + cases("MODEL"))
def test_every_shape_compiles_for_v5e(tpu_devices, program, case):
    assert_compiles(tpu_devices[0], program, case)


@pytest.mark.parametrize("tpu_devices", ["v5e"], indirect=True)
def test_attention_by_a_longformer_mask_compiles_for_tpu(tpu_devices):
    mask = CAUSAL & longformer(512, (0, 700))
    q, kv = (on(tpu_devices[0], (1, 2048, heads, 128), "bfloat16") for heads in (4, 2))
    f = jax.grad(lambda *x: attention(*x, mask=mask).astype(jnp.float32).sum(), (0, 1, 2))
    text = compiled(f, [q, kv, kv])
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward, dq, dkv


@pytest.mark.parametrize("tpu_devices", ["v5e"], indirect=True)
def test_stacked_experts_compile_for_tpu(tpu_devices):
    def f(x, weight, bias, quantile):
        h = jax.vmap(poly_norm)(x, weight, bias)
        return jax.vmap(lambda s, v, q: stat_topk_glu(s, v, quantile=q))(h, x, quantile).sum()

    shapes = [(4, 24, 1536), (4, 3), (4,), (4,)]
    arguments = [on(tpu_devices[0], shape, "float32") for shape in shapes]
    text = compiled(jax.grad(f, argnums=(0, 1, 2)), arguments)
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # no use for the last value


@pytest.mark.parametrize("tpu_devices", ["v5e"], indirect=True)
@pytest.mark.parametrize("split_features", [False, True])
def test_compiles_for_a_tpu_mesh(tpu_devices, split_features):
    """Whole rows: one kernel per chip and an all-reduce of weight gradients. Split rows: none."""
    mesh = jax.sharding.Mesh(np.array(tpu_devices).reshape(2, 2), ("data", "tensor"))
    spec = P("data", "tensor") if split_features else P(("data", "tensor"))
    case = poly_norm_specs.MODEL["polycom_1b_dense"]._replace(rows=64)
    f, shapes = poly_norm_program(case, spec=spec)
    arguments = [
        jax.ShapeDtypeStruct(*s, sharding=jax.NamedSharding(mesh, spec if len(s[0]) == 2 else P()))
        for s in shapes
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = compiled(f, arguments)
    assert text.count('custom_call_target="tpu_custom_call"') == (0 if split_features else 2)
    assert "all-reduce" in text
    assert "all-gather" not in text


@pytest.mark.parametrize("program", [poly_norm_program, stat_topk_glu_program])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_auto_follows_the_platform_lowered_for(program, platform):
    """One traced program: kernels for TPU and GPU, none for this machine."""
    specs = {poly_norm_program: poly_norm_specs, stat_topk_glu_program: stat_topk_glu_specs}
    f, shapes = program(specs[program].TINY["odd"])
    with jax.sharding.use_abstract_mesh(h100_mesh()):
        traced = jax.jit(f).trace(*(jax.ShapeDtypeStruct(*s) for s in shapes))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    call = {"cpu": "custom_call", "tpu": "tpu_custom_call", "cuda": "mosaic_gpu"}[platform]
    assert (call in text) == (platform != "cpu")
    assert all((name in text) == (platform != "cpu") for name in kernels_of(program))


@pytest.mark.parametrize(("program", "case"), cases("MODEL"))
def test_lowers_for_cuda_without_a_plugin(program, case):
    f, shapes = program(case, impl="gpu")
    with jax.sharding.use_abstract_mesh(h100_mesh()):
        traced = jax.jit(f).trace(*(jax.ShapeDtypeStruct(*s) for s in shapes))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert all(name in text for name in kernels_of(program))


def h100_mesh():
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
    )
    return jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)


@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))),
    reason="no CUDA plugin is installed (extra [cuda12] or [cuda13])",
)
@pytest.mark.parametrize(("program", "case"), cases("TINY") + cases("MODEL"))
def test_compiles_for_h100(program, case):
    """`impl="auto"` puts both kernels into the program of a GPU that is not here."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    f, shapes = program(case)
    text = compiled(f, [on(topology.devices[0], *s) for s in shapes])
    assert text.count('custom_call_target="mosaic_gpu') == 2


@pytest.mark.parametrize("features", [8, 200, 1536, 8256, 13824, 28672, 65536])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_fit_in_vmem(features, dtype):
    count = 300
    dtypes = [jnp.dtype(dtype)] * 5
    block = rowwise_tpu.block_rows(count, features, dtypes)
    strip = rowwise_tpu.strip_rows(dtypes)
    assert block % strip == 0
    assert block < count + strip
    assert 2 * 5 * block * features * dtypes[0].itemsize < rowwise_tpu.VMEM_BYTES
    assert (block > 0) == (rowwise_tpu.why_not((count, features), dtypes) is None)
