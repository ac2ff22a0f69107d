"""NSA, native sparse attention (Yuan et al. 2025, arXiv 2502.11089): compressed, chosen, near keys.

Token-mixer role: (params, x, ctx, cache) -> (y, cache, Aux).
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bestiary.kernels.attention import attention, live_keys
from bestiary.kernels.attention import weights as attention_weights
from bestiary.kernels.attention.masks import CAUSAL, Window, seen_keys
from bestiary.kernels.block_attention import (
    Blocks,
    Places,
    attended_keys,
    block_attention,
    block_keys,
    by_queries,
    choosable_blocks,
    choose,
    complete_blocks,
    earlier,
    find_places,
    multiplied_keys,
    take_by_row,
)
from bestiary.layers.attention import HEADS, KV_HEADS
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
from bestiary.layers.block_choice import (
    BlockChoice,
    Newest,
    attend_to_places,
    places_of,
    regular_blocks,
)
from bestiary.layers.cache import need_complete
from bestiary.layers.compression import Compression, MeanPool
from bestiary.layers.sharding import dot, pspec

BRANCHES = ("compressed", "chosen", "near")


class Branches(NamedTuple):
    """Each [batch, T, heads, head], before the gates; and the blocks beside its own that each query
    chose: int32 [batch, T, kv_heads, n] of `blocks`, -1: none."""

    compressed: Array
    chosen: Array
    near: Array | None
    blocks: Blocks
    choice: Array


@layer
class NSA(BlockChoice):
    """y = g_cmp attn(q, compressed) + g_slc attn(q, chosen) + g_win attn(q, near).

    Gates sigmoid(x W) per head. Compressed keys and values are those of the blocks that are
    complete at the query; none yet gives 0. The importance of a block of `block_size` keys is the
    weight of the compressed keys that overlap it, in strides, summed over the query heads of a key
    head, which choose together: `num_selected` blocks, of equal importance the first. Near are the
    last `local_window` keys, 0 for no such branch. No gradient passes the choice. Blocks begin with
    every document.

    The paper's form is 1 initial and 2 local blocks, a `LearnedMLP` and keys and values of its own
    for every branch; the defaults are fla's.

    Raises ValueError for sizes below 1, too few `num_selected`, strides that do not divide,
    `window`, `sinks`, a `mask`, and a cache that drops keys.
    """

    num_selected: int
    """Of which are chosen anyway: the own block, initial_blocks and the rest of local_blocks."""
    local_window: int = 512
    compression: Compression = MeanPool()
    initial_blocks: int = 0
    """How many first blocks of the document every query chooses."""
    local_blocks: int = 1
    """How many blocks up to its own, with that, every query chooses."""
    shared_kv: bool = True
    """One key and value per head for all branches, or else one for each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(block_size=self.block_size, num_selected=self.num_selected)
        positive(local_blocks=self.local_blocks)
        for name in ("local_window", "initial_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}; need at least 0")
        forced = self.initial_blocks + self.local_blocks
        if self.num_selected < forced:
            raise ValueError(
                f"num_selected: {self.num_selected}; need at least the {forced} of initial_blocks "
                "and local_blocks"
            )
        self.compression.span(self.block_size)  # refuses a stride that does not divide
        head_dim = getattr(self.compression, "head_dim", self.head_dim)
        if head_dim != self.head_dim:
            raise ValueError(f"compression.head_dim: {head_dim}; need head_dim {self.head_dim}")
        if self.window is not None:
            raise ValueError(f"window: {self.window}; NSA takes local_window")
        if self.mask != CAUSAL:
            raise ValueError(f"mask: {self.mask}; NSA needs Causal()")
        if self.sinks:
            raise ValueError("sinks: True; NSA takes none")
        need_complete(self.cache, "NSA")

    represented = ("k", "v")

    @property
    def piece(self) -> tuple[int, int]:
        return self.compression.span(self.block_size)

    @property
    def cached_heads(self) -> int:
        return self.num_kv_heads * (1 if self.shared_kv else len(BRANCHES))

    def spec(self) -> Tree:
        spec = super().spec()
        for name in ("key", "value"):
            shape = (self.dim, self.cached_heads, self.head_dim)
            spec[name] = weight(shape, ("embed", "kv_heads", "head"))
            if self.bias:
                spec[f"{name}_bias"] = Param(shape[1:], ("kv_heads", "head"))
            spec[f"compress_{name}"] = self.compression
        gates = (self.dim, self.num_heads, len(BRANCHES))
        return spec | {"gate": weight(gates, ("embed", "heads", None))}

    def cost(self, length: int) -> Cost:
        """Adds q k and the weighted sum of v of the branches, and the compression: executed over
        the keys that they are multiplied with, active over those attended to."""
        per_key = 4 * self.num_heads * self.head_dim
        others = self.block_size, self.num_selected - 1
        span, stride = self.piece
        compressed = max(length // stride, 1)
        complete = sum(max((t - span) // stride + 1, 0) for t in range(1, length + 1)) / length
        fixed = 2 * self.num_kv_heads * compressed * self.compression.flops() / length
        executed = compressed + multiplied_keys(length, *others)
        active = complete + attended_keys(length, *others)
        if self.local_window:
            near = CAUSAL & Window(self.local_window)
            executed += live_keys(near, length)
            active += seen_keys(near, length)
        matrices = Layer.cost(self, length)
        return matrices + Cost(per_key * executed + fixed, per_key * active + fixed)

    def apply(
        self, params: Tree, x: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        gates = dot("bsd,dng->bsng", x, params["gate"], dtype=jnp.float32)
        return super().apply(params | {"gates": jax.nn.sigmoid(gates)}, x, ctx, cache)

    def attend(self, params: Tree, q: Array, k: Array, v: Array, **where: Any) -> Array:
        return self.gated(params, self.branches(params, q, k, v, **where))

    def decode(self, params: Tree, q: Array, k: Array, v: Array, blocks: Tree, at: Newest) -> Array:
        (length, stride), scale = self.piece, self.query_scale
        place = blocks["position"] - at.first[:, None]
        seen = (place >= 0) & (place + length <= at.place[:, None] + 1)
        seen &= blocks["segment"] == at.segment[:, None]
        compressed, weights = self.over_pieces(q, blocks["k"], blocks["v"], seen[:, None], scale)
        selectable = regular_blocks(max(k.shape[1] // self.block_size, 1), self.block_size)
        overlap = self.overlap(regular_blocks(place.shape[1], stride), selectable)
        choice = self.choice(self.in_order(weights, at), overlap, places_of(at), selectable)
        options = {"scale": scale, "softcap": self.softcap}
        chosen = self.attend_to_chosen(q, k, v, choice, at, part=self.part(1), **options)
        near = None
        if self.local_window:
            place = at.place[:, None, None] - jnp.arange(self.local_window)
            place = jnp.broadcast_to(place, (place.shape[0], self.num_kv_heads, place.shape[2]))
            near = attend_to_places(q, k, v, place, at, part=self.part(2), **options)
        return self.gated(params, Branches(compressed, chosen, near, selectable, choice))

    def gated(self, params: Tree, branches: Branches) -> Array:
        """The sum of the branches: [batch, T, heads, head]."""
        gates = params["gates"]
        y = gates[..., :1] * branches.compressed + gates[..., 1:2] * branches.chosen
        if branches.near is not None:
            y += gates[..., 2:] * branches.near
        return y.astype(branches.chosen.dtype)

    def branches(self, params: Tree, q: Array, k: Array, v: Array, **where: Any) -> Branches:
        """Of queries [batch, T, heads, head] over k and v [batch, S, cached_heads, head]."""
        scale = self.query_scale
        keys, values = self.by_branch(k), self.by_branch(v)
        places = find_places(q.shape[1], **where)
        blocks = choosable_blocks(places, self.block_size)
        compressed, choice = self.compressed(params, q, keys[0], values[0], places, blocks, scale)
        chosen = block_attention(
            q,
            keys[1],
            values[1],
            places,
            blocks,
            choice,
            size=self.block_size,
            scale=scale,
            softcap=self.softcap,
        )
        near = None
        if self.local_window:
            near = attention(
                q,
                keys[2],
                values[2],
                window=self.local_window,
                scale=scale,
                softcap=self.softcap,
                spec=pspec(*HEADS),
                kv_spec=pspec(*KV_HEADS),
                impl=self.impl,
                **where,
            )
        return Branches(compressed, chosen, near, blocks, choice)

    def part(self, branch: int) -> tuple[int, int]:
        """Which of the cached heads of every key head is that of a branch."""
        return (0, 1) if self.shared_kv else (branch, len(BRANCHES))

    def by_branch(self, x: Array) -> tuple[Array, ...]:
        """The keys or values [..., kv_heads, head] of every branch."""
        if self.shared_kv:
            return (x,) * len(BRANCHES)
        x = x.reshape(*x.shape[:-2], -1, len(BRANCHES), x.shape[-1])
        return tuple(x[..., i, :] for i in range(len(BRANCHES)))

    def represent(self, params: Tree, name: str, keys: Array) -> Array:
        compress = {"k": "compress_key", "v": "compress_value"}[name]
        return self.compression.compress(params[compress], self.by_branch(keys)[0])

    def compressed(
        self,
        params: Tree,
        q: Array,
        k: Array,
        v: Array,
        places: Places,
        blocks: Blocks,
        scale: float,
    ) -> tuple[Array, Array]:
        """The compressed branch, and the choice that its weights make."""
        span, stride = self.piece
        pieces = complete_blocks(places, span, stride)
        members = block_keys(places, pieces, span)
        members = jnp.broadcast_to(members, (k.shape[0], *members.shape[1:]))

        def compress(name: str, x: Array) -> Array:
            return self.compression.compress(params[f"compress_{name}"], take_by_row(x, members))

        k, v = compress("key", k), compress("value", v)
        overlap = self.overlap(pieces, blocks)

        def some(q: Array, document: Array, place: Array) -> tuple[Array, Array]:
            here = replace(places, q_document=document, q_place=place)
            seen = document[:, :, None] == pieces.document[:, None]
            seen &= pieces.place[:, None] + span - 1 <= place[:, :, None]
            out, weights = self.over_pieces(q, k, v, seen, scale)
            return out, self.choice(weights, overlap, here, blocks)

        return by_queries(some, q, places.q_document, places.q_place)

    def over_pieces(
        self, q: Array, k: Array, v: Array, seen: Array, scale: float
    ) -> tuple[Array, Array]:
        """Queries over the compressed keys that are seen [batch, T, C]: as q, and the weights of
        all heads that choose alike [batch, kv_heads, T, C]."""
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        weights = attention_weights(q, k, seen, scale=scale, softcap=self.softcap)
        weights = jnp.where(seen[:, None, None], weights, 0)  # where nothing is complete, 0
        out = jnp.einsum("bkgtc,bckh->btkgh", weights.astype(v.dtype), v)
        return out.reshape(q.shape), weights.sum(2)

    def overlap(self, pieces: Blocks, blocks: Blocks) -> tuple[Array, Array]:
        """Which compressed keys a block may overlap, and how many strides each shares with it:
        int32 and float32 [batch or 1, C', n]. Those that do lie together in the list."""
        span, stride = self.piece
        before, number = span // stride - 1, pieces.start.shape[1]
        next_ = jax.vmap(jnp.searchsorted)(pieces.start, blocks.start)[..., None]
        index = next_ + jnp.arange(-before, self.block_size // stride)
        inside = (index >= 0) & (index < number)
        index = jnp.clip(index, 0, number - 1)
        document, place = (take_by_row(x, index) for x in pieces[1:])
        first = (blocks.place // self.block_size * self.block_size)[..., None]
        shared = jnp.minimum(place + span, first + self.block_size) - jnp.maximum(place, first)
        inside &= document == blocks.document[..., None]
        return index, jnp.where(inside, jnp.maximum(shared, 0) / stride, 0)

    def choice(
        self, weights: Array, overlap: tuple[Array, Array], places: Places, blocks: Blocks
    ) -> Array:
        """int32 [batch, T, kv_heads, n] by the weights [batch, kv_heads, T, C] of compressed
        keys."""
        count = self.num_selected - 1
        batch, kv_heads, length, _ = weights.shape
        if not count:
            return jnp.zeros((batch, length, kv_heads, 0), jnp.int32)
        rows = jax.lax.stop_gradient(weights).transpose(0, 3, 1, 2)
        index, share = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in overlap)
        importance = sum(
            take_by_row(rows, index[..., n]) * share[..., n, None, None]
            for n in range(index.shape[2])
        )
        importance = jnp.transpose(importance, (0, 3, 2, 1))
        number = blocks.place[:, None] // self.block_size
        own = places.q_place[:, :, None] // self.block_size
        forced = (number < self.initial_blocks) | (number > own - self.local_blocks)
        importance = jnp.where(forced[:, :, None], jnp.inf, importance)
        return choose(importance, earlier(places, blocks, self.block_size), count)

    def entries_read(self, name: str) -> float:
        """The chosen blocks and the window, each of its branch, and what is compressed."""
        by_branch = self.num_selected * self.block_size + self.local_window
        return by_branch / (1 if self.shared_kv else len(BRANCHES)) + self.piece[0]
