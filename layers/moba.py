"""MoBA, mixture of block attention (Lu et al. 2025, arXiv 2502.13189): queries route to blocks.

Token-mixer role: (params, x, ctx, cache) -> (y, cache, Aux).
"""

from dataclasses import replace
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
from bestiary.layers import cache as kv
from bestiary.layers.attention import Attention
from bestiary.layers.base import Array, Aux, Context, Cost, Layer, Tree, layer, positive
from bestiary.layers.block_choice import BlockChoice, Newest, places_of, regular_blocks
from bestiary.layers.cache import need_complete


@layer
class MoBA(BlockChoice):
    """Attention of every query head over `top_k` blocks of `block_size` keys, its own included.

    gate = q mean(k in block), of whole blocks before the own one, which always counts; the best
    top_k - 1 of them, of equal gates the first, and the own one up to the query enter one softmax.
    The gate has no parameters and no gradient. Blocks begin with every document.

    The parameters are those of `Attention`, so that a model changes between the two at any time. In
    a `Repeat` the constant "full_attention" does so by layer: where it is not 0, all keys are seen,
    and read to decode, which `cache_spec` does not know.

    Raises ValueError for sizes below 1, `window`, a `mask`, and a cache that drops keys.
    """

    top_k: int

    represented = ("k",)
    representing = jnp.float32

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
        per_key, others = 4 * self.num_heads * self.head_dim, (self.block_size, self.top_k - 1)
        gates = max(length // self.block_size, 1) / 2 if self.top_k > 1 else 0
        executed, active = multiplied_keys(length, *others), attended_keys(length, *others)
        products = Cost(per_key * (executed + gates), per_key * (active + gates))
        return Layer.cost(self, length) + products

    def apply(
        self, params: Tree, x: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        if "full_attention" in ctx.layer:
            params = params | {"full_attention": ctx.layer["full_attention"]}
        return super().apply(params, x, ctx, cache)

    def mix(self, params: Tree, q: Array, keys: Tree, positions: Array, ctx: Context) -> Array:
        if "full_attention" not in params:
            return super().mix(params, q, keys, positions, ctx)

        def full(q: Array) -> Array:
            k, v = (keys[name].astype(q.dtype) for name in ("k", "v"))
            where = kv.where(keys, positions, ctx.segment_ids)
            return Attention.attend(self, params, q, k, v, **where)

        def blocks(q: Array) -> Array:
            return super(MoBA, self).mix(params, q, keys, positions, ctx)

        return jax.lax.cond(params["full_attention"] != 0, full, blocks, q)

    def attend(self, params: Tree, q: Array, k: Array, v: Array, **where: Any) -> Array:
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

    def entries_read(self, name: str) -> float:
        """Of every query head the chosen blocks; and the keys of the block that ends."""
        blocks = self.num_heads // self.num_kv_heads * self.top_k
        return (blocks + (name in self.represented)) * self.block_size

    def represent(self, params: Tree, name: str, keys: Array) -> Array:
        return jax.lax.stop_gradient(keys).mean(2, dtype=jnp.float32)

    def decode(self, params: Tree, q: Array, k: Array, v: Array, blocks: Tree, at: Newest) -> Array:
        choosable = regular_blocks(blocks["position"].shape[1], self.block_size)
        candidates = earlier(places_of(at), choosable, self.block_size)
        gates = self.in_order(self.gates(q, blocks["k"]), at)
        return self.attend_to_chosen(
            q,
            k,
            v,
            choose(gates, candidates, self.top_k - 1),
            at,
            scale=self.query_scale,
            softcap=self.softcap,
            sinks=params.get("sinks"),
        )

    def gates(self, q: Array, means: Array) -> Array:
        """Float32 [batch, T, heads, C] of queries and the means [batch, C, kv_heads, head]."""
        q = jax.lax.stop_gradient(q).astype(jnp.float32)
        q = q.reshape(*q.shape[:2], means.shape[2], -1, q.shape[3])
        gates = jnp.einsum("btkgd,bckd->btkgc", q, means, precision=jax.lax.Precision.HIGHEST)
        return gates.reshape(*q.shape[:2], -1, means.shape[1])

    def route(self, q: Array, k: Array, places: Places, blocks: Blocks) -> Array:
        """The blocks beside its own of every query: int32 [batch, T, heads, n], -1: none.

        q [batch, T, heads, head], k [batch, S, kv_heads, head].
        """
        count = self.top_k - 1
        if not count:
            return jnp.zeros((*q.shape[:3], 0), jnp.int32)
        means = self.means(k, places, blocks)

        def some(q: Array, q_document: Array, q_place: Array) -> tuple[Array]:
            here = replace(places, q_document=q_document, q_place=q_place)
            candidates = earlier(here, blocks, self.block_size)
            return (choose(self.gates(q, means), candidates, count),)

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
