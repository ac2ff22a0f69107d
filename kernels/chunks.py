"""Rows cut into equal chunks, the last filled up."""

import jax
import jax.numpy as jnp

Array = jax.Array


def whole_chunks(x: Array, chunk: int, mode: str = "constant") -> Array:
    """x [batch, length, ...], filled up at its end to a multiple of `chunk`: with zeros, or as
    `mode` of `jnp.pad` says."""
    pads = ((0, 0), (0, -x.shape[1] % chunk), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x, pads, mode=mode)
