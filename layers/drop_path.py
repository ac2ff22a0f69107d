"""Stochastic depth (Huang et al. 2016, arXiv 1603.09382): in training, rows that pass by a branch.

As a residual branch of DeiT and KAT has it: what is kept is divided by the share that is kept.
"""

import zlib

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array, Context


def drop_path(y: Array, ctx: Context, branch: str) -> Array:
    """y [batch, ...], of each row all or nothing, where `ctx.layer["drop_path"]` says how often
    nothing.

    The rate, below 1, is that of this layer; without it, or without `ctx.key`, y stays as it is.
    Branches of one layer are drawn apart by their names.
    """
    if ctx.key is None or "drop_path" not in ctx.layer:
        return y
    keep = 1 - ctx.layer["drop_path"]
    key = jax.random.fold_in(ctx.key, zlib.crc32(f"drop_path/{branch}".encode()))
    kept = jax.random.bernoulli(key, keep, (len(y), *(1,) * (y.ndim - 1)))
    return jnp.where(kept, y / keep.astype(y.dtype), 0)
