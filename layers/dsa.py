"""DeepSeek sparse attention (DeepSeek-V3.2-Exp 2025): a lightning indexer chooses MLA's keys.

Token-mixer role: (params, x, ctx, cache) -> (y, cache, Aux).
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from bestiary.kernels import block_attention as blocks
from bestiary.kernels.attention import visible
from bestiary.kernels.attention.masks import seen_keys
from bestiary.kernels.attention.reference import MASKED
from bestiary.layers.base import (
    Array,
    Aux,
    Cost,
    Layer,
    Param,
    Tree,
    layer,
    positive,
    weight,
)
from bestiary.layers.cache_eviction import Evicting
from bestiary.layers.mla import MLA
from bestiary.layers.norms import LayerNorm
from bestiary.layers.rope import Rope
from bestiary.layers.sharding import dot

Stage = Literal["warmup", "sparse"]


@layer
class Indexer(Layer):
    """I_ts = sum_j w_tj relu(q_tj k_s / sqrt(head_dim)), which ranks the keys of a query.

    q_j = c_q W_q per head j, w = x W_w / sqrt(num_heads), and k = norm(x W_k) for all heads. The
    first `rope_dim` channels of queries and keys are rotated.
    """

    dim: int
    q_rank: int
    num_heads: int
    head_dim: int
    rope_dim: int
    rope: Rope = Rope()
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        positive(dim=self.dim, q_rank=self.q_rank, num_heads=self.num_heads)
        if not 0 < self.rope_dim <= self.head_dim:
            raise ValueError(f"rope_dim: {self.rope_dim}; need 1 to head_dim {self.head_dim}")
        self.rope.frequencies(self.rope_dim)  # refuses an odd width

    def spec(self) -> Tree:
        query = (self.q_rank, self.num_heads, self.head_dim)
        return {
            "query": weight(query, (None, None, "head")),
            "key": weight((self.dim, self.head_dim), ("embed", "head")),
            "key_norm": LayerNorm(dim=self.head_dim, eps=self.norm_eps),
            "weight": weight((self.dim, self.num_heads), ("embed", None)),
        }

    def queries(
        self, params: Tree, x: Array, latent: Array, positions: Array
    ) -> tuple[Array, Array]:
        """q [batch, seq, num_heads, head_dim] and w [batch, seq, num_heads], of x [batch, seq, dim]
        and the latent [batch, seq, q_rank]."""
        q = self.rotate(dot("bsr,rnh->bsnh", latent, params["query"]), positions)
        w = dot("bsd,dn->bsn", x, params["weight"], dtype=jnp.float32)
        return q, w * self.num_heads**-0.5

    def keys(self, params: Tree, x: Array, positions: Array) -> Array:
        """[batch, seq, 1, head_dim] of x [batch, seq, dim]."""
        norm = LayerNorm(dim=self.head_dim, eps=self.norm_eps)
        k = norm.apply(params["key_norm"], dot("bsd,dh->bsh", x, params["key"]))
        return self.rotate(k[..., None, :], positions)

    def rotate(self, x: Array, positions: Array) -> Array:
        turned = self.rope.apply(x[..., : self.rope_dim], positions)
        return jnp.concatenate((turned, x[..., self.rope_dim :]), -1)

    def scores(self, q: Array, w: Array, k: Array) -> Array:
        """float32 [batch, T, S] of `queries` [batch, T, ...] and `keys` [batch, S, ...]."""
        products = jnp.einsum("btnh,bsh->btns", q, k[:, :, 0], preferred_element_type=jnp.float32)
        products = jax.nn.relu(products * self.head_dim**-0.5)
        return jnp.einsum("btns,btn->bts", products, w)


@layer
class DSA(MLA):
    """MLA over the `top_k` visible keys of every query with the largest index scores.

    All heads share the choice; of equal scores the earlier slot wins; the choice has no gradient.
    The indexer learns from `Aux.losses["indexer"]` alone, its inputs detached: the divergence
    KL(p || softmax(I)) of p, what the heads attend to on average, over

      stage "warmup": all visible keys, which all are attended to; train nothing but the indexer
        (an experiment's `only="indexer"`);
      stage "sparse": the chosen keys.

    Raises ValueError as MLA does, without a latent for queries, and for an unknown stage.
    """

    top_k: int
    index_heads: int
    index_dim: int
    index_rope: Rope = Rope()
    """Of the first rope_dim channels of index queries and keys."""
    index_norm_eps: float = 1e-6
    stage: Stage = "sparse"
    index_loss: float = 1.0
    """Coefficient of the indexer's loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(top_k=self.top_k)
        if self.q_rank is None:
            raise ValueError("q_rank: None; the indexer needs a latent of queries")
        if self.stage not in get_args(Stage):
            raise ValueError(f"stage: {self.stage!r}; need one of {', '.join(get_args(Stage))}")
        _ = self.indexer  # refuses what an indexer cannot be
        if isinstance(self.cache, Evicting) and self.cache.heads == "query":
            raise ValueError("cache.heads: 'query'; DSA chooses the same keys for all heads")

    @property
    def indexer(self) -> Indexer:
        assert self.q_rank is not None
        return Indexer(
            dim=self.dim,
            q_rank=self.q_rank,
            num_heads=self.index_heads,
            head_dim=self.index_dim,
            rope_dim=self.rope_dim,
            rope=self.index_rope,
            norm_eps=self.index_norm_eps,
        )

    def spec(self) -> Tree:
        return super().spec() | {"indexer": self.indexer}

    def cost(self, length: int) -> Cost:
        """Adds what heads multiply: with all keys or, gathered, with `top_k` latents; active are
        those that a query of a full sequence attends to on average. The indexer scores all keys;
        active are those seen."""
        if self.gathers(length):
            per_key, keys = 4 * self.num_heads * (self.kv_rank + self.rope_dim), self.top_k
        else:
            per_key, keys = 2 * self.num_heads * (self.query_dim + self.value_dim), length
        chosen = length if self.stage == "warmup" else min(self.top_k, length)
        attended = Cost(per_key * keys, per_key * seen_keys(self.mask, length, chosen))
        per_score = 2 * self.index_heads * (self.index_dim + 1)
        scored = Cost(per_score * length, per_score * seen_keys(self.mask, length))
        return Layer.cost(self, length) + attended + scored

    @property
    def cached(self) -> dict[str, Param]:
        """Latents, and the indexer's keys."""
        return super().cached | {"index": Param((1, self.index_dim), (None, None))}

    def entries(self, params: Tree, x: Array, positions: Array) -> Tree:
        """Latents, and the indexer's keys of them."""
        keys = self.indexer.keys(params["indexer"], jax.lax.stop_gradient(x), positions)
        return super().entries(params, x, positions) | {"index": keys}

    def mix(
        self, params: Tree, x: Array, latent: Array, q: Array, entries: Tree, where: Tree, ctx: Any
    ) -> tuple[Array, Aux]:
        """As MLA, and the indexer's loss: queries in blocks, so that no scores [T, S] exist."""
        order = jnp.arange(q.shape[1])[None]
        positions = where.get("q_positions", order)
        turn = order if ctx.positions is None else ctx.positions
        x, latent = jax.lax.stop_gradient((x, latent))
        index_q, index_w = self.indexer.queries(params["indexer"], x, latent, turn)
        latents, index_k = (entries[name].astype(q.dtype) for name in ("k", "index"))
        kv_positions = where.get("kv_positions", jnp.arange(latents.shape[1])[None])
        gathers = self.gathers(latents.shape[1])
        if gathers:
            q, k, v = self.absorb(params, q), latents, latents
        else:
            k, v = self.expand(params, latents)

        def block(q: Array, index_q: Array, index_w: Array, positions: Array, segments: Any) -> Any:
            seen = visible(positions, kv_positions, segments, where["kv_segments"], self.mask)
            scores = self.indexer.scores(index_q, index_w, index_k)
            return (self.gathered if gathers else self.masked)(q, k, v, scores, seen)

        positions = jnp.broadcast_to(positions, q.shape[:2])
        y, divergence, mass = blocks.by_queries(
            block, q, index_q, index_w, positions, where["q_segments"]
        )
        losses = {"indexer": self.index_loss * ctx.mean(divergence)}
        aux = Aux(losses, {"indexed_mass": ctx.mean(mass)})
        return self.values(params, y) if gathers else y, aux

    def gathers(self, slots: int) -> bool:
        """Whether the chosen latents, gathered for every query, cost fewer products than a mask
        over the keys of all heads."""
        gathered = self.top_k * (2 * self.kv_rank + self.rope_dim)
        masked = slots * (self.query_dim + self.value_dim)
        return self.stage == "sparse" and self.top_k <= slots and gathered < masked

    def masked(
        self, q: Array, k: Array, v: Array, scores: Array, seen: Array
    ) -> tuple[Array, Array, Array]:
        """Queries [batch, T, heads, ...] over keys and values [batch, S, heads, ...]: y, and
        float32 [batch, T]: the indexer's divergence and the attention that its choice holds."""
        chosen = choose(scores, seen, self.top_k)
        kept = seen if self.stage == "warmup" else chosen
        logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
        weights = softmax(self.query_scale * logits, kept[:, None])
        y = jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v)
        p = weights.mean(1)
        return y, divergence(p, scores, kept), jnp.where(chosen, p, 0).sum(-1)

    def gathered(
        self, q: Array, k: Array, v: Array, scores: Array, seen: Array
    ) -> tuple[Array, Array, Array]:
        """As `masked`, absorbed queries over the chosen latents [batch, S, 1, ...] alone."""
        del v
        slots = chosen_slots(scores, seen, self.top_k)
        kept, slots = slots >= 0, jnp.maximum(slots, 0)
        scores = jnp.take_along_axis(scores, slots, 2)
        latents = jax.vmap(lambda rows, slots: rows[slots])(k[:, :, 0], slots)
        logits = jnp.einsum("btnr,btkr->btnk", q, latents, preferred_element_type=jnp.float32)
        weights = softmax(self.query_scale * logits, kept[:, :, None])
        y = jnp.einsum("btnk,btkr->btnr", weights.astype(k.dtype), latents)
        p = weights.mean(2)
        return y, divergence(p, scores, kept), p.sum(-1)


def choose(scores: Array, seen: Array, top_k: int) -> Array:
    """The `top_k` largest of the seen scores [batch, T, S], of equal ones the first: bool."""
    slots = chosen_slots(scores, seen, top_k)
    slots = jnp.where(slots >= 0, slots, scores.shape[-1])  # out of range: dropped
    batch, row = jnp.arange(slots.shape[0])[:, None, None], jnp.arange(slots.shape[1])[:, None]
    return jnp.zeros(scores.shape, bool).at[batch, row, slots].set(True, mode="drop")


def chosen_slots(scores: Array, seen: Array, top_k: int) -> Array:
    """As `choose`, their slots: int32 [batch, T, min(top_k, S)], -1 where fewer are seen."""
    return blocks.choose(scores[:, :, None], seen, top_k)[:, :, 0]


def softmax(logits: Array, kept: Array) -> Array:
    """Over the kept entries of the last axis; zeros where there are none."""
    return jnp.where(kept, jax.nn.softmax(jnp.where(kept, logits, MASKED), -1), 0)


def divergence(p: Array, scores: Array, kept: Array) -> Array:
    """KL(p || softmax(scores)) over the kept entries of [..., S] -> [...]; p has no gradient."""
    p = jax.lax.stop_gradient(p)
    log_q = jax.nn.log_softmax(jnp.where(kept, scores, MASKED), -1)
    return jnp.where(p > 0, p * (jnp.log(jnp.where(p > 0, p, 1)) - log_q), 0).sum(-1)
