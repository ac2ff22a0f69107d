"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): a cache of one latent per token.

Token-mixer role: (params, x, ctx, cache) -> (y, cache, Aux).
"""

from functools import partial
from typing import Any

import jax.numpy as jnp

from bestiary.kernels.attention import Mask, attention, live_keys, weights
from bestiary.kernels.attention.masks import CAUSAL, seen_keys
from bestiary.kernels.dispatch import Impl
from bestiary.layers import cache as kv
from bestiary.layers.attention import HEADS, received
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
)
from bestiary.layers.linear import project
from bestiary.layers.norms import RMSNorm
from bestiary.layers.rope import Rope
from bestiary.layers.sharding import dot, pspec

LANES = 128  # heads wider than this are padded to a multiple, which the kernels need


@layer
class MLA(Layer):
    """Causal self-attention [batch, seq, dim] -> the same, over latents.

    c_q = norm(x W_qd), q = c_q W_q, per head [nope | rope]; [c | k_rope] = x W_kvd, c = norm(c);
    per head k = [c W_k | k_rope], v = c W_v. Only c and the rotated k_rope are cached, kv_rank +
    rope_dim numbers per token for all heads. Short queries decode in the absorbed form: q W_k^T
    meets the cached latents themselves, and W_v comes after the weighted sum.

    Raises ValueError for sizes below 1 and for an odd rotated width.
    """

    dim: int
    num_heads: int
    kv_rank: int
    """Width of the latent c of keys and values."""
    q_rank: int | None = None
    """Width of the latent of queries; None: queries are projected from x directly."""
    nope_dim: int
    """Channels of a head without position."""
    rope_dim: int
    """Channels of a head with rotary position; their key is shared by the heads."""
    value_dim: int
    bias: bool = False
    """The projections from and to the width have biases, a direct query excepted."""
    rope: Rope = Rope(interleaved=True)
    norm_eps: float = 1e-6
    """Of the norms on the latents."""
    scale: float | None = None
    """Multiplies q k; None: (nope_dim + rope_dim) ** -0.5."""
    mask: Mask = CAUSAL
    """Which keys a query may see by their positions, in either form."""
    cache: kv.CachePolicy = kv.Full()
    """Which latents decoding keeps, and how."""
    impl: Impl = "auto"
    out_gain: float = 1.0
    """Scales the initial output projection; 0 starts the layer as the identity of the residual."""

    def __post_init__(self) -> None:
        positive(dim=self.dim, num_heads=self.num_heads, kv_rank=self.kv_rank, q_rank=self.q_rank)
        positive(nope_dim=self.nope_dim, rope_dim=self.rope_dim, value_dim=self.value_dim)
        self.rope.frequencies(self.rope_dim)  # refuses an odd width
        kv.in_the_text(self.cache, type(self).__name__)

    @property
    def query_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @property
    def query_scale(self) -> float:
        return self.query_dim**-0.5 if self.scale is None else self.scale

    @property
    def width(self) -> int:
        """Channels of the heads that attend: queries, keys and values padded to one width."""
        widest = max(self.query_dim, self.value_dim)
        return widest if widest <= LANES else -(-widest // LANES) * LANES

    def spec(self) -> Tree:
        heads, latent = self.num_heads, self.kv_rank + self.rope_dim
        out = (heads, self.value_dim, self.dim)
        spec: Tree = {
            "kv_down": weight((self.dim, latent), ("embed", None)),
            "kv_norm": RMSNorm(dim=self.kv_rank, eps=self.norm_eps),
            "key": weight((self.kv_rank, heads, self.nope_dim), (None, "heads", "head")),
            "value": weight((self.kv_rank, heads, self.value_dim), (None, "heads", "head")),
            "out": weight(out, ("heads", "head", "embed"), inputs=2, gain=self.out_gain),
        }
        if self.q_rank is None:
            q = (self.dim, heads, self.query_dim)
            spec["query"] = weight(q, ("embed", "heads", "head"))
        else:
            q = (self.q_rank, heads, self.query_dim)
            spec["query_down"] = weight((self.dim, self.q_rank), ("embed", None))
            spec["query_norm"] = RMSNorm(dim=self.q_rank, eps=self.norm_eps)
            spec["query"] = weight(q, (None, "heads", "head"))
        if self.bias:
            spec |= {"kv_down_bias": Param((latent,), (None,)), "out_bias": Param(out[2:], (None,))}
            if self.q_rank is not None:
                spec["query_down_bias"] = Param((self.q_rank,), (None,))
        return spec

    def cost(self, length: int) -> Cost:
        """Adds q k and the weighted sum of v: executed padded over the keys of live blocks, active
        over those that a query of a full sequence sees on average."""
        executed = 4 * self.num_heads * self.width * live_keys(self.mask, length)
        seen = seen_keys(self.mask, length)
        active = 2 * self.num_heads * (self.query_dim + self.value_dim) * seen
        return super().cost(length) + Cost(executed, active)

    @property
    def cached(self) -> dict[str, Param]:
        """What is kept of a token, [1, width] each."""
        return {"k": Param((1, self.kv_rank + self.rope_dim), (None, None))}

    def cache_spec(self, batch: int, length: int, dtype: Any = jnp.float32) -> Tree:
        return self.cache.spec(batch, length, self.cached, dtype, heads=self.num_heads)

    def apply(
        self, params: Tree, x: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        """With a cache, `ctx.positions` say where the tokens stand (negative: padding)."""
        positions = jnp.arange(x.shape[1])[None] if ctx.positions is None else ctx.positions
        entries = self.entries(params, x, positions)
        latent = self.query_latent(params, x)
        q = self.queries(params, latent, positions)
        segments = ctx.segment_ids
        if cache is not None:
            at = jnp.broadcast_to(positions, x.shape[:2])
            queries = {"q": q} | kv.tokens({}, at, segments)
            received = partial(self.received, params, queries)
            entries, cache = self.cache.update(cache, kv.tokens(entries, at, segments), received)
        where = kv.where(entries, positions, segments, self.mask)
        y, aux = self.mix(params, x, latent, q, entries, where, ctx)
        return project("bsnh,nhd->bsd", y, params, "out"), cache, aux

    def entries(self, params: Tree, x: Array, positions: Array) -> Tree:
        """What is cached of every token, each [batch, seq, 1, ...]."""
        return {"k": self.latents(params, x, positions)}

    def mix(
        self, params: Tree, x: Array, latent: Array, q: Array, entries: Tree, where: Tree, ctx: Any
    ) -> tuple[Array, Aux]:
        """The heads' outputs [batch, T, heads, value_dim] for queries q over `entries`."""
        del x, latent, ctx
        latents = entries["k"].astype(q.dtype)
        own = latents.shape[2] > 1  # heads hold latents of their own
        absorbs = "q_positions" in where and (own or self.absorbs(q.shape[1], latents.shape[1]))
        attend = self.absorbed if absorbs else self.expanded
        return attend(params, q, latents, where), Aux()

    def query_latent(self, params: Tree, x: Array) -> Array:
        """What queries are projected from: [batch, seq, q_rank], or x itself."""
        if self.q_rank is None:
            return x
        x = project("bsd,dr->bsr", x, params, "query_down")
        return RMSNorm(dim=self.q_rank, eps=self.norm_eps).apply(params["query_norm"], x)

    def queries(self, params: Tree, latent: Array, positions: Array) -> Array:
        """[batch, seq, heads, nope_dim + rope_dim], the second part rotated."""
        q = project("bsd,dnh->bsnh", latent, params, "query", out=HEADS)
        rotated = self.rope.apply(q[..., self.nope_dim :], positions)
        return jnp.concatenate((q[..., : self.nope_dim], rotated), -1)

    def latents(self, params: Tree, x: Array, positions: Array) -> Array:
        """[batch, seq, 1, kv_rank + rope_dim]: the normalised latent and the rotated key."""
        x = project("bsd,dr->bsr", x, params, "kv_down")
        norm = RMSNorm(dim=self.kv_rank, eps=self.norm_eps)
        latent = norm.apply(params["kv_norm"], x[..., : self.kv_rank])
        key = self.rope.apply(x[..., None, self.kv_rank :], positions)
        return jnp.concatenate((latent[..., None, :], key), -1)

    def absorbs(self, length: int, slots: int) -> bool:
        """Whether the absorbed form multiplies less for `length` queries: it widens every q k and
        weighted sum, and projects queries instead of all cached latents."""
        widened = 2 * (self.kv_rank + self.rope_dim - self.width) * length * slots
        expanded = self.kv_rank * (self.nope_dim + self.value_dim) * (slots - length)
        return widened <= expanded

    def expanded(self, params: Tree, q: Array, latents: Array, where: Tree) -> Array:
        """Keys and values of every head from the latents: [batch, T, heads, value_dim]."""
        k, v = self.expand(params, latents)

        def padded(x: Array) -> Array:
            return jnp.pad(x, ((0, 0),) * 3 + ((0, self.width - x.shape[-1]),))

        spec = pspec(*HEADS)
        y = self.attend(padded(q), padded(k), padded(v), where, spec=spec, kv_spec=spec)
        return y[..., : self.value_dim]

    def absorbed(self, params: Tree, q: Array, latents: Array, where: Tree) -> Array:
        """Queries meet the latents, the one key and value of all heads: as `expanded`."""
        y = self.attend(self.absorb(params, q), latents, latents, where)
        return self.values(params, y)

    def expand(self, params: Tree, latents: Array) -> tuple[Array, Array]:
        """Keys [batch, S, heads, nope_dim + rope_dim] and values [batch, S, heads, value_dim]."""
        latent, rotated = latents[..., 0, : self.kv_rank], latents[..., self.kv_rank :]
        k = dot("bsr,rnh->bsnh", latent, params["key"], out=HEADS)
        v = dot("bsr,rnh->bsnh", latent, params["value"], out=HEADS)
        rotated = jnp.broadcast_to(rotated, (*k.shape[:-1], self.rope_dim))
        return jnp.concatenate((k, rotated), -1), v

    def absorb(self, params: Tree, q: Array) -> Array:
        """Queries that meet latents: [batch, T, heads, kv_rank + rope_dim]."""
        q_latent = dot("bsnh,rnh->bsnr", q[..., : self.nope_dim], params["key"])
        return jnp.concatenate((q_latent, q[..., self.nope_dim :]), -1)

    def values(self, params: Tree, latents: Array) -> Array:
        """Values of the heads from their sums of latents [batch, T, heads, kv_rank + rope_dim]."""
        return dot("bsnr,rnh->bsnh", latents[..., : self.kv_rank], params["value"], out=HEADS)

    def received(self, params: Tree, queries: Tree, keys: Tree, last: int | None = None) -> Array:
        """The attention that latents receive from `queries`: as that of `Attention`."""
        k = keys["k"].astype(queries["q"].dtype)

        def weigh(q: Array, seen: Array) -> Array:
            return weights(self.absorb(params, q), k, seen, scale=self.query_scale)

        return received(weigh, queries, keys, self.mask, last)

    def attend(self, q: Array, k: Array, v: Array, where: Tree, **specs: Any) -> Array:
        options = {"mask": self.mask, "scale": self.query_scale, "impl": self.impl}
        return attention(q, k, v, **options, **where, **specs)
