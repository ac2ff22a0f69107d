"""The grouped product in plain JAX: group after group, in blocks of rows, as many as it has.

A group's last block may run into the rows of the next one. Groups come in order, so the next one
overwrites what that block got wrong.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bestiary.kernels.dispatch import vary_alike

Array = jax.Array


def forward(x: Array, w: Array, sizes: Array) -> Array:
    """x [rows, D], w [groups, D, F] -> float32 [rows, F]."""
    return _rows(x, w, sizes, w.shape[2], lambda rows, w: _product(rows, w, 1, 0))


def rows(dy: Array, w: Array, sizes: Array) -> Array:
    """The gradient of x: dy [rows, F], w [groups, D, F] -> float32 [rows, D]."""
    return _rows(dy, w, sizes, w.shape[1], lambda rows, w: _product(rows, w, 1, 1))


def matrices(x: Array, dy: Array, sizes: Array) -> Array:
    """The gradient of w: x [rows, D], dy [rows, F] -> float32 [groups, D, F]."""
    block = block_size(x.shape[0], sizes.size)
    x, dy = _padded(x, block), _padded(dy, block)

    def one(group: tuple[Array, Array]) -> Array:
        start, size = group

        def add(i: Array, dw: Array) -> Array:
            first = start + i * block
            inside = i * block + jnp.arange(block) < size
            part = jnp.where(inside[:, None], jax.lax.dynamic_slice_in_dim(x, first, block), 0)
            return dw + _product(part, jax.lax.dynamic_slice_in_dim(dy, first, block), 0, 0)

        dw = jnp.zeros((x.shape[1], dy.shape[1]), jnp.float32)
        return jax.lax.fori_loop(0, -(-size // block), add, vary_alike(dw, x, dy, size)[0])

    return jax.lax.map(one, (jnp.cumsum(sizes) - sizes, sizes))


def block_size(num_rows: int, num_groups: int) -> int:
    """Rows multiplied at once: about a quarter of a group, so that little is computed in vain."""
    quarter = max(1, num_rows // (4 * num_groups))
    return min(128, max(8, 1 << quarter.bit_length() - 1))


def _rows(
    x: Array, w: Array, sizes: Array, width: int, product: Callable[[Array, Array], Array]
) -> Array:
    """Every row's product with its group's matrix."""
    num_rows, block = x.shape[0], block_size(x.shape[0], sizes.size)
    x = _padded(x, block)

    def of_a_group(y: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        matrix, start, size = group

        def one(i: Array, y: Array) -> Array:
            first = start + i * block
            new = product(jax.lax.dynamic_slice_in_dim(x, first, block), matrix)
            return jax.lax.dynamic_update_slice_in_dim(y, new, first, 0)

        return jax.lax.fori_loop(0, -(-size // block), one, y), None

    last_row = jnp.cumsum(sizes)
    # inside `jax.shard_map` the carry differs over the mesh as what it is made of does
    y, *_ = vary_alike(jnp.zeros((x.shape[0], width), jnp.float32), x, w, sizes)
    y, _ = jax.lax.scan(of_a_group, y, (w, last_row - sizes, sizes))
    return jnp.where(jnp.arange(num_rows)[:, None] < last_row[-1], y[:num_rows], 0)


def _padded(x: Array, block: int) -> Array:
    """One block more, so that none reaches beyond the end (where slices would be moved back)."""
    return jnp.pad(x, ((0, block), (0, 0)))


def _product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    return jax.lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32
    )
