"""Reading a few rows of a large table per token: weighted sums of rows, and products with them.

Every token has `k` entries; they are worked off one by one, so that no array [tokens, k, width]
exists, and the gradient of the table is built in place by adding to the rows that were read.

Weights, x and results are float32; tables may be stored narrower. Tables are sharded by columns
(logical axis "memory"): all devices then read equally much, whatever the rows. Where the same mesh
axis also shards the batch, the entries are gathered over it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bestiary.kernels.dispatch import axis_names, on_shards, vary_alike, why_not_sharded
from bestiary.layers.sharding import pspec

Array = jax.Array
Names = tuple[str, ...]


class Table(NamedTuple):
    """A table `values` [n, slices, width] and the `account` that its gradient is booked to: float32
    [devices, n, slices, width], equal to the values, which nobody reads.

    A reader returns the account that the next one is to take. Backward then hands one array from
    the last reader to the first, and each adds its rows to it in place: the table costs one pass,
    however many layers read it. Readers that take the same account have a pass each. `devices` are
    those with tokens of their own: their sums are added up once, behind the first reader.
    """

    values: Array
    account: Array


def lend(table: Array | Table) -> Table:
    """A table with a new account; one that has an account stays as it is."""
    if isinstance(table, Table):
        return table
    account = table.astype(jnp.float32).reshape(1, *table.shape)
    if (axes := _axes()) is not None:
        columns, tokens = axes[0], axes[1] + axes[2]
        shape = jax.sharding.get_abstract_mesh().shape
        devices = math.prod(shape[name] for name in tokens)
        account = jnp.broadcast_to(account, (devices, *table.shape))
        spec = P(tokens, None, None, columns)
        if not why_not_sharded(account.shape, spec, ()):
            account = jax.lax.with_sharding_constraint(account, spec)
    return Table(jax.lax.stop_gradient(table), account)


def sum_rows(table: Table, rows: Array, weights: Array) -> tuple[Array, Table]:
    """y = sum_k weights_k table[rows_k], slice by slice of the rows, into every group; and the
    table for the next reader.

    rows int32 [batch, seq, k] in [0, n), weights [batch, seq, k, groups, slices] -> float32 [batch,
    seq, groups, slices, width].
    """
    y, account = _booked_sum(*table, rows, weights)
    return y, table._replace(account=account)


def dot_rows(table: Table, rows: Array, x: Array) -> tuple[Array, Table]:
    """s_k = table[rows_k] . x for every slice and group; and the table for the next reader.

    rows int32 [batch, seq, k] in [0, n), x [batch, seq, groups, slices, width] -> float32 [batch,
    seq, k, groups, slices].
    """
    s, account = _booked_dot(*table, rows, x)
    return s, table._replace(account=account)


def _sum(values: Array, rows: Array, weights: Array) -> Array:
    def local(values: Array, rows: Array, weights: Array, columns: Names) -> Array:
        del columns

        def add(y: Array, entry: tuple[Array, Array]) -> tuple[Array, None]:
            row, weight = entry
            return y + weight[..., None] * _take(values, row), None

        start = jnp.zeros((*weights.shape[:2], *weights.shape[3:], values.shape[-1]))
        start, *_ = vary_alike(start, values, rows, weights)
        return jax.lax.scan(add, start, _entries(rows, weights), unroll=UNROLL)[0]

    return _sharded(local, "wide", values=values, rows=rows, weights=weights)


def _dot(values: Array, rows: Array, x: Array) -> Array:
    def local(values: Array, rows: Array, wide: Array, columns: Names) -> Array:
        # a sum as a product with ones: CPUs add up the last axis of a look-up 10 times as slowly
        ones = jnp.ones(wide.shape[-1])

        def product(_: None, row: Array) -> tuple[None, Array]:
            return None, jnp.dot(_take(values, row) * wide, ones, precision="highest")

        _, s = jax.lax.scan(product, None, *_entries(rows))
        return jax.lax.psum(jnp.moveaxis(s, 0, 2), columns)

    return _sharded(local, "weights", values=values, rows=rows, wide=x)


def _add(account: Array, rows: Array, weights: Array, x: Array) -> Array:
    """The account with weights_k x added to row rows_k: the gradient of both by the table."""

    def local(account: Array, rows: Array, weights: Array, wide: Array, columns: Names) -> Array:
        del columns

        def add(account: Array, entry: tuple[Array, Array]) -> tuple[Array, None]:
            row, weight = entry
            update = (weight[..., None] * wide).sum(2)
            return account.at[0, row].add(update, mode="promise_in_bounds"), None

        account, *_ = vary_alike(account, rows, weights, wide)
        return jax.lax.scan(add, account, _entries(rows, weights))[0]

    return _sharded(local, "account", account=account, rows=rows, weights=weights, wide=x)


UNROLL = 4  # entries that one pass over the result adds up


def _take(values: Array, row: Array) -> Array:
    """Rows [batch, seq] of the table, float32 [batch, seq, 1, slices, width]: alike for groups."""
    return values.at[row].get(mode="promise_in_bounds").astype(jnp.float32)[:, :, None]


def _entries(*arrays: Array) -> Any:
    """Arrays [batch, seq, k, ...] with the entries first, for a scan over them."""
    return tuple(jnp.moveaxis(a, 2, 0) for a in arrays)


def _sharded(local: Callable[..., Array], out: str, **arrays: Array) -> Array:
    """`local(**arrays, columns)` on every device's tokens and columns; `columns` are the mesh axes
    to sum over where those are summed."""
    whole = partial(local, columns=())
    if (axes := _axes()) is None:
        return whole(**arrays)
    memory, batch, seq = axes
    specs = {
        "values": P(None, None, memory),
        "account": P(batch + seq, None, None, memory),
        "rows": P(batch, seq),
        "weights": P(batch, seq),
        "wide": P(batch, seq, None, None, memory),
    }
    if any(why_not_sharded(a.shape, specs[name], ()) for name, a in arrays.items()):
        return whole(**arrays)

    def run(*values: Array) -> Array:
        return local(*values, columns=memory)

    return on_shards(run, [specs[name] for name in arrays], specs[out])(*arrays.values())


def _axes() -> tuple[Names, Names, Names] | None:
    """The mesh axes with several devices that shard columns, batch and positions."""
    claimed = pspec("memory", "batch", "seq")  # the columns claim their axes first
    if claimed is None:
        return None
    shape = jax.sharding.get_abstract_mesh().shape
    memory, batch, seq = (
        tuple(name for name in axis_names(entry) if shape[name] > 1) for entry in claimed
    )
    return memory, batch, seq


Saved = tuple[Array, Array, Array]


@jax.custom_vjp
def _booked_sum(values: Array, account: Array, rows: Array, weights: Array) -> tuple[Array, Array]:
    return _sum(values, rows, weights), account


def _sum_forward(
    values: Array, account: Array, rows: Array, weights: Array
) -> tuple[tuple[Array, Array], Saved]:
    return (_sum(values, rows, weights), account), (values, rows, weights)


def _sum_backward(saved: Saved, cts: tuple[Array, Array]) -> tuple[None, Array, None, Array]:
    (values, rows, weights), (d_y, d_account) = saved, cts
    return None, _add(d_account, rows, weights, d_y), None, _dot(values, rows, d_y)


_booked_sum.defvjp(_sum_forward, _sum_backward)


@jax.custom_vjp
def _booked_dot(values: Array, account: Array, rows: Array, x: Array) -> tuple[Array, Array]:
    return _dot(values, rows, x), account


def _dot_forward(
    values: Array, account: Array, rows: Array, x: Array
) -> tuple[tuple[Array, Array], Saved]:
    return (_dot(values, rows, x), account), (values, rows, x)


def _dot_backward(saved: Saved, cts: tuple[Array, Array]) -> tuple[None, Array, None, Array]:
    (values, rows, x), (d_s, d_account) = saved, cts
    return None, _add(d_account, rows, d_s, x), None, _sum(values, rows, d_s)


_booked_dot.defvjp(_dot_forward, _dot_backward)
