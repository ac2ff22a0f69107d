"""Attention over chosen blocks as masked dense attention: the definition of truth."""

import jax
import jax.numpy as jnp

from bestiary.kernels.block_attention.blocks import Blocks, Places, block_of_keys, by_queries

Array = jax.Array
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def block_attention(
    q: Array,
    k: Array,
    v: Array,
    places: Places,
    blocks: Blocks,
    chosen: Array,
    sinks: Array | None,
    *,
    size: int,
    scale: float,
    softcap: float | None,
) -> Array:
    """As `api.block_attention`; the mask is built for some of the queries at a time."""
    count = blocks.start.shape[1]
    block = block_of_keys(places, blocks, size)

    def some(q: Array, q_document: Array, q_place: Array, chosen: Array) -> tuple[Array]:
        here = places._replace(q_document=q_document, q_place=q_place)
        own = here.seen() & (q_place[:, :, None] // size == places.place[:, None] // size)
        picked = (chosen[..., None] == jnp.arange(count)).any(-2).swapaxes(1, 2)
        belongs = jnp.broadcast_to(block, (q.shape[0], block.shape[1]))
        other = jax.vmap(lambda picked, block: picked[..., block])(picked, belongs)
        return (dense(q, k, v, own[:, None] | other & (belongs >= 0)[:, None, None]),)

    def dense(q: Array, k: Array, v: Array, seen: Array) -> Array:
        """`seen` bool [batch, selecting heads, T, S]."""
        batch, length, heads, _ = q.shape
        kv_heads = k.shape[2]
        q = q.reshape(batch, length, kv_heads, heads // kv_heads, -1)
        logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        seen = jnp.repeat(seen, heads // seen.shape[1], 1).reshape(logits.shape)
        logits = jnp.where(seen, logits, MASKED)
        if sinks is not None:
            sink = sinks.astype(jnp.float32).reshape(kv_heads, -1)[None, :, :, None, None]
            sink = jnp.broadcast_to(sink, (*logits.shape[:-1], 1))
            weights = jax.nn.softmax(jnp.concatenate((logits, sink), -1), -1)[..., :-1]
        else:
            weights = jax.nn.softmax(logits, -1)
        out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v)
        return out.reshape(batch, length, heads, -1)

    return by_queries(some, q, places.q_document, places.q_place, chosen)[0]
