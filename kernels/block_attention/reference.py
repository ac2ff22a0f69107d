"""Attention over chosen blocks as masked dense attention: the definition of truth."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from bestiary.kernels.attention.reference import dense
from bestiary.kernels.block_attention.blocks import Blocks, Places, block_of_keys, by_queries

Array = jax.Array


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
    of_kv = chosen.shape[2] // k.shape[2]
    block = block_of_keys(places, blocks, size)
    k, v = jnp.repeat(k, of_kv, 2), jnp.repeat(v, of_kv, 2)  # every selecting head has its own mask

    def some(q: Array, q_document: Array, q_place: Array, chosen: Array) -> tuple[Array]:
        here = replace(places, q_document=q_document, q_place=q_place)
        own = here.seen() & (q_place[:, :, None] // size == places.place[:, None] // size)
        picked = (chosen[..., None] == jnp.arange(blocks.start.shape[1])).any(-2).swapaxes(1, 2)
        belongs = jnp.broadcast_to(block, (q.shape[0], block.shape[1]))
        others = jax.vmap(lambda picked, block: picked[..., block])(picked, belongs)
        seen = own[:, None] | others & (belongs >= 0)[:, None, None]
        return (dense(q, k, v, seen, scale=scale, softcap=softcap, sinks=sinks),)

    return by_queries(some, q, places.q_document, places.q_place, chosen)[0]
