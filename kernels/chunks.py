"""Rows cut into equal chunks, the last filled up."""

import jax
import jax.numpy as jnp

Array = jax.Array


def whole_chunks(x: Array, chunk: int, fill: int | None = 0) -> Array:
    """x [batch, length, ...], continued to a multiple of `chunk` by `fill`, or by its last entry
    (None)."""
    pads = ((0, 0), (0, -x.shape[1] % chunk), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x, pads, "edge") if fill is None else jnp.pad(x, pads, constant_values=fill)
