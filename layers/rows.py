"""Reading a few rows of a large table per token: weighted sums of rows, and products with them.

Every token has `k` entries; they are worked off one by one, so that no array [tokens, k, width]
exists, and the gradient of the table is built in place by adding to the rows that were read.

Weights, x and results are float32; tables may be stored narrower. Tables are sharded by columns
(logical axis "memory"): all devices then read equally much, whatever the rows. Where the same mesh
axis also shards the batch, the entries are gathered over it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bestiary.kernels.dispatch import axis_names, on_shards, vary_alike, why_not_sharded
from bestiary.layers.sharding import pspec

Array = jax.Array
Names = tuple[str, ...]


@jax.custom_vjp
def sum_rows(table: Array, rows: Array, weights: Array) -> Array:
    """y = sum_k weights_k table[rows_k], slice by slice of the rows, into every group.

    table [n, slices, width], rows int32 [batch, seq, k] in [0, n), weights [batch, seq, k, groups,
    slices] -> float32 [batch, seq, groups, slices, width].
    """

    def local(table: Array, rows: Array, weights: Array, tokens: Names, columns: Names) -> Array:
        del tokens, columns

        def add(y: Array, entry: tuple[Array, Array]) -> tuple[Array, None]:
            row, weight = entry
            return y + weight[..., None] * _take(table, row), None

        start = jnp.zeros((*weights.shape[:2], *weights.shape[3:], table.shape[-1]))
        start, *_ = vary_alike(start, table, rows, weights)
        return jax.lax.scan(add, start, _entries(rows, weights), unroll=UNROLL)[0]

    return _sharded(local, "wide", table=table, rows=rows, weights=weights)


@jax.custom_vjp
def dot_rows(table: Array, rows: Array, x: Array) -> Array:
    """s_k = table[rows_k] . x for every slice and group.

    table [n, slices, width], rows int32 [batch, seq, k] in [0, n), x [batch, seq, groups, slices,
    width] -> float32 [batch, seq, k, groups, slices].
    """

    def local(table: Array, rows: Array, wide: Array, tokens: Names, columns: Names) -> Array:
        del tokens

        # a sum as a product with ones: CPUs add up the last axis of a look-up 10 times as slowly
        ones = jnp.ones(wide.shape[-1])

        def product(_: None, row: Array) -> tuple[None, Array]:
            return None, jnp.dot(_take(table, row) * wide, ones, precision="highest")

        _, s = jax.lax.scan(product, None, *_entries(rows))
        return jax.lax.psum(jnp.moveaxis(s, 0, 2), columns)

    return _sharded(local, "weights", table=table, rows=rows, wide=x)


def add_rows(table: Array, rows: Array, weights: Array, x: Array) -> Array:
    """The gradient of both by the table: weights_k x added to row rows_k, shaped as the table."""

    def local(
        table: Array, rows: Array, weights: Array, wide: Array, tokens: Names, columns: Names
    ) -> Array:
        del columns

        def add(total: Array, entry: tuple[Array, Array]) -> tuple[Array, None]:
            row, weight = entry
            update = (weight[..., None] * wide).sum(2)
            return total.at[row].add(update, mode="promise_in_bounds"), None

        start, *_ = vary_alike(jnp.zeros(table.shape), table, rows, weights, wide)
        total, _ = jax.lax.scan(add, start, _entries(rows, weights))
        return jax.lax.psum(total, tokens).astype(table.dtype)

    return _sharded(local, "table", table=table, rows=rows, weights=weights, wide=x)


UNROLL = 4  # entries that one pass over the result adds up


def _take(table: Array, row: Array) -> Array:
    """Rows [batch, seq] of the table, float32 [batch, seq, 1, slices, width]: alike for groups."""
    return table.at[row].get(mode="promise_in_bounds").astype(jnp.float32)[:, :, None]


def _entries(*arrays: Array) -> Any:
    """Arrays [batch, seq, k, ...] with the entries first, for a scan over them."""
    return tuple(jnp.moveaxis(a, 2, 0) for a in arrays)


def _sharded(local: Callable[..., Array], out: str, **arrays: Array) -> Array:
    """`local(**arrays, tokens, columns)` on every device's tokens and columns; `tokens` and
    `columns` are the mesh axes to sum over where those are summed."""
    whole = partial(local, tokens=(), columns=())
    claimed = pspec("memory", "batch", "seq")  # the columns claim their axes first
    if claimed is None:
        return whole(**arrays)
    memory, batch, seq = map(_several, claimed)
    specs = {
        "table": P(None, None, memory),
        "rows": P(batch, seq),
        "weights": P(batch, seq),
        "wide": P(batch, seq, None, None, memory),
    }
    if any(why_not_sharded(a.shape, specs[name], ()) for name, a in arrays.items()):
        return whole(**arrays)

    def run(*values: Array) -> Array:
        return local(*values, tokens=batch + seq, columns=memory)

    return on_shards(run, [specs[name] for name in arrays], specs[out])(*arrays.values())


def _several(entry: Any) -> Names:
    """The mesh axes of a spec's entry that have several devices."""
    shape = jax.sharding.get_abstract_mesh().shape
    return tuple(name for name in axis_names(entry) if shape[name] > 1)


Saved = tuple[Array, Array, Array]


def _sum_forward(table: Array, rows: Array, weights: Array) -> tuple[Array, Saved]:
    return sum_rows(table, rows, weights), (table, rows, weights)


def _sum_backward(saved: Saved, d_y: Array) -> tuple[Array, None, Array]:
    table, rows, weights = saved
    return add_rows(table, rows, weights, d_y), None, dot_rows(table, rows, d_y)


def _dot_forward(table: Array, rows: Array, x: Array) -> tuple[Array, Saved]:
    return dot_rows(table, rows, x), (table, rows, x)


def _dot_backward(saved: Saved, d_s: Array) -> tuple[Array, None, Array]:
    table, rows, x = saved
    return add_rows(table, rows, d_s, x), None, sum_rows(table, rows, d_s)


sum_rows.defvjp(_sum_forward, _sum_backward)
dot_rows.defvjp(_dot_forward, _dot_backward)
