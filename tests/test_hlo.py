"""The HLO reader against hand counts, on hand-written text and on programs compiled for 8 CPUs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh, PartitionSpec

from bestiary.eval.hlo import Collective, analyse, jaxpr_flops

AXES = {"a": 2, "b": 3, "c": 4}
IDS = np.arange(24).reshape(2, 3, 4)


def braces(groups) -> str:
    return "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups) + "}"


def module(instruction: str) -> str:
    return f"""HloModule m
ENTRY %main (p: f32[10]) -> f32[10] {{
  %p = f32[10]{{0}} parameter(0)
  ROOT %c = {instruction}
}}
"""


def compiled(fn, *args) -> str:
    return jax.jit(fn).lower(*args).compile().as_text() or ""


@pytest.mark.parametrize(
    "groups, axes",
    [
        (braces(IDS.transpose(0, 2, 1).reshape(-1, 3)), "b"),
        (braces(IDS.transpose(1, 0, 2).reshape(3, 8)), "ac"),
        ("[6,4]<=[24]", "c"),
        ("[8,3]<=[2,3,4]T(0,2,1)", "b"),
        ("[4,6]<=[2,3,4]T(2,0,1)", "ab"),
        ("[12,2]<=[2,12]T(1,0)", "a"),
        ("[1,24]<=[24]", "abc"),
        ("{}", "abc"),
        ("mesh['x'=2,'y'=3,'z'=4] {'y'}", "b"),
        ("mesh['x'=2,'y'=12] {'x'}", "a"),
        ("mesh['x'=2,'y'=3,'z'=4] {'x','z'}", "ac"),
        ("mesh['x'=24] {'x':(6)4}", "c"),
        ("mesh['x'=24] {'x':(2)3}", "b"),
        ("mesh['x'=6,'y'=4] {'x':(1)2,'y'}", "ac"),
        (f"mesh['x'=4,'y'=6], device_ids=({IDS.transpose(2, 0, 1).ravel().tolist()}) {{'x'}}", "c"),
    ],
)
def test_groups_are_named_by_mesh_axes(groups, axes):
    text = module(
        f"f32[10]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%s"
    )
    size = int(np.prod([AXES[name] for name in axes]))
    expected = Collective("all-reduce", tuple(axes), size, False, 1, 40)
    assert analyse(text, AXES).collectives == (expected,)


def test_permute_follows_its_pairs():
    pairs = braces(np.stack([IDS, np.roll(IDS, -1, axis=1)], -1).reshape(-1, 2))
    text = module(
        "(f32[10]{0}, f32[10]{0}, u32[]) collective-permute-start(%p), "
        f"channel_id=1, source_target_pairs={pairs}"
    )
    expected = Collective("collective-permute", ("b",), 2, True, 1, 40)
    assert analyse(text, AXES).collectives == (expected,)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        analyse("module @jit_f {}", AXES)
    text = module("f32[10]{0} all-reduce(%p), replica_groups={{0,31}}, to_apply=%s")
    with pytest.raises(ValueError, match="device 31, mesh_axes of 24"):
        analyse(text, AXES)


def cpu_mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def test_every_kind_of_collective():
    def body(x):  # [16, 4] on each device
        x = jax.lax.psum_scatter(x, "b", tiled=True) * 3  # [4, 4]
        x = jax.lax.all_gather(x, "a", tiled=True) * 5  # [8, 4]
        x = jax.lax.all_to_all(x, "b", 0, 1, tiled=True) * 7  # [2, 16]
        x = jax.lax.ppermute(x, "a", [(0, 1), (1, 0)])
        return jax.lax.psum(x, ("a", "b"))

    spec = PartitionSpec(("a", "b"))
    fn = jax.shard_map(
        body, mesh=cpu_mesh(), in_specs=spec, out_specs=PartitionSpec(), check_vma=False
    )
    report = analyse(compiled(fn, jnp.ones((128, 4))), cpu_mesh().shape)
    assert {(c.kind, c.axes, c.group, c.count, c.bytes) for c in report.collectives} == {
        ("reduce-scatter", ("b",), 4, 1, 16 * 4 * 4),
        ("all-gather", ("a",), 2, 1, 8 * 4 * 4),
        ("all-to-all", ("b",), 4, 1, 8 * 4 * 4),
        ("collective-permute", ("a",), 2, 1, 2 * 16 * 4),
        ("all-reduce", ("a", "b"), 8, 1, 2 * 16 * 4),
    }


def nested(x, ws):
    """5 x (7 + 1) matmuls of [2, 3] x [3, 3], and 8 more."""

    def outer(x, w):
        x = jax.lax.fori_loop(0, 7, lambda _, x: jnp.tanh(x @ w), x)
        return jnp.tanh(x @ w), None

    x, _ = jax.lax.scan(outer, x, ws)
    return jax.lax.fori_loop(3, 11, lambda _, x: jnp.sin(x @ ws[0]), x)


NESTED_FLOPS = (5 * 8 + 8) * 2 * 2 * 3 * 3
NESTED_ARGS = jnp.ones((2, 3)), jnp.ones((5, 3, 3))


def test_loops_multiply():
    text = compiled(nested, *NESTED_ARGS)
    bare = re.sub(r'"?known_trip_count":\{"n":"\d+"\}', "", text)  # as TPU prints loops
    assert bare != text
    for printed in (text, bare):
        report = analyse(printed, {})
        assert (report.matmul_flops, report.unknown_loops) == (NESTED_FLOPS, 0)
    assert jaxpr_flops(jax.make_jaxpr(nested)(*NESTED_ARGS)) == NESTED_FLOPS


def test_data_dependent_loop_is_reported():
    def fn(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

    report = analyse(compiled(fn, jnp.ones((3, 3))), {})
    assert (report.matmul_flops, report.unknown_loops) == (2 * 27, 1)


def test_conditional_counts_its_dearest_branch():
    def fn(i, x):
        return jax.lax.switch(i, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

    args = jnp.int32(1), jnp.ones((5, 5))
    assert analyse(compiled(fn, *args), {}).matmul_flops == 2 * 2 * 125
    assert jaxpr_flops(jax.make_jaxpr(fn)(*args)) == 2 * 2 * 125


@pytest.mark.parametrize(
    "attributes, left, right, out, flops",
    [
        ("dim_labels=bf_io->bf", "5,7", "7,3", "5,3", 5 * 7 * 3),
        # a dot with batch dimension 4, as TPU writes it: of 4 x 4 taps only the diagonal is real
        (
            "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            "4,5,7", "4,7,3", "4,5,3", 4 * 5 * 7 * 3,
        ),
        # 1-D convolution of 6 with 3 taps and one zero on either side: 2 taps at either end
        ("window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", "1,6,2", "3,2,5", "1,6,5", 16 * 2 * 5),
        ("window={size=2 pad=-3_0}, dim_labels=b0f_0io->b0f", "1,6,2", "2,2,5", "1,2,5", 4 * 2 * 5),
    ],
)  # fmt: skip
def test_convolution_counts_real_taps(attributes, left, right, out, flops):
    text = f"""HloModule m
ENTRY %main (p: f32[{left}], q: f32[{right}]) -> f32[{out}] {{
  %p = f32[{left}]{{0}} parameter(0)
  %q = f32[{right}]{{0}} parameter(1)
  ROOT %c = f32[{out}]{{0}} convolution(%p, %q), {attributes}
}}
"""
    assert analyse(text, {}).matmul_flops == 2 * flops


def test_memory_traffic_of_slices():
    def fn(x, rows):
        x, ys = jax.lax.scan(lambda x, row: (x + row, x * row), x, rows)
        return x, ys

    steps, width = 50, 1000
    report = analyse(compiled(fn, jnp.ones(width), jnp.ones((steps, width))), {})
    row = 4 * width
    assert 4 * steps * row <= report.hbm_bytes <= 12 * steps * row  # never steps^2
    text = compiled(lambda x: jnp.sin(x) + 1, jnp.ones(width))
    assert analyse(text, {}).hbm_bytes == 2 * row


def test_on_chip_arrays_are_no_memory_traffic():
    text = module("f32[10]{0:T(128)S(1)} negate(%p)")
    assert analyse(text, {}).hbm_bytes == 40


def mlp_loss(ws, x):  # x [2, 3], ws [7, 3, 3]
    return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, ws)[0].sum()


@jax.custom_vjp
def square(x):
    return x @ x


square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))


def kernel(x_ref, out_ref):
    out_ref[...] = jnp.dot(x_ref[...], x_ref[...], preferred_element_type=jnp.float32)


def pallas(x, cost):
    spec = pl.BlockSpec((8, 8), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(
        kernel, shape, grid=(4,), in_specs=[spec], out_specs=spec, cost_estimate=cost, name="k"
    )(x)


COST = pl.CostEstimate(flops=123, transcendentals=0, bytes_accessed=0)


@pytest.mark.parametrize(
    "fn, shapes, flops",
    [
        (lambda x, y: jnp.einsum("bik,bkj->bij", x, y), [(2, 3, 5), (2, 5, 7)], 2 * 2 * 3 * 5 * 7),
        (mlp_loss, [(7, 3, 3), (2, 3)], 7 * 36),
        (jax.grad(mlp_loss, argnums=(0, 1)), [(7, 3, 3), (2, 3)], 4 * 7 * 36),
        (jax.jit(square), [(3, 3)], 54),
        (jax.grad(lambda x: square(x).sum()), [(3, 3)], 3 * 54),
        (
            lambda x, w: jax.lax.ragged_dot(x, w, jnp.array([1, 3], jnp.int32)),
            [(4, 3), (2, 3, 5)],
            2 * 4 * 3 * 5,
        ),
        (
            lambda x, k: jax.lax.conv(x, k, (1, 1), "VALID"),
            [(1, 2, 6, 6), (5, 2, 3, 3)],
            2 * 5 * 16 * 18,
        ),
        (
            lambda x: jax.shard_map(
                lambda x: x @ x.T, mesh=cpu_mesh(), in_specs=PartitionSpec("b"),
                out_specs=PartitionSpec("b"), check_vma=False,
            )(x),
            [(12, 5)],
            8 * 2 * 3 * 3 * 5,
        ),
        (lambda x: pallas(x, None), [(32, 8)], 4 * 2 * 8**3),
        (lambda x: pallas(x, COST), [(32, 8)], 123),
    ],
)  # fmt: skip
def test_jaxpr_flops(fn, shapes, flops):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert jaxpr_flops(jax.make_jaxpr(fn)(*args)) == flops
