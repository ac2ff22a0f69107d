"""Attention over chosen blocks, the public operation: validates and chooses."""

import jax

from bestiary.kernels.block_attention import blocked, reference
from bestiary.kernels.block_attention.blocks import Blocks, Places

Array = jax.Array


def block_attention(
    q: Array,
    k: Array,
    v: Array,
    places: Places,
    blocks: Blocks,
    chosen: Array,
    *,
    size: int,
    scale: float,
    softcap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """Causal attention of each query over its own block and the blocks it chose.

    q [batch, T, heads, head], k and v [batch, S, kv_heads, head] -> as q. Logits and softmax are
    float32, the result has the type of v. Long whole rows take time and memory that grow linearly
    with T; short rows and caches are masked dense attention.

    Args:
      places, blocks: where queries, keys and the choosable blocks of `size` lie.
      chosen: int32 [batch, T, selecting heads, n], indices of `blocks` or -1; all heads of one
        selecting head, which are neighbours, attend alike. None may be a query's own block.
      scale: multiplies q k.
      softcap: c bounds the logits by c tanh(s / c).
      sinks: [heads], extra logits without values.

    Raises:
      ValueError: the selecting heads are not kv_heads times a divisor of heads / kv_heads.
    """
    heads, kv_heads, selecting = q.shape[2], k.shape[2], chosen.shape[2]
    if heads % selecting or selecting % kv_heads:
        raise ValueError(
            f"chosen: {selecting} selecting heads; need a multiple of kv_heads {kv_heads} "
            f"that divides heads {heads}"
        )
    run = reference.block_attention
    if places.order is None and is_blocked(q.shape[1], size, chosen.shape[3]):
        run = blocked.block_attention
    return run(q, k, v, places, blocks, chosen, sinks, size=size, scale=scale, softcap=softcap)


def is_blocked(length: int, size: int, count: int) -> bool:
    """Whether whole rows of this length are worth the sorting that saves dead blocks."""
    return length >= 1024 and length >= 2 * (count + 1) * size


def multiplied_keys(length: int, size: int, count: int) -> float:
    """Keys that a query of a whole row is multiplied with, choosing `count` other blocks."""
    if is_blocked(length, size, count):
        return blocked.multiplied_keys(length, size, count)
    return length


def attended_keys(length: int, size: int, count: int) -> float:
    """Keys that a query of a whole row attends to, likewise, averaged over the row."""
    whole, rest = divmod(length, size)
    own = (whole * size * (size + 1) + rest * (rest + 1)) / 2
    others = sum(size * min(i, count) for i in range(whole)) + rest * min(whole, count)
    return (own + size * others) / length
