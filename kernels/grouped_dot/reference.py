"""The grouped product in plain JAX: a loop over blocks of rows, as many as the groups need.

A block starts at a row of its group and may run into the rows of the next one. Groups come in
order, so the next group's block overwrites what the last one of this group got wrong.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bestiary.kernels.dispatch import vary_alike

Array = jax.Array


def forward(x: Array, w: Array, sizes: Array) -> Array:
    """x [rows, D], w [groups, D, F] -> float32 [rows, F]."""
    return _rows(x, sizes, w.shape[2], lambda rows, group: _product(rows, w[group], 1, 0))


def rows(dy: Array, w: Array, sizes: Array) -> Array:
    """The gradient of x: dy [rows, F], w [groups, D, F] -> float32 [rows, D]."""
    return _rows(dy, sizes, w.shape[1], lambda rows, group: _product(rows, w[group], 1, 1))


def matrices(x: Array, dy: Array, sizes: Array) -> Array:
    """The gradient of w: x [rows, D], dy [rows, F] -> float32 [groups, D, F]."""
    block = block_size(x.shape[0], sizes.size)
    x, dy = _padded(x, block), _padded(dy, block)

    def add(dw: Array, group: Array, first: Array, inside: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(x, first, block)
        part = jnp.where(inside[:, None], part, 0)
        new = _product(part, jax.lax.dynamic_slice_in_dim(dy, first, block), 0, 0)
        return dw.at[group].add(new, mode="promise_in_bounds")

    shape = (sizes.size, x.shape[1], dy.shape[1])
    return _over_blocks(jnp.zeros(shape, jnp.float32), sizes, block, add, x, dy)


def block_size(num_rows: int, num_groups: int) -> int:
    """Rows multiplied at once: about half a group, so that little is computed in vain."""
    half = num_rows // (2 * num_groups)
    return min(128, max(8, 1 << half.bit_length()))


def _rows(x: Array, sizes: Array, width: int, product: Callable[[Array, Array], Array]) -> Array:
    num_rows, block = x.shape[0], block_size(x.shape[0], sizes.size)
    x = _padded(x, block)

    def write(y: Array, group: Array, first: Array, inside: Array) -> Array:
        del inside
        new = product(jax.lax.dynamic_slice_in_dim(x, first, block), group)
        return jax.lax.dynamic_update_slice_in_dim(y, new, first, 0)

    y = jnp.zeros((x.shape[0], width), jnp.float32)
    y = _over_blocks(y, sizes, block, write, x)[:num_rows]
    return jnp.where(jnp.arange(num_rows)[:, None] < sizes.sum(), y, 0)


def _over_blocks(
    carry: Array,
    sizes: Array,
    block: int,
    body: Callable[[Array, Array, Array, Array], Array],
    *used: Array,
) -> Array:
    """carry = body(carry, group, first row, which rows are the group's) for every block."""
    blocks = -(-sizes // block)
    last_block, last_row = jnp.cumsum(blocks), jnp.cumsum(sizes)
    # inside `jax.shard_map` the carry differs over the mesh as what it is made of does
    carry = vary_alike(carry, sizes, *used)[0]

    def one(i: Array, carry: Array) -> Array:
        group = jnp.searchsorted(last_block, i, side="right")
        nth = i - (last_block[group] - blocks[group])
        first = last_row[group] - sizes[group] + nth * block
        inside = first + jnp.arange(block) < last_row[group]
        return body(carry, group, first, inside)

    return jax.lax.fori_loop(0, last_block[-1], one, carry)


def _padded(x: Array, block: int) -> Array:
    """One block more, so that none reaches beyond the end (where slices would be moved back)."""
    return jnp.pad(x, ((0, block), (0, 0)))


def _product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    return jax.lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32
    )
