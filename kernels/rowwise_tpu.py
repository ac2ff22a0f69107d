"""Row-wise operations on TPU: a block of rows per grid step, every feature of a row in VMEM."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

VMEM_BYTES = 32 << 20  # scoped limit asked of the compiler; every generation since v5e has 64 MiB
MAX_SUMS = 8  # one sublane each in the tile that carries the sums
_LANES = 128
_TEMPORARIES = 8  # float32 copies of a row strip that the compiler may keep at once
_MAX_BLOCK = 256


class Rows:
    """A strip of rows: what `math` of `rowwise` may do with it."""

    def __init__(self, values: Sequence[jax.Array], write: Callable):
        self._values, self._write = values, write

    def mean(self, f: Callable) -> list[jax.Array]:
        """Means over the features of each array that `f(*inputs)` returns."""
        return [jnp.mean(value, axis=-1, keepdims=True) for value in f(*self._values)]

    def write(self, f: Callable) -> None:
        """Stores the arrays that `f(*inputs)` returns as the outputs."""
        self._write(f(*self._values))


def rowwise(
    math_: Callable[..., Sequence[jax.Array]],
    scalars: jax.Array,
    *inputs: jax.Array,
    outputs: Sequence[jnp.dtype],
    sums: int = 0,
    flops: int,
    transcendentals: int = 0,
    name: str,
) -> tuple[list[jax.Array], jax.Array]:
    """Runs `math_(rows, scalars) -> per-row sums` over all rows of the inputs, in float32.

    Args:
      scalars: float32 [n]; `math_` receives them as a list of scalars.
      inputs: any number of [rows, features] of one shape.
      outputs: dtypes of the arrays that `math_` writes, shaped like the inputs.
      sums: how many per-row values `math_` returns; they are added up over all rows.
      flops, transcendentals: per element, for the compiler's schedule.

    Returns:
      The outputs and the float32 [sums].
    """
    count, features = inputs[0].shape
    dtypes = [x.dtype for x in inputs] + list(outputs)
    strip, block = strip_rows(dtypes), block_rows(count, features, dtypes)
    blocks = pl.cdiv(count, block)

    def kernel(scalar_ref, *refs):
        in_refs, out_refs = refs[: len(inputs)], refs[len(inputs) : len(inputs) + len(outputs)]
        first = pl.program_id(0) * block
        row = jax.lax.broadcasted_iota(jnp.int32, (strip, 1), 0)
        slot = jax.lax.broadcasted_iota(jnp.int32, (MAX_SUMS, _LANES), 0)

        def step(i, total):
            at = pl.ds(pl.multiple_of(i * strip, strip), strip)

            def write(values):
                for ref, value in zip(out_refs, values, strict=True):
                    ref[at, :] = value.astype(ref.dtype)

            rows = Rows([ref[at, :].astype(jnp.float32) for ref in in_refs], write)
            row_sums = math_(rows, [scalar_ref[0, k] for k in range(scalars.size)])
            # The last block may reach past the last row: what it reads there is arbitrary.
            inside = first + i * strip + row < count
            for k, value in enumerate(row_sums):
                total += jnp.where(slot == k, jnp.sum(jnp.where(inside, value, 0.0)), 0.0)
            return total

        total = jax.lax.fori_loop(
            0, block // strip, step, jnp.zeros((MAX_SUMS, _LANES), jnp.float32)
        )
        if sums:
            refs[-1][...] = total

    def array(shape, dtype):
        varying = jax.typeof(inputs[0]).manual_axis_type
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)

    row_block = pl.BlockSpec((block, features), lambda i: (i, 0))
    sum_block = pl.BlockSpec((MAX_SUMS, _LANES), lambda i: (i, 0))
    results = pl.pallas_call(
        kernel,
        out_shape=[array((count, features), dtype) for dtype in outputs]
        + [array((blocks * MAX_SUMS, _LANES), jnp.float32)] * bool(sums),
        grid=(blocks,),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] + [row_block] * len(inputs),
        out_specs=[row_block] * len(outputs) + [sum_block] * bool(sums),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops * count * features,
            transcendentals=transcendentals * count * features,
            bytes_accessed=count * features * sum(jnp.dtype(dtype).itemsize for dtype in dtypes),
        ),
        name=name,
    )(scalars[None], *inputs)  # two dimensions: a block that `vmap` may stack
    total = jnp.zeros((0,), jnp.float32)
    if sums:
        total = results[-1].reshape(blocks, MAX_SUMS, _LANES)[:, :sums, 0].sum(0)
    return results[: len(outputs)], total


def strip_rows(dtypes: Sequence[jnp.dtype]) -> int:
    """Rows of one register tile: 8 of 4 bytes, 16 of 2, 32 of 1."""
    return 32 // min(jnp.dtype(dtype).itemsize for dtype in dtypes)


def block_rows(count: int, features: int, dtypes: Sequence[jnp.dtype]) -> int:
    """Rows per grid step that fit in VMEM, a multiple of the strip; 0 if not one strip fits."""
    strip = strip_rows(dtypes)
    width = math.ceil(features / _LANES) * _LANES
    temporaries = _TEMPORARIES * strip * width * 4
    per_row = 2 * width * sum(jnp.dtype(dtype).itemsize for dtype in dtypes)  # double-buffered
    fits = (VMEM_BYTES * 3 // 4 - temporaries) // per_row
    wanted = min(max(fits, 0), _MAX_BLOCK, math.ceil(count / strip) * strip)
    return wanted // strip * strip


def why_not(shape: tuple[int, ...], dtypes: Sequence[jnp.dtype]) -> str | None:
    """Why rows of these arrays cannot be served, or None."""
    features = shape[-1]
    if 0 in shape:
        return f"there is nothing to do for an array of shape {shape}"
    for dtype in dtypes:
        if dtype not in (jnp.float32, jnp.bfloat16):
            return f"the TPU kernel takes float32 and bfloat16; got {dtype}"
    if not block_rows(1, features, dtypes):
        return f"a strip of rows of {features} features does not fit in {VMEM_BYTES >> 20} MiB"
    return None
