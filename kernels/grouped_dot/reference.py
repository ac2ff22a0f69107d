"""The grouped product in plain JAX: group after group, in blocks of rows, as many as it has.

Large blocks come first, since they run fastest, and smaller ones take the rest, so that little is
computed in vain. Results are written in place, and only into the rows of the group.
"""

from collections.abc import Callable
from typing import NamedTuple

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
    num_rows, num_groups = x.shape[0], sizes.size
    # of a group's blocks the first is not added to zeros: a pass less over every matrix
    *larger, least = block_sizes(num_rows, num_groups)
    first = next((size for size in larger if size <= num_rows // num_groups), least)

    def of_a_group(bounds: tuple[Array, Array]) -> Array:
        def product(block: Block) -> Array:
            return _product(block.of(x), jnp.where(block.inside, block.of(dy), 0), 0, 0)

        start, end = bounds
        dw = product(_block(start, end, first, num_rows))
        rest = jnp.minimum(start + first, end), end
        return _over_blocks(lambda block, dw: dw + product(block), dw, rest, num_rows, num_groups)

    return jax.lax.map(of_a_group, _bounds(sizes))


class Block(NamedTuple):
    """Consecutive rows, as many as a program multiplies at once."""

    start: Array
    inside: Array
    """bool [size, 1]: which rows are the group's."""

    def of(self, x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.inside.size)


def block_sizes(num_rows: int, num_groups: int) -> list[int]:
    """Rows multiplied at once, from the most to the fewest."""
    least = 32 if num_rows >= 32 * num_groups else 8
    fitting = [size for size in (512, 128, 32, 8) if least <= size <= num_rows]
    return fitting or [num_rows]


def _rows(
    x: Array, w: Array, sizes: Array, width: int, product: Callable[[Array, Array], Array]
) -> Array:
    """Every row's product with its group's matrix; 0 behind the last group."""

    def of_a_group(y: Array, group: tuple[Array, tuple[Array, Array]]) -> tuple[Array, None]:
        matrix, bounds = group

        def write(block: Block, y: Array) -> Array:
            new = jnp.where(block.inside, product(block.of(x), matrix), block.of(y))
            return jax.lax.dynamic_update_slice_in_dim(y, new, block.start, 0)

        return _over_blocks(write, y, bounds, x.shape[0], sizes.size), None

    # inside `jax.shard_map` the carry differs over the mesh as what it is made of does
    y, *_ = vary_alike(jnp.zeros((x.shape[0], width), jnp.float32), x, w, sizes)
    return jax.lax.scan(of_a_group, y, (w, _bounds(sizes)))[0]


def _bounds(sizes: Array) -> tuple[Array, Array]:
    """The first row of every group and the first behind it, int32 [groups] each."""
    end = jnp.cumsum(sizes)
    return end - sizes, end


def _over_blocks(
    step: Callable[[Block, Array], Array],
    carry: Array,
    bounds: tuple[Array, Array],
    num_rows: int,
    num_groups: int,
) -> Array:
    """`step` over the blocks of the group between `bounds`, from `carry` on."""
    start, end = bounds
    sizes = block_sizes(num_rows, num_groups)
    for size in sizes:

        def one(i: Array, carry: Array, start: Array = start, size: int = size) -> Array:
            return step(_block(start + i * size, end, size, num_rows), carry)

        rest = size - 1 if size == sizes[-1] else 0  # the last block may be filled in part
        count = (end - start + rest) // size
        carry = jax.lax.fori_loop(0, count, one, carry)
        start = start + count * size
    return carry


def _block(first: Array, end: Array, size: int, num_rows: int) -> Block:
    """From row `first` on, or what is left of it before `end`."""
    # a slice that reached beyond the last row would be moved back unnoticed
    at = jnp.minimum(first, num_rows - size)
    row = at + jnp.arange(size)[:, None]
    return Block(at, (row >= first) & (row < end))


def _product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    return jax.lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32
    )
