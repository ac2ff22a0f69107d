"""MoBA, mixture of block attention (Lu et al. 2025, arXiv 2502.13189): queries route to blocks.

Token-mixer role: (params, x, ctx, cache) -> (y, cache, Aux).
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bestiary.kernels.attention.masks import CAUSAL
from bestiary.kernels.block_attention import (
    Blocks,
    Places,
    attended_keys,
    block_attention,
    block_of_keys,
    by_queries,
    choosable_blocks,
    choose,
    earlier,
    find_places,
    multiplied_keys,
)
from bestiary.layers.attention import Attention
from bestiary.layers.base import Array, Aux, Context, Cost, Tree, layer, positive
from bestiary.layers.cache import need_complete


@layer
class MoBA(Attention):
    """Attention of every query head over `top_k` blocks of `block_size` keys, its own included.

    gate = q mean(k in block), of whole blocks before the own one, which always counts; the best
    top_k - 1 of them, of equal gates the first, and the own one up to the query enter one softmax.
    The gate has no parameters and no gradient. Blocks begin with every document.

    The parameters are those of `Attention`, so that a model changes between the two at any time. In
    a `Repeat` the constant "full_attention" does so by layer: where it is not 0, all keys are seen.

    Raises ValueError for sizes below 1, `window`, a `mask`, and a cache that drops keys.
    """

    block_size: int
    top_k: int

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(block_size=self.block_size, top_k=self.top_k)
        if self.window is not None:
            raise ValueError(f"window: {self.window}; MoBA takes none")
        if self.mask != CAUSAL:
            raise ValueError(f"mask: {self.mask}; MoBA needs Causal()")
        need_complete(self.cache, "MoBA")

    def cost(self, length: int) -> Cost:
        """Adds the gates, q k and the weighted sum of v: executed over the keys that blocks are
        multiplied with, active over those of the chosen blocks."""
        dense, per_key = super().cost(length), 4 * self.num_heads * self.head_dim
        gates = per_key / 2 * max(length // self.block_size, 1) if self.top_k > 1 else 0
        others = self.block_size, self.top_k - 1
        executed = multiplied_keys(length, *others) - length
        unused = self.mean_keys(length) - attended_keys(length, *others)
        return replace(
            dense,
            flops=dense.flops + per_key * executed + gates,
            active_flops=dense.active_flops - per_key * unused + gates,
        )

    def apply(
        self, params: Tree, x: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        if "full_attention" in ctx.layer:
            params = params | {"full_attention": ctx.layer["full_attention"]}
        return super().apply(params, x, ctx, cache)

    def attend(self, params: Tree, q: Array, k: Array, v: Array, **where: Any) -> Array:
        if "full_attention" not in params:
            return self.attend_to_blocks(params, q, k, v, **where)
        full, blocks = (partial(f, **where) for f in (super().attend, self.attend_to_blocks))
        return jax.lax.cond(params["full_attention"] != 0, full, blocks, params, q, k, v)

    def attend_to_blocks(self, params: Tree, q: Array, k: Array, v: Array, **where: Any) -> Array:
        places = find_places(q.shape[1], **where)
        blocks = choosable_blocks(places, self.block_size)
        return block_attention(
            q,
            k,
            v,
            places,
            blocks,
            self.route(q, k, places, blocks),
            size=self.block_size,
            scale=self.query_scale,
            softcap=self.softcap,
            sinks=params.get("sinks"),
        )

    def route(self, q: Array, k: Array, places: Places, blocks: Blocks) -> Array:
        """The blocks beside its own of every query: int32 [batch, T, heads, n], -1: none.

        q [batch, T, heads, head], k [batch, S, kv_heads, head].
        """
        count = self.top_k - 1
        if not count:
            return jnp.zeros((*q.shape[:3], 0), jnp.int32)
        means = jnp.repeat(self.means(k, places, blocks), q.shape[2] // k.shape[2], 2)

        def some(q: Array, q_document: Array, q_place: Array) -> tuple[Array]:
            here = replace(places, q_document=q_document, q_place=q_place)
            gates = jnp.einsum(
                "bthd,bchd->bthc", q.astype(jnp.float32), means, precision=jax.lax.Precision.HIGHEST
            )
            return (choose(gates, earlier(here, blocks, self.block_size), count),)

        q = jax.lax.stop_gradient(q)
        return by_queries(some, q, places.q_document, places.q_place)[0]

    def means(self, k: Array, places: Places, blocks: Blocks) -> Array:
        """The mean key of every block over the keys that it has: float32 [batch, C, kv_heads,
        head]."""
        num_blocks = blocks.start.shape[1]
        block = block_of_keys(places, blocks, self.block_size)
        block = jnp.broadcast_to(jnp.where(block < 0, num_blocks, block), k.shape[:2])

        def row(k: Array, block: Array) -> Array:
            ones = jnp.ones_like(block, jnp.float32)
            total, number = (
                jax.ops.segment_sum(x, block, num_blocks) for x in (k.astype(jnp.float32), ones)
            )
            return total / jnp.maximum(number, 1)[:, None, None]

        return jax.vmap(row)(jax.lax.stop_gradient(k), block)
