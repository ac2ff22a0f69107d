"""Softmax attention: multi-head, grouped-query and multi-query, with a decoding cache.

Token-mixer role: (params, x, ctx, cache) -> (y, cache, Aux).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bestiary.kernels.attention import Mask, attention, live_keys, visible, weights
from bestiary.kernels.attention.masks import CAUSAL, Window, seen_keys
from bestiary.kernels.chunks import whole_chunks
from bestiary.kernels.dispatch import Impl
from bestiary.layers import cache as kv
from bestiary.layers.base import (
    Array,
    Aux,
    Context,
    Cost,
    Layer,
    Param,
    Tree,
    layer,
    positive,
    weight,
    zeros,
)
from bestiary.layers.linear import project
from bestiary.layers.rope import Rope
from bestiary.layers.sharding import pspec

HEADS = ("batch", "seq", "heads", "head")
KV_HEADS = ("batch", "seq", "kv_heads", "head")
BLOCK = 512  # queries whose weights exist at a time


@layer
class Attention(Layer):
    """Causal self-attention [batch, seq, dim] -> the same.

    num_kv_heads = num_heads is multi-head attention, 1 is multi-query, between is grouped-query
    (Ainslie et al. 2023). Raises ValueError when num_heads is not a multiple of num_kv_heads or the
    rotated width is odd.
    """

    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool = False
    """Queries, keys and values have biases (Qwen2), which start at 0."""
    out_bias: bool = False
    rope: Rope | None = Rope()
    query_norm: Layer | None = None
    """Norm over head_dim of every query (QK-norm), or over all heads together where that is its
    width (OLMoE); key_norm likewise."""
    key_norm: Layer | None = None
    window: int | None = None
    """How many keys a query sees, its own included; None: all before it. A cache keeps as many."""
    mask: Mask = CAUSAL
    """Which keys a query may see by their places in their document, of those in the window. In rows
    of packed documents no kernel serves a mask that is not `relative`, such as sinks."""
    softcap: float | None = None
    """Bounds the logits to (-c, c) by c tanh(s / c) before masking (Gemma-2)."""
    sinks: bool = False
    """One learned logit per head that takes attention and gives no value (gpt-oss)."""
    scale: float | None = None
    """Multiplies q k; None: head_dim ** -0.5."""
    cache: kv.CachePolicy = kv.Full()
    """Which keys and values decoding keeps, and how."""
    impl: Impl = "auto"
    out_gain: float = 1.0
    """Scales the initial output projection; 0 starts the layer as the identity of the residual."""

    def __post_init__(self) -> None:
        positive(dim=self.dim, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads)
        positive(head_dim=self.head_dim, window=self.window)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: {self.num_kv_heads} does not divide num_heads {self.num_heads}"
            )
        if self.rope:
            self.rope.frequencies(self.head_dim)  # refuses an odd width
            if self.rope.scaling and self.rope.scaling.attention_factor != 1:
                kv.in_the_text(self.cache, "a rope that scales")

    @property
    def pattern(self) -> Mask:
        """Mask and window in one."""
        return self.mask if self.window is None else self.mask & Window(self.window)

    @property
    def query_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def spec(self) -> Tree:
        q = (self.dim, self.num_heads, self.head_dim)
        kv = (self.dim, self.num_kv_heads, self.head_dim)
        out = (self.num_heads, self.head_dim, self.dim)
        spec: Tree = {
            "query": weight(q, ("embed", "heads", "head")),
            "key": weight(kv, ("embed", "kv_heads", "head")),
            "value": weight(kv, ("embed", "kv_heads", "head")),
            "out": weight(out, ("heads", "head", "embed"), inputs=2, gain=self.out_gain),
        }
        if self.bias:
            spec |= {"query_bias": Param(q[1:], ("heads", "head"))}
            spec |= {
                f"{name}_bias": Param(kv[1:], ("kv_heads", "head")) for name in ("key", "value")
            }
        if self.out_bias:
            spec["out_bias"] = Param((self.dim,), (None,))
        if self.query_norm:
            spec["query_norm"] = self.query_norm
        if self.key_norm:
            spec["key_norm"] = self.key_norm
        if self.sinks:
            spec["sinks"] = Param((self.num_heads,), ("heads",), zeros)
        return spec

    def cost(self, length: int) -> Cost:
        """Adds q k and the weighted sum of v: executed over the keys of live blocks, active over
        those a query of a full sequence sees on average."""
        per_key = 4 * self.num_heads * self.head_dim
        executed, active = live_keys(self.pattern, length), seen_keys(self.pattern, length)
        return super().cost(length) + Cost(per_key * executed, per_key * active)

    @property
    def cached_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads

    def cache_spec(self, batch: int, length: int, dtype: Any = jnp.float32) -> Tree:
        entry = Param((self.cached_heads, self.head_dim), KV_HEADS[2:])
        entries = {"k": entry, "v": entry}
        return self.cache.spec(
            batch, length, entries, dtype, heads=self.num_heads, window=self.window
        )

    def apply(
        self, params: Tree, x: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        """With a cache, `ctx.positions` say where the tokens stand (negative: padding)."""
        positions = jnp.arange(x.shape[1])[None] if ctx.positions is None else ctx.positions
        q = self.queries(params, x, positions)
        keys = self.entries(params, x, positions)
        if cache is not None:
            at = jnp.broadcast_to(positions, x.shape[:2])
            new = kv.tokens(keys, at, ctx.segment_ids)
            queries = {"q": q} | kv.tokens({}, at, ctx.segment_ids)
            received = partial(self.received, params, queries)
            keys, cache = self.keep(params, cache, new, received)
        y = self.mix(params, q, keys, positions, ctx)
        return project("bsnh,nhd->bsd", y, params, "out"), cache, Aux()

    def keep(
        self, params: Tree, cache: Tree, new: Tree, received: kv.Received
    ) -> tuple[Tree, Tree]:
        """What queries of a call attend to, and the cache behind it; `new` is what it brings."""
        del params
        keys, cache = self.cache.update(cache, new, received, self.window)
        return self.cache.moved(keys, self.rotate), cache

    def queries(self, params: Tree, x: Array, positions: Array) -> Array:
        """[batch, seq, heads, head], rotated."""
        q = project("bsd,dnh->bsnh", x, params, "query", out=HEADS)
        if self.query_norm:
            q = _normed(self.query_norm, params["query_norm"], q)
        return self.rotate(q, positions)

    def entries(self, params: Tree, x: Array, positions: Array) -> Tree:
        """What is kept of every token: "k", rotated, and "v" [batch, seq, kv_heads, head]."""
        k = project("bsd,dnh->bsnh", x, params, "key", out=KV_HEADS)
        v = project("bsd,dnh->bsnh", x, params, "value", out=KV_HEADS)
        if self.key_norm:
            k = _normed(self.key_norm, params["key_norm"], k)
        return {"k": self.rotate(k, positions), "v": v}

    def mix(self, params: Tree, q: Array, keys: Tree, positions: Array, ctx: Context) -> Array:
        """Attends to the `entries` of these tokens, or to what a cache policy says they see."""
        k, v = keys["k"].astype(q.dtype), keys["v"].astype(q.dtype)
        where = kv.where(keys, positions, ctx.segment_ids, self.pattern)
        return self.attend(params, q, k, v, **where)

    def rotate(self, x: Array, positions: Array) -> Array:
        """Positions enter queries and keys [batch, seq, heads, head] here."""
        return x if self.rope is None else self.rope.apply(x, positions)

    def received(self, params: Tree, queries: Tree, keys: Tree, last: int | None = None) -> Array:
        """The attention that `keys` receive from `queries`: as the function `received`."""
        weigh = partial(self.weigh, params, keys["k"].astype(queries["q"].dtype))
        return received(weigh, queries, keys, self.pattern, last)

    def weigh(self, params: Tree, k: Array, q: Array, seen: Array) -> Array:
        """How queries weigh the seen keys: float32 [batch, kv_heads, heads / kv_heads, T, S]."""
        options = {"scale": self.query_scale, "softcap": self.softcap}
        return weights(q, k, seen, **options, sinks=params.get("sinks"))

    def attend(self, params: Tree, q: Array, k: Array, v: Array, **where: Any) -> Array:
        """Mixes values [batch, S, kv_heads, head] by queries [batch, T, heads, head] and keys.

        `where` says how both stand, as `cache.where` does: q_positions, kv_positions, q_segments
        and kv_segments, those of `kernels.attention.attention`.
        """
        return attention(
            q,
            k,
            v,
            mask=self.pattern,
            scale=self.query_scale,
            softcap=self.softcap,
            sinks=params.get("sinks"),
            spec=pspec(*HEADS),
            kv_spec=pspec(*KV_HEADS),
            impl=self.impl,
            **where,
        )


def _normed(norm: Layer, params: Tree, x: Array) -> Array:
    """x [batch, seq, heads, head] over its last axis, or over its last two."""
    if getattr(norm, "dim", x.shape[-1]) == x.shape[-1]:
        return norm.apply(params, x)
    return norm.apply(params, x.reshape(*x.shape[:2], -1)).reshape(x.shape)


def received(
    weigh: Callable[[Array, Array], Array],
    queries: Tree,
    keys: Tree,
    mask: Mask,
    last: int | None = None,
) -> Array:
    """The attention that keys receive, summed over queries: float32 [batch, kv_heads, heads /
    kv_heads, S].

    Args:
      weigh: (q [batch, T, heads, head], seen as `visible` returns) -> float32 [batch, kv_heads,
        heads / kv_heads, T, S].
      queries: "q", "position" and, where there are documents, "segment"; padding counts for none.
      keys: "position" and "segment" of a cache.
      mask: which of the keys the queries see.
      last: how many queries count, the newest of every row; None: all.
    """
    if last is not None and last < queries["position"].shape[1]:
        order = jnp.where(queries["position"] >= 0, jnp.arange(queries["position"].shape[1]), -1)
        _, newest = jax.lax.top_k(order, last)
        rows = jnp.arange(len(newest))[:, None]
        queries = {name: x[rows, newest] for name, x in queries.items()}
    batch, length = queries["position"].shape
    block = min(length, BLOCK)

    def split(name: str, x: Array) -> Array:
        x = whole_chunks(x, block, -1 if name == "position" else 0)
        return x.reshape(batch, -1, block, *x.shape[2:]).swapaxes(0, 1)

    def add(total: Array | float, some: Tree) -> tuple[Array, None]:
        position, segment = some["position"], some.get("segment")
        kv_segment = None if segment is None else keys["segment"]
        seen = visible(position, keys["position"], segment, kv_segment, mask)
        w = weigh(some["q"], seen)
        return total + jnp.where((position >= 0)[:, None, None, :, None], w, 0).sum(-2), None

    blocks = {name: split(name, x) for name, x in queries.items()}
    first, rest = ({name: x[part] for name, x in blocks.items()} for part in (0, slice(1, None)))
    return jax.lax.scan(add, add(0.0, first)[0], rest)[0]
