"""Attention over chosen blocks, linear in the length: each block meets the queries that chose it.

(query, chosen block) pairs are sorted by block, as tokens of a mixture are by expert, and cut into
tiles of `size` queries of one block. Of every pair an output and a log-sum-exp remain, which are
merged with those of the query's own block.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bestiary.kernels.block_attention.blocks import Blocks, Places

Array = jax.Array
TILES = 8  # tiles whose logits exist at a time


def block_attention(
    q: Array,
    k: Array,
    v: Array,
    places: Places,
    blocks: Blocks,
    chosen: Array,
    sinks: Array | None,
    *,
    size: int,
    scale: float,
    softcap: float | None,
) -> Array:
    """As `api.block_attention`, for whole rows."""
    batch, length, heads, head_dim = q.shape
    kv_heads, selecting = k.shape[2], chosen.shape[2]
    shared = heads // selecting  # query heads of one choice
    q = q.reshape(batch, length, kv_heads, selecting // kv_heads, shared, head_dim)
    chosen = chosen.reshape(batch, length, kv_heads, selecting // kv_heads, -1)
    document, place, start = (
        jnp.broadcast_to(x, (batch, x.shape[1]))
        for x in (places.document, places.place, blocks.start)
    )
    row = partial(_row, size=size, scale=scale, softcap=softcap, aligned=places.one_document)
    for in_axes, out_axes in (
        ((1, None, None, None, None, None, 1, 0), 1),  # heads that choose, of one key head
        ((1, 1, 1, None, None, None, 1, 0), 1),  # key heads
        ((0, 0, 0, 0, 0, 0, 0, None), 0),  # batch
    ):
        axes = in_axes[:-1] + ((None,) if sinks is None else in_axes[-1:])
        row = jax.vmap(row, axes, out_axes)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(kv_heads, -1, shared)
    out = row(q, k, v, document, place, start, chosen, sinks)
    return out.reshape(batch, length, heads, -1).astype(v.dtype)


def multiplied_keys(length: int, size: int, count: int) -> float:
    """Keys that a query is multiplied with when it chooses `count` blocks beside its own; an output
    that is merged, which takes one product and not two, counts as half a key."""
    tiles = -(-length // size) + _num_tiles(length, size, count)
    outputs = 1 + min(count, max(length // size, 1))
    return tiles * size * size / length + outputs / 2


def _num_tiles(length: int, size: int, count: int) -> int:
    """Tiles of `size` pairs that hold any choice: every block may end in an unfilled one."""
    blocks = max(length // size, 1)
    count = min(count, blocks)
    return length * count // size + blocks if count else 0


def _row(
    q: Array,
    k: Array,
    v: Array,
    document: Array,
    place: Array,
    start: Array,
    chosen: Array,
    sinks: Array | None,
    *,
    size: int,
    scale: float,
    softcap: float | None,
    aligned: bool,
) -> Array:
    """One row and choice: q [T, G, head], k, v [T, head], chosen [T, n] -> [T, G, head]."""
    weigh = partial(_weigh, scale=scale, softcap=softcap)
    out, lse = _own(q, k, v, document, place, size=size, weigh=weigh, aligned=aligned)
    outs, lses = [out[:, None]], [lse[:, None]]
    if chosen.shape[1]:
        out, lse = _others(q, k, v, start, chosen, size=size, weigh=weigh)
        outs.append(out)
        lses.append(lse)
    outs, lses = jnp.concatenate(outs, 1), jnp.concatenate(lses, 1)
    if sinks is not None:  # takes weight and gives no value
        sink = jnp.broadcast_to(sinks, (lses.shape[0], 1, lses.shape[2]))
        lses = jnp.concatenate((lses, sink), 1)
    weights = jax.nn.softmax(lses, 1)[:, : outs.shape[1]]
    # a product and a sum instead of this contraction crash XLA's CPU code (jax 0.10.2)
    return jnp.einsum("tng,tngh->tgh", weights, outs)


def _weigh(
    q: Array, k: Array, v: Array, seen: Array | None, *, scale: float, softcap: float | None
) -> tuple[Array, Array]:
    """q [m, G, head] over k, v [s, head], seen bool [m, s] -> float32 output and log-sum-exp."""
    logits = jnp.einsum("mgh,sh->mgs", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if seen is not None:
        logits = jnp.where(seen[:, None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, -1)
    weights = jnp.exp(logits - lse[..., None]).astype(v.dtype)
    return jnp.einsum("mgs,sh->mgh", weights, v, preferred_element_type=jnp.float32), lse


def _own(q, k, v, document, place, *, size, weigh, aligned):  # type: ignore[no-untyped-def]
    """Every query over its own block: [T, G, head] and [T, G].

    Where documents begin anywhere, that block reaches into the stretch of keys before.
    """
    length = q.shape[0]
    parts = -(-length // size)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, parts * size - length), *((0, 0),) * (x.ndim - 1)), mode="edge")
        return x.reshape(parts, size, *x.shape[1:])

    def with_previous(x: Array, before: Array | None = None) -> Array:
        before = jnp.roll(x, 1, 0) if before is None else before
        return x if aligned else jnp.concatenate((before, x), 1)

    def one(part: tuple[Array, ...]) -> tuple[Array, Array]:
        q, document, place, index, k, v, kv_document, kv_place, kv_index = part
        seen = (document[:, None] == kv_document) & (place[:, None] // size == kv_place // size)
        return weigh(q, k, v, seen & (kv_index >= 0) & (kv_index <= index[:, None]))

    index = jnp.arange(parts * size).reshape(parts, size)
    q, k, v, document, place = (split(x) for x in (q, k, v, document, place))
    keys = (
        *(with_previous(x) for x in (k, v, document, place)),
        with_previous(index, index - size),
    )
    out, lse = jax.lax.map(
        jax.checkpoint(one), (q, document, place, index, *keys), batch_size=TILES
    )
    return out.reshape(-1, *out.shape[2:])[:length], lse.reshape(-1, lse.shape[2])[:length]


def _others(q, k, v, start, chosen, *, size, weigh):  # type: ignore[no-untyped-def]
    """Every query over each block it chose: [T, n, G, head] and [T, n, G]; nothing for -1."""
    length, count = chosen.shape
    tiles = _tiles(chosen, start.shape[0], size)
    pairs = jnp.broadcast_to(q[:, None], (length, count, *q.shape[1:]))
    pairs = pairs.reshape(-1, *q.shape[1:])
    members = jnp.minimum(start[tiles.block][:, None] + jnp.arange(size), length - 1)
    pairs = _exchange(pairs, tiles.pair, tiles.slot).reshape(-1, size, *q.shape[1:])
    operands = pairs, k[members], v[members]
    one = jax.checkpoint(lambda tile: weigh(*tile, None))
    out, lse = jax.lax.map(one, operands, batch_size=TILES)
    out, lse = (x.reshape(-1, *x.shape[2:]) for x in (out, lse))
    out, lse = (_exchange(x, tiles.slot, tiles.pair) for x in (out, lse))
    out, lse = (x.reshape(length, count, *x.shape[1:]) for x in (out, lse))
    return out, jnp.where(chosen[..., None] >= 0, lse, -jnp.inf)


class Tiles(NamedTuple):
    block: Array
    """[U]: the block of every tile."""
    pair: Array
    """[U size]: the pair in every slot of the tiles; T n: none."""
    slot: Array
    """[T n]: the slot of every pair; U size: none."""


def _tiles(chosen: Array, num_blocks: int, size: int) -> Tiles:
    """Sorts the pairs of `chosen` [T, n] by block and cuts each block's into tiles."""
    length, count = chosen.shape
    block = jnp.where(chosen < 0, num_blocks, chosen).reshape(-1)
    num_pairs, num_tiles = block.size, length * count // size + num_blocks
    ordered, order = jax.lax.sort_key_val(block, jnp.arange(num_pairs))  # stable
    first = jnp.searchsorted(ordered, jnp.arange(num_blocks + 1))  # pair of every block
    tiles = -(-jnp.diff(first) // size)
    last_tile = jnp.cumsum(tiles)
    first_tile = last_tile - tiles
    tile = jnp.arange(num_tiles)
    of_tile = jnp.searchsorted(last_tile, tile, side="right")
    used, of_tile = of_tile < num_blocks, jnp.minimum(of_tile, num_blocks - 1)
    index = first[of_tile] + (tile - first_tile[of_tile]) * size
    index = index[:, None] + jnp.arange(size)
    filled = used[:, None] & (index < first[of_tile + 1][:, None])
    pair = jnp.where(filled, order[jnp.minimum(index, num_pairs - 1)], num_pairs)
    here = jnp.minimum(ordered, num_blocks - 1)
    slot = first_tile[here] * size + jnp.arange(num_pairs) - first[here]
    slot = jnp.where(ordered < num_blocks, slot, num_tiles * size)
    return Tiles(
        of_tile, pair.reshape(-1), jnp.zeros_like(slot).at[order].set(slot, unique_indices=True)
    )


@jax.custom_vjp
def _exchange(x: Array, index: Array, back: Array) -> Array:
    """x[index], 0 beyond the end; `back` is the inverse, so that the gradient is a look-up too."""
    return x.at[index].get(mode="fill", fill_value=0)


def _exchange_forward(x: Array, index: Array, back: Array) -> tuple[Array, Array]:
    return _exchange(x, index, back), back


def _exchange_backward(back: Array, g: Array) -> tuple[Array, None, None]:
    return g.at[back].get(mode="fill", fill_value=0), None, None


_exchange.defvjp(_exchange_forward, _exchange_backward)
