"""The key-value cache: a ring of slots that know their positions.

A full cache has one slot per position; that of a window of w keys has w slots, and position p is in
slot p mod w. A slot at position -1 is empty.
"""

import jax.numpy as jnp

from bestiary.layers.base import Array, Param, Tree, constant


def kv_cache_spec(batch: int, slots: int, kv_heads: int, head_dim: int, dtype: object) -> Tree:
    """Declares {"k", "v"} [batch, slots, kv_heads, head] and int32 {"position", "segment"} [batch,
    slots]."""
    kv = Param((batch, slots, kv_heads, head_dim), ("batch", None, "kv_heads", "head"), dtype=dtype)
    index = Param((batch, slots), ("batch", None), constant(-1), jnp.int32)
    return {"k": kv, "v": kv, "position": index, "segment": index}


def write(cache: Tree, k: Array, v: Array, positions: Array, segments: Array | None) -> Tree:
    """Puts keys and values [batch, T, ...] of int32 `positions` [batch, T] into their slots.

    Entries at negative positions (padding) are not written, nor those that a later one of the same
    call would overwrite.
    """
    slots = cache["position"].shape[1]
    last = positions.max(1, keepdims=True)
    keep = (positions >= 0) & (positions > last - slots)
    slot = jnp.where(keep, positions % slots, slots)  # out of range: dropped
    rows = jnp.arange(k.shape[0])[:, None]
    segments = jnp.zeros_like(positions) if segments is None else segments
    new = {"k": k, "v": v, "position": positions, "segment": segments}
    return {
        name: old.at[rows, slot].set(new[name].astype(old.dtype), mode="drop")
        for name, old in cache.items()
    }


def extend(cache: Tree, k: Array, v: Array, positions: Array, segments: Array | None) -> Tree:
    """The old entries and the new ones side by side: what a chunk of queries attends to when
    writing it into the ring would overwrite keys that its first queries still see."""
    segments = jnp.zeros_like(positions) if segments is None else segments
    new = {"k": k, "v": v, "position": positions, "segment": segments}
    return {
        name: jnp.concatenate((old, new[name].astype(old.dtype)), 1) for name, old in cache.items()
    }
