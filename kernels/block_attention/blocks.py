"""Blocks of keys: where they lie in a row, which of them a query may choose, and the choice."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bestiary.kernels.chunks import runs, whole_chunks

Array = jax.Array
QUERIES = 512  # queries whose scores exist at a time in a long sequence
NOWHERE = jnp.iinfo(jnp.int32).max // 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Places:
    """Where queries and keys stand: int32 [batch or 1, T] and [batch or 1, S].

    A place counts from the start of its document, so that blocks begin with every document. `order`
    sorts the keys by document and place; None: they lie in order and complete, as whole rows do.
    """

    q_document: Array
    q_place: Array
    document: Array
    """-1: an empty slot."""
    place: Array
    order: Array | None = None
    one_document: bool = field(default=False, metadata={"static": True})
    """Rows without segments, where blocks begin at the multiples of their size."""

    def seen(self) -> Array:
        """Which keys a query sees: bool [batch or 1, T, S]."""
        same = self.q_document[:, :, None] == self.document[:, None]
        return same & (self.place[:, None] <= self.q_place[:, :, None])


def find_places(
    length: int,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
    q_segments: Array | None = None,
    kv_segments: Array | None = None,
) -> Places:
    """Of `length` queries and the keys: int32 [batch or 1, T] and [batch or 1, S].

    Without positions the keys are those of the queries, in whole rows, where a document is a run of
    equal segments. With positions they are the slots of a cache in any order, negative where empty;
    there a place is a position, and with segments counts from the first position of the segment.

    Raises ValueError for a cache whose heads hold different positions.
    """
    if q_positions is None or kv_positions is None:
        return _of_rows(length, q_segments)
    if kv_positions.ndim > 2:
        raise ValueError(
            f"kv_positions: shape {kv_positions.shape}; blocks need the same positions in all heads"
        )
    return _of_slots(q_positions, kv_positions, q_segments, kv_segments)


def _of_rows(length: int, segments: Array | None) -> Places:
    index = jnp.arange(length)[None]
    if segments is None:
        document, place = jnp.zeros_like(index), index
    else:
        document, first = runs(segments)
        place = index - first
    return Places(document, place, document, place, one_document=segments is None)


def _of_slots(
    q_positions: Array, kv_positions: Array, q_segments: Array | None, kv_segments: Array | None
) -> Places:
    filled = kv_positions >= 0
    if q_segments is None or kv_segments is None:
        q_document, document = jnp.zeros_like(q_positions), jnp.where(filled, 0, -1)
        order = jnp.lexsort((kv_positions, document))
        return Places(q_document, q_positions, document, kv_positions, order)
    document = jnp.where(filled, kv_segments, -1)
    order = jnp.lexsort((kv_positions, document))
    _, first = runs(_take(document, order))
    first = _take(_take(_take(kv_positions, order), first), jnp.argsort(order))
    same = (q_segments[:, :, None] == document[:, None]) & filled[:, None]
    q_first = jnp.where(same, kv_positions[:, None], NOWHERE).min(-1)
    return Places(q_segments, q_positions - q_first, document, kv_positions - first, order)


class Blocks(NamedTuple):
    """Runs of neighbouring places in a document, in order: int32 [batch or 1, C].

    `start` is the index of the first key, in the order of `Places`; beyond the last block it is S
    and the document -2. `place` is that of the first key.
    """

    start: Array
    document: Array
    place: Array


def complete_blocks(places: Places, length: int, stride: int) -> Blocks:
    """Those of `length` keys that begin at every `stride`-th place: C = max(S // stride, 1)."""
    document, place = _ordered(places)
    slots = place.shape[1]
    last_document, last_place = (jnp.roll(x, 1 - length, 1) for x in (document, place))
    whole = (last_document == document) & (last_place == place + length - 1)
    whole &= (document >= 0) & (jnp.arange(slots) + length <= slots)
    return _listed(document, place, whole & (place % stride == 0), max(slots // stride, 1))


def choosable_blocks(places: Places, size: int) -> Blocks:
    """Those a query can choose: before its own block a row has complete ones only, which bounds C
    by S // size; a cache that drops entries may leave any part of a block, so there C = S."""
    if places.order is None:
        return complete_blocks(places, size, size)
    document, place = _ordered(places)
    number = place // size
    new = (document != jnp.roll(document, 1, 1)) | (number != jnp.roll(number, 1, 1))
    new = new.at[:, 0].set(True) & (document >= 0)
    return _listed(document, place, new, place.shape[1])


def block_of_keys(places: Places, blocks: Blocks, size: int) -> Array:
    """Which of the `blocks` a key lies in: int32 [batch or 1, S], -1: none of them."""
    document, place = _ordered(places)
    slots = jnp.arange(place.shape[1])
    block = jax.vmap(lambda start: jnp.searchsorted(start, slots, side="right"))(blocks.start) - 1
    inside = (block >= 0) & (_take(blocks.document, block) == document)
    inside &= _take(blocks.place, block) // size == place // size
    block = jnp.where(inside, block, -1)
    return block if places.order is None else _take(block, jnp.argsort(places.order))


def block_keys(places: Places, blocks: Blocks, length: int) -> Array:
    """The indices of the keys of complete blocks: int32 [batch or 1, C, length]."""
    slots = places.place.shape[1]
    index = jnp.minimum(blocks.start[..., None] + jnp.arange(length), slots - 1)
    return index if places.order is None else take_by_row(places.order, index)


def take_by_row(x: Array, index: Array) -> Array:
    """x[b, index[b, ...]] of every row b: [batch, S, ...], [batch, ...] -> [batch, ..., ...]."""
    return jax.vmap(lambda x, i: x[i])(x, index)


def earlier(places: Places, blocks: Blocks, size: int) -> Array:
    """Which blocks lie before a query's own block of its document: bool [batch or 1, T, C]."""
    same = places.q_document[:, :, None] == blocks.document[:, None]
    return same & (blocks.place[:, None] // size < places.q_place[:, :, None] // size)


def choose(scores: Array, candidates: Array, count: int) -> Array:
    """The `count` candidates of highest score, of equal ones the first.

    Float32 scores [batch, T, heads, C] and bool candidates [batch or 1, T, C] -> int32 [batch, T,
    heads, min(count, C)], -1 where there are fewer candidates.
    """
    scores = jnp.where(candidates[:, :, None], jax.lax.stop_gradient(scores), -jnp.inf)
    best, index = jax.lax.top_k(scores, min(count, scores.shape[-1]))
    return jnp.where(best > -jnp.inf, index, -1)


def by_queries(f: Callable[..., tuple], *operands: Array | None) -> tuple:
    """f of `operands` [batch or 1, T, ...], whose results are [batch, T, ...].

    Many queries are taken in parts, recomputed backwards, so that their scores over all keys never
    exist at once.
    """
    first = next(x for x in operands if x is not None)
    length = first.shape[1]
    if length < 4 * QUERIES:
        return f(*operands)

    def split(x: Array) -> Array:
        x = whole_chunks(x, QUERIES)
        return x.reshape(x.shape[0], -1, QUERIES, *x.shape[2:]).swapaxes(0, 1)

    def joined(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]

    out = jax.lax.map(jax.checkpoint(lambda part: f(*part)), jax.tree.map(split, operands))
    return jax.tree.map(joined, out)


def _ordered(places: Places) -> tuple[Array, Array]:
    if places.order is None:
        return places.document, places.place
    return _take(places.document, places.order), _take(places.place, places.order)


def _listed(document: Array, place: Array, begins: Array, count: int) -> Blocks:
    slots = place.shape[1]
    find = partial(jnp.nonzero, size=count, fill_value=slots)
    start = jax.vmap(lambda row: find(row)[0])(begins)
    found = start < slots
    return Blocks(start, jnp.where(found, _take(document, start), -2), _take(place, start))


def _take(x: Array, index: Array) -> Array:
    """x[index] row by row, at the nearest where outside."""
    return jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1), 1)
