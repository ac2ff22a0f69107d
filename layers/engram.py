"""Engram: a memory of hashed n-grams of token ids (Cheng et al. 2026, arXiv 2601.07372).

What a few tokens in a row mean is looked up instead of computed. The addresses need the ids alone,
so that a table may lie anywhere.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bestiary.layers import cache as kv
from bestiary.layers.base import (
    Array,
    Aux,
    Context,
    Layer,
    Param,
    Tree,
    constant,
    layer,
    positive,
    weight,
)
from bestiary.layers.memory import MemoryTable
from bestiary.layers.norms import RMSNorm
from bestiary.layers.sharding import dot, take

NONE = -1  # the token before the first one of a document


@layer
class Engram(Layer):
    """y = mixer(x) + a e W_v with a = sigmoid(norm(x) . norm(e W_k) / sqrt(dim)).

    e: the rows of a table that the 2-, ..., `max_n`-gram ending in this token hashes to, by
    `num_heads` hashes each, side by side. Token-mixer role around another: [batch, seq, dim] -> the
    same; needs `Context.tokens`, which `Decoder` sets. An n-gram that would begin before its
    document holds "no token" there.

    Suffix n-grams, hash heads, key, value and gate are the paper's. Ours: the memory stands beside
    a mixer and reads the input of that (the paper's stands before attention); heads have hashes
    of their own, mixed by shifts, in place of tables of different prime length; ids are hashed as
    they are (the paper merges tokens that differ in case or blanks first). Left out: the short
    convolution over a e W_v, the branches of hyper-connections, and the square root of the score,
    which the released code has and the paper has not.

    Raises ValueError for sizes below 1, max_n below 2, a mixer of another width, and when applied
    without tokens.
    """

    dim: int
    mixer: Layer
    rows: int
    """Rows per order and head."""
    max_n: int = 3
    num_heads: int = 8
    head_dim: int = 64
    """Width of a row."""
    eps: float = 1e-6
    """Of the norms in the gate."""

    def __post_init__(self) -> None:
        positive(dim=self.dim, rows=self.rows, num_heads=self.num_heads, head_dim=self.head_dim)
        if self.max_n < 2:
            raise ValueError(f"max_n: {self.max_n}; need at least 2")
        dim = getattr(self.mixer, "dim", self.dim)
        if dim != self.dim:
            raise ValueError(f"mixer.dim: {dim}; need dim {self.dim}")

    @property
    def tables(self) -> int:
        """One per order and head, one after the other in the same parameter."""
        return (self.max_n - 1) * self.num_heads

    @property
    def table(self) -> MemoryTable:
        return MemoryTable(rows=self.tables * self.rows, dim=self.head_dim, reads=self.tables)

    def spec(self) -> Tree:
        shape, axes = (self.tables * self.head_dim, self.dim), (None, "embed")
        norm = RMSNorm(dim=self.dim, eps=self.eps)
        return {
            "mixer": self.mixer,
            "table": self.table,
            "key": weight(shape, axes),
            "value": weight(shape, axes),
            "key_norm": norm,
            "query_norm": norm,
        }

    def cache_spec(self, batch: int, length: int, dtype: Any = jnp.float32) -> Tree:
        tokens = Param((batch, self.max_n - 1), ("batch", None), constant(NONE), jnp.int32)
        last = {"k": tokens} | kv.index_spec(batch, self.max_n - 1)
        return {"mixer": self.mixer.cache_spec(batch, length, dtype), "last": last}

    def apply(
        self, params: Tree, x: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        if ctx.tokens is None:
            raise ValueError("ctx.tokens: None; need the token ids [batch, seq], as Decoder sets")
        mixed, last = (None, None) if cache is None else (cache["mixer"], cache["last"])
        y, mixed, aux = self.mixer.apply(params["mixer"], x, ctx, mixed)
        positions = jnp.arange(x.shape[1])[None] if ctx.positions is None else ctx.positions
        positions = jnp.broadcast_to(positions, x.shape[:2])
        rows = self.addresses(self.suffixes(ctx.tokens, positions, ctx.segment_ids, last))
        e = take(params["table"]["values"], rows, x.dtype).reshape(*x.shape[:2], -1)
        gate = self.gate(params, x, dot("bse,ed->bsd", e, params["key"]))
        y += gate.astype(x.dtype)[..., None] * dot("bse,ed->bsd", e, params["value"])
        aux = Aux.join(mixer=aux) | Aux(metrics={"gate": ctx.mean(gate)})
        if last is None:
            return y, None, aux
        new = kv.tokens({"k": ctx.tokens}, positions, ctx.segment_ids)
        _, last = kv.Full().update(last, new)
        return y, {"mixer": mixed, "last": last}, aux

    def gate(self, params: Tree, x: Array, key: Array) -> Array:
        """a: float32 [batch, seq]."""
        norm = RMSNorm(dim=self.dim, eps=self.eps)
        query, key = norm.apply(params["query_norm"], x), norm.apply(params["key_norm"], key)
        score = (query.astype(jnp.float32) * key).sum(-1)
        return jax.nn.sigmoid(score / math.sqrt(self.dim))

    def suffixes(
        self, tokens: Array, positions: Array, segment_ids: Array | None, last: Tree = None
    ) -> Array:
        """Every token and its max_n - 1 predecessors, nearest first: int32 [batch, seq, max_n].

        A predecessor d back stands at position - d of the same document, d places before or in the
        cache `last`.
        """
        segments = jnp.zeros_like(tokens) if segment_ids is None else segment_ids

        def back(a: Array, d: int) -> Array:
            return jnp.pad(a, ((0, 0), (d, 0)), constant_values=NONE)[:, : a.shape[1]]

        found = [tokens]
        for d in range(1, self.max_n):
            at, token = positions - d, NONE
            if last is not None:
                slot = at % (self.max_n - 1)
                old = {name: jnp.take_along_axis(a, slot, 1) for name, a in last.items()}
                fits = (at >= 0) & (old["position"] == at)
                if segment_ids is not None:
                    fits &= old["segment"] == segments
                token = jnp.where(fits, old["k"], NONE)
            fits = (at >= 0) & (back(positions, d) == at) & (back(segments, d) == segments)
            found.append(jnp.where(fits, back(tokens, d), token))
        return jnp.stack(found, -1)

    def addresses(self, suffixes: Array) -> Array:
        """Rows of the table, by order and head: int32 [batch, seq, tables]."""
        # "no token" is 0; products wrap around at 2^32
        ids = (suffixes + 1).astype(jnp.uint32)[..., None]
        random = np.random.default_rng(0)
        found = []
        for n in range(2, self.max_n + 1):
            odd = 2 * random.integers(2**31, size=(n, self.num_heads), dtype=np.uint32) + 1
            h = jnp.zeros((), jnp.uint32)
            for i in range(n):
                h ^= ids[..., i, :] * odd[i]
            # low bits of a product know the low bits of its factors alone: bring down the high ones
            for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
                h = (h ^ (h >> shift)) * jnp.uint32(factor)
            found.append((h ^ (h >> 16)) % self.rows)
        rows = jnp.concatenate(found, -1).astype(jnp.int32)
        return rows + self.rows * jnp.arange(self.tables)
