"""Attention of one decoded token over keys that are gathered from a cache."""

import jax
import jax.numpy as jnp

from bestiary.kernels.attention.reference import dense

Array = jax.Array


def gathered_attention(
    q: Array,
    k: Array,
    v: Array,
    slots: Array,
    seen: Array,
    *,
    part: tuple[int, int] = (0, 1),
    scale: float,
    softcap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """Attention of q [batch, 1, heads, head] over `slots` of k and v [batch, S, kv_heads, head].

    Nothing else of k and v is read. Int32 slots and bool seen [batch, selecting heads, M]: all
    query heads of one selecting head, which are neighbours, attend to the same of the slots, those
    that are seen; where there are none the result is 0. With part (i, n), k and v have n heads for
    every key head, side by side, of which the i-th counts. Scale, softcap and sinks are those of
    `block_attention`.
    """
    batch, selecting, number = slots.shape
    index, parts = part

    def gather(x: Array) -> Array:
        x = x.reshape(*x.shape[:2], -1, parts, x.shape[3])
        rows, heads = (jnp.arange(n) for n in x.shape[::2][:2])
        by_head = slots.reshape(batch, len(heads), -1)
        # as one look-up: mapped over the heads it would transpose all of x
        some = x[rows[:, None, None], by_head, heads[:, None], index]
        return some.reshape(batch, selecting, number, -1).swapaxes(1, 2).astype(q.dtype)

    options = {"scale": scale, "softcap": softcap, "sinks": sinks}
    return dense(q, gather(k), gather(v), seen[:, :, None], **options)
