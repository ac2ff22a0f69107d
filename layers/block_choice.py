"""Attention that chooses blocks of keys: what NSA and MoBA share, which is how they decode.

Beside all keys and values the cache holds what represents a complete block when a query chooses,
made once, when its last key comes. A decoded token reads these and the blocks that it chose.
"""

from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from bestiary.kernels.block_attention import (
    Blocks,
    Places,
    block_keys,
    complete_blocks,
    find_places,
    gathered_attention,
    take_by_row,
)
from bestiary.layers import cache as kv
from bestiary.layers.attention import Attention
from bestiary.layers.base import Array, Context, Param, Tree, layer

NOWHERE = jnp.iinfo(jnp.int32).max // 2


class Newest(NamedTuple):
    """The token that is decoded, of every row: int32 [batch]."""

    position: Array
    """Negative: padding."""
    segment: Array
    first: Array
    """The position of the first token of its document."""

    @property
    def place(self) -> Array:
        """In its document."""
        return self.position - self.first


@layer
class BlockChoice(Attention):
    """Attention over chosen blocks of `block_size` keys: decoding by `Full`, whose slots follow
    from positions. Another policy that keeps every key is attended to as a whole."""

    block_size: int

    represented: ClassVar[tuple[str, ...]]
    """Of what an entry represents a block: "k", its keys, and "v"."""
    representing: ClassVar[Any] = None
    """In which type they are kept; None: that of the cache."""

    @property
    def piece(self) -> tuple[int, int]:
        """(length, stride) of what is represented by one entry."""
        return self.block_size, self.block_size

    def represent(self, params: Tree, name: str, keys: Array) -> Array:
        """[batch, C, length, cached_heads, head] -> [batch, C, num_kv_heads, head]."""
        raise NotImplementedError

    def entries_read(self, name: str) -> float:
        """How many keys "k" or values "v" [cached_heads, head] a decoded token reads."""
        raise NotImplementedError

    def decode(self, params: Tree, q: Array, k: Array, v: Array, blocks: Tree, at: Newest) -> Array:
        """[batch, 1, heads, head] of queries as many, over what `cache_spec` declares."""
        raise NotImplementedError

    def cache_spec(self, batch: int, length: int, dtype: Any = jnp.float32) -> Tree:
        spec = super().cache_spec(batch, length, dtype)
        if not isinstance(self.cache, kv.Full):
            return spec
        for name in ("k", "v"):
            read = min(1.0, self.entries_read(name) / length)
            spec[name] = replace(spec[name], active=read)
        number = -(-length // self.piece[1])
        entry = Param((self.num_kv_heads, self.head_dim), ("kv_heads", "head"))
        entries = dict.fromkeys(self.represented, entry)
        blocks = kv.declare(entries, batch, number, self.representing or dtype)
        return spec | {"blocks": blocks | kv.index_spec(batch, number)}

    def keep(
        self, params: Tree, cache: Tree, new: Tree, received: kv.Received
    ) -> tuple[Tree, Tree]:
        if "blocks" not in cache:
            return super().keep(params, cache, new, received)
        blocks, rest = cache["blocks"], {n: x for n, x in cache.items() if n != "blocks"}
        keys, rest = super().keep(params, rest, new, received)
        find = newest_piece if new["position"].shape[1] == 1 else pieces_of_document
        members, position, segment = find(keys, new, *self.piece)

        def completed() -> Tree:
            entries = {
                name: self.represent(params, name, take_by_row(keys[name], members))
                for name in self.represented
            }
            number = blocks["position"].shape[1]
            slot = jnp.where(position < 0, number, position // self.piece[1] % number)
            return kv.put(blocks, entries | {"position": position, "segment": segment}, slot)

        # few tokens complete one; and XLA's CPU compiler copies all keys where it fuses what
        # updates them with what gathers from them
        blocks = jax.lax.cond((position >= 0).any(), completed, lambda: blocks)
        return keys | {"blocks": blocks}, rest | {"blocks": blocks}

    def mix(self, params: Tree, q: Array, keys: Tree, positions: Array, ctx: Context) -> Array:
        if q.shape[1] > 1 or "blocks" not in keys:
            return super().mix(params, q, keys, positions, ctx)
        at = kv.tokens({}, jnp.broadcast_to(positions, q.shape[:2]), ctx.segment_ids)
        return self.decode(params, q, keys["k"], keys["v"], keys["blocks"], newest(keys, at))

    def in_order(self, x: Array, at: Newest) -> Array:
        """x [batch, ..., C] of the entries of `blocks`, in the order of their document."""
        number = x.shape[-1]
        slot = (at.first[:, None] // self.piece[1] + jnp.arange(number)) % number
        return jnp.take_along_axis(x, jnp.expand_dims(slot, range(1, x.ndim - 1)), -1)

    def attend_to_chosen(
        self, q: Array, k: Array, v: Array, chosen: Array, at: Newest, **options: Any
    ) -> Array:
        """Over the own block and those of `chosen` numbers [batch, 1, selecting heads, n]."""
        own = jnp.broadcast_to(
            (at.place // self.block_size)[:, None, None], chosen.shape[::2] + (1,)
        )
        number = jnp.concatenate((chosen[:, 0], own), -1)[..., None]
        place = number * self.block_size + jnp.arange(self.block_size)
        place = jnp.where(number < 0, NOWHERE, place).reshape(*own.shape[:2], -1)
        return attend_to_places(q, k, v, place, at, **options)


def attend_to_places(
    q: Array, k: Array, v: Array, place: Array, at: Newest, **options: Any
) -> Array:
    """Over the keys at places [batch, selecting heads, M] of the document, up to the own one."""
    seen = (place >= 0) & (place <= at.place[:, None, None]) & (at.position >= 0)[:, None, None]
    slots = (at.first[:, None, None] + jnp.where(seen, place, 0)) % k.shape[1]
    return gathered_attention(q, k, v, slots, seen, **options)


def newest(keys: Tree, new: Tree) -> Newest:
    """Of a call that brings one token of every row, which `keys` hold."""
    position = new["position"][:, 0]
    if "segment" not in new:
        return Newest(position, jnp.zeros_like(position), jnp.zeros_like(position))
    same = (keys["position"] >= 0) & (keys["segment"] == new["segment"])
    return Newest(position, new["segment"][:, 0], jnp.where(same, keys["position"], NOWHERE).min(1))


def newest_piece(keys: Tree, new: Tree, length: int, stride: int) -> tuple[Array, Array, Array]:
    """The piece of `length` keys that the newest token completes: its slots [batch, 1, length],
    where it begins, and its segment [batch, 1]; it begins at -1 where none is complete."""
    at = newest(keys, new)
    begins = at.position - length + 1
    complete = (at.position >= 0) & (begins >= at.first) & ((begins - at.first) % stride == 0)
    slots = (begins[:, None] + jnp.arange(length)) % keys["position"].shape[1]
    return slots[:, None], jnp.where(complete, begins, -1)[:, None], at.segment[:, None]


def pieces_of_document(
    keys: Tree, new: Tree, length: int, stride: int
) -> tuple[Array, Array, Array]:
    """All complete pieces of the document that is going on, as `newest_piece`."""
    places = find_places(0, **kv.where(keys, new["position"], new.get("segment")))
    pieces = complete_blocks(places, length, stride)
    members = block_keys(places, pieces, length)
    segment = new.get("segment", jnp.zeros_like(new["position"]))
    document = jnp.where(kv.alive(new), segment, -1).max(1, keepdims=True)
    position = jnp.take_along_axis(keys["position"], members[..., 0], 1)
    return members, jnp.where(pieces.document == document, position, -1), pieces.document


def regular_blocks(number: int, size: int) -> Blocks:
    """The first `number` blocks of a document that begin at the multiples of `size`: [1, C]."""
    place = size * jnp.arange(number)[None]
    return Blocks(place, jnp.zeros_like(place), place)


def places_of(at: Newest) -> Places:
    """The token among the blocks of its own document."""
    place, document = at.place[:, None], jnp.zeros_like(at.place[:, None])
    return Places(document, place, document, place)
