"""Attention in plain jax.numpy that never writes the logits: a loop over the live blocks.

Online softmax and its recomputing gradient (FlashAttention-2, arXiv 2307.08691) over the pairs of a
block of queries and a block of keys of which the mask shows anything; cost and memory grow with
their number.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bestiary.kernels.attention.masks import Full, Mask, Rectangles, live_blocks, num_live
from bestiary.kernels.attention.reference import MASKED
from bestiary.kernels.dispatch import vary_alike

Array = jax.Array
# How much longer than in the largest block an entry of the logits takes, measured on CPU.
BLOCKS = {256: 1.0, 128: 1.3, 64: 2.0}


class Where(NamedTuple):
    """Of queries or keys: int32 [batch or 1, length], or None where plain order or nothing is."""

    positions: Array | None
    segments: Array | None


class Static(NamedTuple):
    """What the program is made from: the live blocks follow from it."""

    mask: Mask
    softcap: float | None
    block: int
    length: int
    keys: int


def attention(
    q: Array,
    k: Array,
    v: Array,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
    q_segments: Array | None = None,
    kv_segments: Array | None = None,
    sinks: Array | None = None,
    bias: Array | None = None,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
) -> Array:
    """As `api.attention`. With positions it is the running program that finds the live blocks.
    Reverse mode only."""
    batch, length, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    groups = heads // kv_heads
    if q_positions is not None or kv_positions is not None:
        q_positions = jnp.arange(length)[None] if q_positions is None else q_positions
        kv_positions = jnp.arange(keys)[None] if kv_positions is None else kv_positions
    # which blocks of a cache live only the running program knows
    block = _block(Full() if q_positions is not None and length != keys else mask, length, keys)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(kv_heads, groups)
    if bias is not None:
        bias = bias.astype(jnp.float32).reshape(bias.shape[0], kv_heads, -1, keys)
        bias = jnp.broadcast_to(bias, (batch, kv_heads, groups, keys))
    q = (q * scale).astype(q.dtype)
    where = Where(q_positions, q_segments), Where(kv_positions, kv_segments)
    static = Static(mask, softcap, block, length, keys)
    operands = (q, k, v, bias, sinks, where)
    leaves, tree = jax.tree.flatten(operands)
    return _attention(static, *jax.tree.unflatten(tree, vary_alike(*leaves)))


def live_keys(mask: Mask, length: int) -> float:
    """Keys that a query of a whole row is multiplied with, averaged over the row."""
    block = min(BLOCKS, key=lambda block: BLOCKS[block] * block**2 * num_live(mask, length, block))
    return num_live(mask, length, block) * block**2 / length


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, *operands: Any) -> Array:
    return _forward(static, *operands)[0]


def _forward(static: Static, *operands: Any) -> tuple[Array, tuple]:
    q, k, v, bias, sinks, where = operands
    blocks = _Blocks(static, q, k, v, bias, where)

    def one(carry: tuple, pair: tuple[Array, Array], seen: Callable) -> tuple:
        total, peak, weight = carry
        i, j = pair
        s, _ = blocks.logits(i, j, seen)
        # a slice of its own: else each step copies all of `peak` before updating it
        old = jax.lax.optimization_barrier(_at(peak, i))
        new = jnp.maximum(old, s.max(-1))
        p, shrink = jnp.exp(s - new[..., None]), jnp.exp(old - new)
        pv = _dot(p.astype(v.dtype), _at(blocks.v, j), 3, 2)
        total = _put(total, i, _at(total, i) * shrink[..., None] + pv)
        return total, _put(peak, i, new), _put(weight, i, _at(weight, i) * shrink + p.sum(-1))

    shape = blocks.q.shape[:-1]
    total = jnp.zeros((*shape, v.shape[-1]), jnp.float32)
    peak, weight = jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32)
    start = vary_alike(total, peak, weight, blocks.q)[:-1]
    total, peak, weight = blocks.over_pairs(one, start)
    if sinks is not None:
        sink = blocks.per_row(sinks)
        new = jnp.maximum(peak, sink)
        shrink = jnp.exp(peak - new)
        total, weight = total * shrink[..., None], weight * shrink + jnp.exp(sink - new)
        peak = new
    empty = peak == MASKED  # sees nothing: its weights are 0, forward and backward
    lse = jnp.where(empty, -MASKED, peak + jnp.log(jnp.where(empty, 1, weight)))
    y = jnp.where(empty[..., None], 0, total / jnp.where(empty, 1, weight)[..., None])
    y = _whole(y.astype(v.dtype), static.block, static.length)
    return y, (operands, y, lse)


def _backward(static: Static, saved: tuple, dy: Array) -> tuple:
    (q, k, v, bias, sinks, where), y, lse = saved
    blocks = _Blocks(static, q, k, v, bias, where)
    dy_blocks = _split(dy.astype(v.dtype), k.shape[2], static.block)
    delta = (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1, keepdims=True)
    delta = _split(delta, k.shape[2], static.block)[..., 0]

    def one(carry: tuple, pair: tuple[Array, Array], seen: Callable) -> tuple:
        dq, dk, dv, dbias = carry
        i, j = pair
        s, slope = blocks.logits(i, j, seen)
        p = jnp.exp(s - _at(lse, i)[..., None])
        dp = _dot(_at(dy_blocks, i), _at(blocks.v, j), 3, 3)
        ds = p * (dp - _at(delta, i)[..., None])
        if dbias is not None:
            by_group = ds.reshape(*dbias.shape[1:4], -1, ds.shape[-1])
            dbias = _put(dbias, j, _at(dbias, j) + by_group.sum(3))
        if slope is not None:
            ds = ds * slope
        ds = ds.astype(q.dtype)
        dq = _put(dq, i, _at(dq, i) + _dot(ds, _at(blocks.k, j), 3, 2))
        dk = _put(dk, j, _at(dk, j) + _dot(ds, _at(blocks.q, i), 2, 2))
        dv = _put(dv, j, _at(dv, j) + _dot(p.astype(v.dtype), _at(dy_blocks, i), 2, 2))
        return dq, dk, dv, dbias

    arrays = (blocks.q, blocks.k, blocks.v, blocks.bias)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), arrays)
    leaves, tree = jax.tree.flatten(zeros)
    start = jax.tree.unflatten(tree, vary_alike(*leaves, dy)[:-1])
    dq, dk, dv, dbias = blocks.over_pairs(one, start)
    dq, dk, dv = (
        _whole(d.astype(x.dtype), static.block, x.shape[1]) for d, x in ((dq, q), (dk, k), (dv, v))
    )
    if dbias is not None:
        dbias = jnp.moveaxis(dbias, 0, 3).reshape(*dbias.shape[1:4], -1)[..., : static.keys]
    dsinks = None
    if sinks is not None:
        dsinks = -(jnp.exp(blocks.per_row(sinks) - lse) * delta)
        dsinks = dsinks.reshape(*dsinks.shape[:3], sinks.shape[1], -1).sum((0, 1, 4))
    return dq, dk, dv, dbias, dsinks, None


_attention.defvjp(_forward, _backward)


class _Blocks:
    """The operands cut into blocks, [blocks, batch, kv_heads, rows, ...]; the query heads of one
    key-value head lie one after another as rows, so that keys and values are never repeated."""

    def __init__(
        self, static: Static, q: Array, k: Array, v: Array, bias: Array | None, where: Any
    ):
        self.static, self.groups = static, q.shape[2] // k.shape[2]
        self.q, self.k, self.v = (_split(x, k.shape[2], static.block) for x in (q, k, v))
        self.bias = None
        if bias is not None:  # [blocks, batch, kv_heads, groups, keys of a block]
            self.bias = jnp.moveaxis(_padded(bias, 3, static.block), 3, 0)
        of_queries, of_keys = where
        self.q_positions, self.q_segments = (self._cut(x) for x in of_queries)
        self.kv_positions, self.kv_segments = (self._cut(x, -1) for x in of_keys)

    def over_pairs(self, one: Callable, carry: tuple) -> tuple:
        """Runs one(carry, (i, j), seen) over the live pairs of blocks; `seen` says what the mask of
        such pairs shows."""
        static = self.static
        if self.q_positions is not None:
            live = self._live_by_position()
            pairs = jnp.argsort(~live.ravel())  # the live ones first

            def next_(n: Array, carry: tuple) -> tuple:
                return one(carry, jnp.divmod(pairs[n], live.shape[1]), self._seen_by_position)

            return jax.lax.fori_loop(0, live.sum(dtype=jnp.int32), next_, carry)
        full, partly = live_blocks(static.mask, static.length, static.keys, static.block)
        for pairs, seen in ((full, self._seen_by_segment), (partly, self._seen_in_order)):
            if len(pairs):
                step = partial(_step, one, seen)
                carry, _ = jax.lax.scan(step, carry, tuple(pairs.T))
        return carry

    def logits(self, i: Array, j: Array, seen: Callable) -> tuple[Array, Array | None]:
        """Float32 [batch, kv_heads, rows, keys], and how they grow with q k where capped."""
        s, slope = _dot(_at(self.q, i), _at(self.k, j), 3, 3), None
        shape = (*s.shape[:2], self.groups, self.static.block, self.static.block)
        if (cap := self.static.softcap) is not None:
            bounded = jnp.tanh(s / cap)
            s, slope = cap * bounded, 1 - bounded * bounded
        if self.bias is not None:
            s = (s.reshape(shape) + _at(self.bias, j)[..., None, :]).reshape(s.shape)
        visible = seen(i, j)
        if visible is not None:
            # once for all heads: fused, each of them would evaluate the mask again
            visible = jax.lax.optimization_barrier(visible)
            s = jnp.where(visible[:, None, None], s.reshape(shape), MASKED).reshape(s.shape)
        return s, slope

    def per_row(self, x: Array) -> Array:
        """[kv_heads, groups] -> [kv_heads, rows]."""
        return jnp.repeat(x, self.static.block, 1)

    def _seen_by_segment(self, i: Array, j: Array) -> Array | None:
        if self.q_segments is None or self.kv_segments is None:
            return None
        return _at(self.q_segments, i)[:, :, None] == _at(self.kv_segments, j)[:, None]

    def _seen_in_order(self, i: Array, j: Array) -> Array:
        block = self.static.block
        q, kv = (n * block + jnp.arange(block, dtype=jnp.int32) for n in (i, j))
        seen = self.static.mask(q[:, None], kv[None]) & (kv < self.static.keys)
        same = self._seen_by_segment(i, j)
        return seen[None] if same is None else seen & same

    def _seen_by_position(self, i: Array, j: Array) -> Array:
        assert self.q_positions is not None and self.kv_positions is not None
        q, kv = _at(self.q_positions, i)[:, :, None], _at(self.kv_positions, j)[:, None]
        seen = self.static.mask(q, kv) & (kv >= 0)
        same = self._seen_by_segment(i, j)
        return seen if same is None else seen & same

    def _live_by_position(self) -> Array:
        """Which pairs of blocks may show anything in a row: bool [blocks, blocks of keys]. A block
        of keys is known by its ranges of positions and of segments."""
        assert self.q_positions is not None and self.kv_positions is not None
        filled = self.kv_positions >= 0

        def ends(x: Array) -> tuple[Array, Array]:
            """[blocks of keys, batch or 1, 1]."""
            none = jnp.iinfo(x.dtype).max
            least, most = jnp.where(filled, x, none), jnp.where(filled, x, -none)
            return least.min(-1, keepdims=True), most.max(-1, keepdims=True)

        q, (first, last) = self.q_positions[:, None], ends(self.kv_positions)
        some, _ = self.static.mask.some_all(Rectangles(q, q, first, last))
        some &= first <= last
        if self.q_segments is not None and self.kv_segments is not None:
            q, (first, last) = self.q_segments[:, None], ends(self.kv_segments)
            some &= (first <= q) & (q <= last)
        return some.any((2, 3))

    def _cut(self, x: Array | None, fill: int = 0) -> Array | None:
        """[batch or 1, length] -> [blocks, batch or 1, block]."""
        if x is None:
            return None
        return _padded(x, 1, self.static.block, fill).swapaxes(0, 1)


def _step(one: Callable, seen: Callable, carry: tuple, pair: tuple) -> tuple[tuple, None]:
    return one(carry, pair, seen), None


def _block(mask: Mask, length: int, keys: int) -> int:
    """The size whose live blocks take the least time."""

    def cost(block: int) -> float:
        live = live_blocks(mask, length, keys, block)
        return BLOCKS[block] * block**2 * sum(map(len, live))

    return min(BLOCKS, key=cost)


def _split(x: Array, kv_heads: int, block: int) -> Array:
    """[batch, length, heads, ...] -> [blocks, batch, kv_heads, heads / kv_heads * block, ...]."""
    x = _padded(x, 1, block)
    x = x.reshape(*x.shape[:3], kv_heads, -1, x.shape[-1]).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _whole(x: Array, block: int, length: int) -> Array:
    """Undoes `_split`: [batch, length, heads, ...]."""
    x = x.reshape(*x.shape[:3], -1, block, x.shape[-1]).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(x.shape[0], -1, x.shape[3] * x.shape[4], x.shape[-1])[:, :length]


def _padded(x: Array, axis: int, block: int, fill: int = 0) -> Array:
    """The axis in blocks, [..., blocks, block, ...], filled up at its end."""
    missing = -x.shape[axis] % block
    if missing:
        widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, widths, constant_values=fill)
    return x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])


def _at(x: Array, i: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _put(x: Array, i: Array, new: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, new, i, 0)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Float32 products over batch and kv_heads."""
    dimensions = (((axis_a,), (axis_b,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
