"""Topologies, the link model, and real ahead-of-time compiles against theory by hand."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.lax import with_sharding_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import bestiary
from bestiary.eval import topology
from bestiary.eval.hlo import Collective, HloReport, analyse, jaxpr_flops
from bestiary.eval.topology import NO_WINDOWED_EINSUM, chip, compile_for, wire_bytes

needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu is not installed: bestiary[plan]"
)


@needs_libtpu
def test_libtpu_loads_silently_without_a_tpu():
    program = (
        "from bestiary.eval import topology; topology.quiet_libtpu();"
        "print(len(topology.parse('v5p:4x4x4').devices))"
    )
    source = Path(bestiary.__file__).parents[1]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(source)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("64\n", "")


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5p", "'v5p' is not CHIP:LAYOUT, for example v5e:4x4"),
        ("v5p-8", "'v5p-8' is not CHIP:LAYOUT"),
        ("v5p:4x4x", "'v5p:4x4x' is not CHIP:LAYOUT"),
        ("v9:4x4", "chip 'v9' is not one of v5e, v5p, v6e, tpu7x, for example"),
        ("v5p:4x4", "a layout of v5p has 3 sizes, for example"),
        ("v6e:4x4x4", "a layout of v6e has 2 sizes"),
        ("v5e:3x4", "hosts hold 2x2 chips, so the first two sizes must be even"),
        ("v5p:2x1x4", "must be even"),
        ("v5e:0x2", "must be even"),
        ("v5e:32x32", "has 1024 chips, a v5e pod has 256"),
    ],
)
def test_wrong_topologies_are_named(name, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        topology.parse(name)
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


def test_missing_libtpu_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("pip install 'bestiary[plan]'")):
        topology.parse("v5p:4x4x4")


@needs_libtpu
@pytest.mark.parametrize(
    "name, devices",
    [("v5e:1x1", 1), ("v5p:1x1x1", 1), ("v6e:2x4", 8), ("v5p:2x2x3", 12), ("tpu7x:2x2x1", 8)],
)
def test_topologies_have_devices(name, devices):
    assert len(topology.parse(name).devices) == devices


@needs_libtpu
def test_mesh_sizes_must_fill_the_slice():
    slice_ = topology.parse("tpu7x:2x2x1")
    with pytest.raises(
        ValueError, match=r"'fsdp=2,tensor=2' has 4 .* the 8 devices .*4 chips of 2"
    ):
        topology.mesh(slice_, {"fsdp": 2, "tensor": 2})
    with pytest.raises(ValueError, match="must multiply"):
        topology.mesh(slice_, {"fsdp": -2, "tensor": -4})
    mesh = topology.mesh(slice_, {"data": 1, "fsdp": 4, "tensor": 2})
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 3


def test_chip_figures():
    assert [chip(name).flops / 1e12 for name in ("v5e", "v5p", "v6e", "tpu7x")] == [
        197, 459, 920, 1155,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="chip 'v4' is unknown"):
        chip("v4")


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1"])
def test_usable_memory_is_what_the_compiler_says(name):
    slice_ = topology.parse(name)
    mesh = topology.mesh(slice_, {"data": len(slice_.devices)})
    huge = jax.ShapeDtypeStruct(
        (1 << 19, 1 << 17), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="^RESOURCE_EXHAUSTED") as error:
        compile_for(mesh, jax.jit(jnp.sin), huge, level="O0")
    available = re.search(r"exceeds available HBM \(([\d.]+)G\)", str(error.value))
    assert available and float(available[1]) == pytest.approx(
        slice_.chip.hbm_bytes / 2**30, abs=0.011
    )


def ring_traffic(kind: str, n: int, size: float) -> float:
    """Bytes one device sends around a ring of n, counted hop by hop."""
    shard = size / n
    if kind == "all-to-all":
        return sum(shard * min(hop, n - hop) for hop in range(1, n))
    steps = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}[kind] * (n - 1)
    return steps * shard


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter", "all-reduce", "all-to-all"])
@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_wire_bytes_on_a_ring(kind, n):
    assert wire_bytes(kind, 240.0, (n,)) == pytest.approx(ring_traffic(kind, n, 240.0))


@needs_libtpu
@pytest.mark.parametrize(
    "name, axes, kind, over, links",
    [
        ("v5e:16x16", {"fsdp": 16, "tensor": 16}, "all-gather", ("tensor",), 2),  # a ring
        ("v5e:4x4", {"fsdp": 4, "tensor": 4}, "all-gather", ("tensor",), 1),  # a line
        ("v5e:4x4", {"fsdp": 4, "tensor": 4}, "all-gather", ("fsdp", "tensor"), 2),
        ("v5p:4x4x4", {"fsdp": 16, "tensor": 4}, "reduce-scatter", ("fsdp",), 4),
        ("v5p:8x8x8", {"fsdp": 128, "tensor": 4}, "all-gather", ("tensor",), 1),  # half a ring
        ("v5p:4x4x4", {"fsdp": 16, "tensor": 4}, "collective-permute", ("fsdp",), 1),
        ("tpu7x:4x4x4", {"fsdp": 64, "tensor": 2}, "all-gather", ("fsdp",), 6 / 2),
        ("tpu7x:4x4x4", {"fsdp": 64, "tensor": 2}, "all-gather", ("tensor",), 6),  # on chip
    ],
)
def test_links_that_a_mesh_axis_uses(name, axes, kind, over, links):
    slice_ = topology.parse(name)
    mesh = topology.mesh(slice_, axes)
    n = math.prod(axes[axis] for axis in over)
    seconds = topology.collective_seconds(kind, 1e9, over, slice_, mesh)
    expected = wire_bytes(kind, 1e9, (n,)) / (links * slice_.chip.link_bandwidth)
    assert seconds == pytest.approx(expected)


@needs_libtpu
def test_all_to_all_is_bound_by_the_bisection():
    slice_ = topology.parse("v5e:16x16")
    mesh = topology.mesh(slice_, {"fsdp": 16, "tensor": 16})
    # Half of what each of 8 chips holds crosses 2 cuts of a ring, one way.
    expected = 8 * 1e9 / 2 / (2 * slice_.chip.link_bandwidth)
    seconds = topology.collective_seconds("all-to-all", 1e9, ("tensor",), slice_, mesh)
    assert seconds == pytest.approx(expected)


@needs_libtpu
def test_roofline_names_every_resource():
    slice_ = topology.parse("v5e:4x4")
    mesh = topology.mesh(slice_, {"data": 1, "fsdp": 4, "tensor": 4})
    gathers = [Collective("all-gather", ("fsdp",), 4, later, 3, 10**9) for later in (False, True)]
    sums = Collective("all-reduce", ("fsdp", "tensor"), 16, False, 1, 10**9)
    report = HloReport(197 * 10**12, 82 * 10**10, (*gathers, sums), {}, 0)
    assert topology.roofline(report, slice_, mesh) == pytest.approx(
        {
            "compute": 1.0,
            "memory": 1.0,
            "all-gather fsdp": 2 * 0.75e9 / 50e9,
            "all-reduce fsdp,tensor": 2 * (15 / 16) * 1e9 / 100e9,
        }
    )


LAYERS, WIDTH, HIDDEN, BATCH = 6, 256, 512, 192


def train_step(mesh: Mesh):
    """A scanned, rematerialised stack of two-matmul blocks, FSDP x tensor parallel."""

    def at(x, *spec):
        return with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    def block(x, w):
        hidden = at(jax.nn.relu(x @ at(w[0], None, "tensor")), "fsdp", "tensor")
        return at(x + at(hidden @ at(w[1], "tensor", None), "fsdp", None), "fsdp", None), None

    def loss(w, x):
        return jnp.mean(jax.lax.scan(jax.checkpoint(block), x, w)[0] ** 2)

    def step(w, x):
        value, grads = jax.value_and_grad(loss)(w, x)
        return value, jax.tree.map(lambda w, g: w - g, w, grads)

    def array(shape, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    w = (
        array((LAYERS, WIDTH, HIDDEN), None, "fsdp", "tensor"),
        array((LAYERS, HIDDEN, WIDTH), None, "tensor", "fsdp"),
    )
    shardings = (None, jax.tree.map(lambda leaf: leaf.sharding, w))
    jitted = jax.jit(step, donate_argnums=0, out_shardings=shardings)
    return jitted, (w, array((BATCH, WIDTH), "fsdp", None))


def place(name: str, fsdp: int, tensor: int) -> Mesh:
    if name != "cpu":
        return topology.mesh(topology.parse(name), {"fsdp": fsdp, "tensor": tensor})
    devices = np.array(jax.devices()).reshape(fsdp, tensor)
    return Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize(
    "name, fsdp, tensor",
    [
        ("cpu", 4, 2),
        pytest.param("v5e:4x4", 4, 4, marks=needs_libtpu),
        pytest.param("v5p:2x2x2", 4, 2, marks=needs_libtpu),
        pytest.param("tpu7x:2x2x1", 4, 2, marks=needs_libtpu),
    ],
)
def test_train_step_equals_theory(name, fsdp, tensor):
    mesh = place(name, fsdp, tensor)
    jitted, args = train_step(mesh)
    options = {} if name == "cpu" else NO_WINDOWED_EINSUM
    compiled, _ = compile_for(mesh, jitted, *args, level="O0", options=options)
    report = analyse(compiled.as_text() or "", mesh.shape)

    # Forward 2 matmuls, recomputed 1 (the block's output is not needed), backward 4.
    matmul = 2 * BATCH * WIDTH * HIDDEN
    assert report.matmul_flops == 7 * LAYERS * matmul // mesh.size
    assert jaxpr_flops(jitted.trace(*args).jaxpr) == 7 * LAYERS * matmul
    assert report.unknown_loops == 0

    weight = 4 * WIDTH * HIDDEN // tensor
    activation = 4 * BATCH * WIDTH // fsdp
    table = {(c.kind, *c.axes): c for c in report.collectives}
    counts = {key: c.count for key, c in table.items()}
    sizes = {key: c.bytes for key, c in table.items()}
    counts_by_hand = {
        ("all-gather", "fsdp"): 2 * 2 * LAYERS,  # both weights, forward and backward
        ("all-reduce", "tensor"): 2 * LAYERS,
        ("all-reduce", "fsdp"): 1,  # the loss
    }
    sizes_by_hand = {
        ("all-gather", "fsdp"): 2 * 2 * LAYERS * weight,
        ("all-reduce", "tensor"): 2 * LAYERS * activation,
        ("all-reduce", "fsdp"): 4,
        ("reduce-scatter", "fsdp"): 2 * LAYERS * weight,
    }
    if name == "cpu":  # has no reduce-scatter: one combined all-reduce per layer does its work
        counts_by_hand["all-reduce", "fsdp"] += LAYERS
        sizes_by_hand["all-reduce", "fsdp"] += sizes_by_hand.pop(("reduce-scatter", "fsdp"))
    else:  # two gradients a layer; small ones are combined
        assert counts.pop(("reduce-scatter", "fsdp")) in (LAYERS, 2 * LAYERS)
    assert counts == counts_by_hand
    assert sizes == sizes_by_hand
    assert {c.group for c in report.collectives if c.axes == ("fsdp",)} == {fsdp}


@needs_libtpu
def test_overlapped_collectives_count_once():
    mesh = place("v5e:4x4", 4, 4)
    jitted, args = train_step(mesh)
    compiled, seconds = compile_for(mesh, jitted, *args, options=NO_WINDOWED_EINSUM)
    report = analyse(compiled.as_text() or "", mesh.shape)
    gathers = [c for c in report.collectives if c.kind == "all-gather"]
    assert {c.asynchronous for c in gathers} == {False, True}
    assert sum(c.count for c in gathers) == 4 * LAYERS
    assert seconds > 0
    assert getattr(jax.config, "jax_optimization_level") == "UNKNOWN"  # noqa: B009


@needs_libtpu
def test_batched_matmuls_and_kernels():
    mesh = place("v6e:1x1", 1, 1)

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    def fn(x, y):
        x = jnp.einsum("bhqk,bkhd->bqhd", x, y)
        return pl.pallas_call(kernel, jax.ShapeDtypeStruct(x.shape, x.dtype), name="twice")(x)

    def array(*shape):
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    args = array(3, 8, 24, 40), array(3, 40, 8, 128)
    compiled, _ = compile_for(mesh, jax.jit(fn), *args)
    report = analyse(compiled.as_text() or "", mesh.shape)
    assert report.matmul_flops == 2 * 3 * 8 * 24 * 40 * 128
    assert report.custom_calls["tpu_custom_call:twice"] == 1
