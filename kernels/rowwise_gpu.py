"""Row-wise operations on GPU (Mosaic): one warpgroup per row, the features in chunks.

A row is read once per `mean` and `write`; after the first time it comes from the L1 cache.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bestiary.kernels.dispatch import vary_alike

_THREADS = 128  # of a warpgroup
_VECTOR_BYTES = 16  # widest load of one thread


class Rows:
    """One row: what `math` of `rowwise` may do with it."""

    def __init__(self, load: Callable, store: Callable, features: int, chunk: int, layout):
        self._load, self._store = load, store
        self._features, self._chunk, self._layout = features, chunk, layout

    def mean(self, f: Callable) -> list[jax.Array]:
        """Means over the features of each array that `f(*inputs)` returns."""
        full, rest = divmod(self._features, self._chunk)
        zeros = plgpu.layout_cast(jnp.zeros((self._chunk,), jnp.float32), self._layout)
        total = [zeros] * len(jax.eval_shape(lambda: f(*self._load(0))))

        def add(i, total):
            return [t + v for t, v in zip(total, f(*self._load(i * self._chunk)), strict=True)]

        total = jax.lax.fori_loop(0, full, add, total)
        if rest:
            # The last chunk overlaps its neighbour, so that no access leaves the row.
            lane = plgpu.broadcasted_iota(jnp.int32, (self._chunk,), 0, layout=self._layout)
            new = lane >= self._chunk - rest
            last = f(*self._load(self._features - self._chunk))
            total = [t + jnp.where(new, v, 0.0) for t, v in zip(total, last, strict=True)]
        return [jnp.sum(t) / self._features for t in total]

    def write(self, f: Callable) -> None:
        """Stores the arrays that `f(*inputs)` returns as the outputs."""
        full, rest = divmod(self._features, self._chunk)

        def put(start):
            self._store(start, f(*self._load(start)))

        jax.lax.fori_loop(0, full, lambda i, _: put(i * self._chunk), None)
        if rest:
            put(self._features - self._chunk)


def rowwise(
    math: Callable[..., Sequence[jax.Array]],
    scalars: jax.Array,
    *inputs: jax.Array,
    outputs: Sequence[jnp.dtype],
    sums: int = 0,
    flops: int,
    transcendentals: int = 0,
    name: str,
) -> tuple[list[jax.Array], jax.Array]:
    """Runs `math(rows, scalars) -> per-row sums` over all rows of the inputs, in float32.

    Arguments and results are those of `bestiary.kernels.rowwise_tpu.rowwise`.
    """
    del flops, transcendentals  # Mosaic GPU kernels take no cost estimate
    count, features = inputs[0].shape
    vector = _vector(features, [x.dtype for x in inputs] + list(outputs))
    chunk = _THREADS * vector
    layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=vector)

    def kernel(scalar_ref, *refs):
        in_refs, out_refs = refs[: len(inputs)], refs[len(inputs) : len(inputs) + len(outputs)]
        row = jax.lax.axis_index("row")

        def load(start):
            at = (row, pl.ds(start, chunk))
            return [plgpu.layout_cast(ref[at], layout).astype(jnp.float32) for ref in in_refs]

        def store(start, values):
            for ref, value in zip(out_refs, values, strict=True):
                ref[row, pl.ds(start, chunk)] = value.astype(ref.dtype)

        rows = Rows(load, store, features, chunk, layout)
        row_sums = math(rows, [scalar_ref[k] for k in range(scalars.size)])
        for k, value in enumerate(row_sums):
            refs[-1][row, k] = value

    results = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((count, features), dtype) for dtype in outputs]
        + [jax.ShapeDtypeStruct((count, sums), jnp.float32)] * bool(sums),
        grid=(count,),
        grid_names=("row",),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(scalars, *inputs)
    _, *results = vary_alike(inputs[0], *results)  # Mosaic GPU kernels lose this mark
    total = results[-1].sum(0) if sums else jnp.zeros((0,), jnp.float32)
    return results[: len(outputs)], total


def _vector(features: int, dtypes: Sequence[jnp.dtype]) -> int:
    """Elements per thread and chunk: the widest that is aligned in every row; 0 if none fits."""
    vector = _VECTOR_BYTES // max(jnp.dtype(dtype).itemsize for dtype in dtypes)
    while vector and (features % vector or features < _THREADS * vector):
        vector //= 2
    return vector


def why_not(shape: tuple[int, ...], dtypes: Sequence[jnp.dtype]) -> str | None:
    """Why rows of these arrays cannot be served, or None."""
    features = shape[-1]
    if 0 in shape:
        return f"there is nothing to do for an array of shape {shape}"
    for dtype in dtypes:
        if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            return f"the GPU kernel takes float32, bfloat16 and float16; got {dtype}"
    if not _vector(features, dtypes):
        return f"the GPU kernel needs at least {_THREADS} features; got {features}"
    return None
