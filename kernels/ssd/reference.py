"""State-space duality in plain JAX, chunk after chunk: the definition of truth.

Letters: b batch, q and k places in a chunk, g groups, r heads of a group, p channels of a head, n
state channels. States are [b, g, n, r, p]: the heads of a group are one product with B or C.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Chunk(NamedTuple):
    """What a chunk reads; `chunked` stacks all of them in front."""

    x: Array  # [b, q, g, r, p]
    dt: Array  # float32 [b, q, g, r]
    a: Array  # float32 [b, q, g, r], dt A: what the state decays by, as a logarithm
    B: Array  # [b, q, g, n]
    C: Array  # [b, q, g, n]
    document: Array  # int32 [b, q]
    before: Array  # int32 [b], the document of the state that enters


class Decay(NamedTuple):
    """Factors in a chunk, 0 from one document to another."""

    within: Array  # [b, g, r, q, k], from place k to a later q: L
    enter: Array  # [b, q, g, r], from the state that enters to place q
    leave: Array  # [b, k, g, r], from place k to the end
    across: Array  # [b, g, r], of the state that enters


def ssd(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    state: Array,
    documents: Array,
    *,
    chunk: int,
) -> tuple[Array, Array]:
    """Shapes and types as in `bestiary.kernels.ssd.ssd`, without D; `chunk` divides the length."""
    rows = chunked(x, dt, dt * A, B, C, documents, chunk)
    state, y = jax.lax.scan(forward, grouped(state, B.shape[2]), rows)
    return unchunked(y, x), ungrouped(state)


def forward(state: Array, c: Chunk) -> tuple[Array, Array]:
    """The state that enters a chunk -> the state that leaves it, and y [b, q, g, r, p]."""
    decay = decays(c)
    scores = product("bqgn,bkgn->bgqk", c.C, c.B)
    weights = scores[:, :, None] * decay.within * c.dt.transpose(0, 2, 3, 1)[..., None, :]
    y = product("bgrqk,bkgrp->bqgrp", weights.astype(c.x.dtype), c.x)
    y += decay.enter[..., None] * product("bqgn,bgnrp->bqgrp", c.C, state.astype(c.C.dtype))
    left = ((decay.leave * c.dt)[..., None] * c.x).astype(c.x.dtype)
    state = decay.across[:, :, None, :, None] * state + product("bkgn,bkgrp->bgnrp", c.B, left)
    return state, y.astype(c.x.dtype)


def decays(c: Chunk) -> Decay:
    same = c.document[:, :, None] == c.document[:, None, :]
    seen = jnp.tril(same)
    # sums within a document: no other changes their last bits
    s = jnp.einsum("bqk,bkgr->bqgr", seen.astype(c.a.dtype), c.a, precision="highest")
    first = (c.document == c.before[:, None])[:, :, None, None]
    last = same[:, -1, :, None, None]
    by_head = s.transpose(0, 2, 3, 1)
    # masked before exp, whose gradient would not be finite where it is not used
    return Decay(
        _exp(by_head[..., :, None] - by_head[..., None, :], seen[:, None, None]),
        _exp(s, first),
        _exp(s[:, -1:] - s, last),
        _exp(s[:, -1], first[:, -1]),
    )


def product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def chunked(
    x: Array, dt: Array, a: Array, B: Array, C: Array, documents: Array, chunk: int
) -> Chunk:
    """[batch, length, heads or groups, ...] -> [chunks, batch, chunk, groups, ...]."""
    batch, length, groups = B.shape[:3]

    def split(v: Array, *shape: int) -> Array:
        return v.reshape(batch, length // chunk, chunk, *shape).swapaxes(0, 1)

    heads = (groups, x.shape[2] // groups)
    ends = documents[:, chunk - 1 :: chunk].T
    return Chunk(
        split(x, *heads, x.shape[3]),
        split(dt, *heads),
        split(a, *heads),
        split(B, *B.shape[2:]),
        split(C, *C.shape[2:]),
        split(documents),
        jnp.pad(ends, ((1, 0), (0, 0)))[:-1],
    )


def unchunked(v: Array, like: Array) -> Array:
    """[chunks, batch, chunk, ...] -> the shape of `like`."""
    return v.swapaxes(0, 1).reshape(like.shape)


def grouped(state: Array, groups: int) -> Array:
    """[batch, heads, p, n] -> [b, g, n, r, p]."""
    batch, heads, channels, width = state.shape
    state = state.reshape(batch, groups, heads // groups, channels, width)
    return state.transpose(0, 1, 4, 2, 3)


def ungrouped(state: Array) -> Array:
    """[b, g, n, r, p] -> [batch, heads, p, n]."""
    b, g, n, r, p = state.shape
    return state.transpose(0, 1, 3, 4, 2).reshape(b, g * r, p, n)


def _exp(s: Array, where: Array) -> Array:
    return jnp.exp(jnp.where(where, s, -jnp.inf))
