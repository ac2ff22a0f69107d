"""Rows cut into equal chunks, the last filled up, or into runs of equal values."""

import jax
import jax.numpy as jnp

Array = jax.Array


def whole_chunks(x: Array, chunk: int, fill: int | None = 0) -> Array:
    """x [batch, length, ...], continued to a multiple of `chunk` by `fill`, or by its last entry
    (None)."""
    pads = ((0, 0), (0, -x.shape[1] % chunk), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x, pads, "edge") if fill is None else jnp.pad(x, pads, constant_values=fill)


def runs(x: Array) -> tuple[Array, Array]:
    """Of a row [batch, length] the number of the run of equal values, and the index of its
    first: int32 of the same shape."""
    new = (x != jnp.roll(x, 1, 1)).at[:, 0].set(True)
    first = jax.lax.cummax(jnp.where(new, jnp.arange(x.shape[1]), 0), 1)
    return jnp.cumsum(new, 1) - 1, first
