"""Keys and values that several layers share (cross-layer attention, Brandon et al. 2024; YOCO, Sun
et al. 2024): made once, cached once.

Token-mixer role: (params, x, ctx, cache) -> (y, cache, Aux).
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from bestiary.layers import cache as kv
from bestiary.layers.attention import Attention
from bestiary.layers.base import Array, Aux, Context, Layer, Tree, layer
from bestiary.layers.block_choice import BlockChoice
from bestiary.layers.cache_eviction import Evicting
from bestiary.layers.linear import project

OF_KEYS = ("key", "value", "key_bias", "value_bias", "key_norm")


@layer
class SharedAttention(Attention):
    """Attention to the keys and values of the `SharedKV` around it, without any of its own."""

    def spec(self) -> Tree:
        return {name: p for name, p in super().spec().items() if name not in OF_KEYS}

    def cache_spec(self, batch: int, length: int, dtype: Any = jnp.float32) -> Tree:
        del batch, length, dtype
        return {}

    def apply(
        self, params: Tree, x: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        if "kv" not in ctx.shared:
            raise ValueError("ctx.shared: no 'kv'; need a SharedKV around this layer")
        positions = jnp.arange(x.shape[1])[None] if ctx.positions is None else ctx.positions
        q = self.queries(params, x, positions)
        y = self.mix(params, q, ctx.shared["kv"], positions, ctx)
        return project("bsnh,nhd->bsd", y, params, "out"), cache, Aux()


@layer
class SharedKV(Layer):
    """`blocks`, whose mixers are `SharedAttention`, over the keys and values that `source` makes of
    norm(x), x being what enters the first: [batch, seq, dim] -> the same.

    Two blocks make cross-layer attention, with half the cache; one `Repeat` of all upper layers
    makes YOCO. Raises ValueError for a source that chooses blocks of keys by its own queries, and
    for a cache policy that follows the attention of one layer.
    """

    source: Attention
    """Only its keys, values and cache policy are used; the blocks have their own queries."""
    norm: Layer
    blocks: Layer

    def __post_init__(self) -> None:
        if isinstance(self.source, BlockChoice):
            name = type(self.source).__name__
            raise ValueError(f"source: {name}; need attention that chooses no blocks of keys")
        if isinstance(self.source.cache, Evicting):
            name = type(self.source.cache).__name__
            raise ValueError(
                f"source.cache: {name}; keys of several layers need one that asks for no attention"
            )

    def spec(self) -> Tree:
        source = {name: p for name, p in self.source.spec().items() if name in OF_KEYS}
        return {"norm": self.norm, "source": source, "blocks": self.blocks}

    def cache_spec(self, batch: int, length: int, dtype: Any = jnp.float32) -> Tree:
        parts = {"source": self.source, "blocks": self.blocks}
        return {name: part.cache_spec(batch, length, dtype) for name, part in parts.items()}

    def apply(
        self, params: Tree, x: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        positions = jnp.arange(x.shape[1])[None] if ctx.positions is None else ctx.positions
        normed = self.norm.apply(params["norm"], x)
        keys, kept = self.source.entries(params["source"], normed, positions), None
        if cache is not None:
            new = kv.tokens(keys, jnp.broadcast_to(positions, x.shape[:2]), ctx.segment_ids)
            keys, kept = self.source.keep({}, cache["source"], new, _no_queries)
        ctx = replace(ctx, shared=ctx.shared | {"kv": keys})
        inside = None if cache is None else cache["blocks"]
        y, inside, aux = self.blocks.apply(params["blocks"], x, ctx, inside)
        return y, None if cache is None else {"source": kept, "blocks": inside}, aux


def _no_queries(*args: Any, **kwargs: Any) -> Array:
    raise NotImplementedError("keys that several layers share have no queries of their own")
