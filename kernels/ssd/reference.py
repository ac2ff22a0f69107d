"""State-space duality in plain JAX, chunk after chunk: the definition of truth.

Letters: b sequences (those of every group apart), q and k places in a chunk, r heads of a group, p
channels of a head, n state channels. States are [b, n, r, p]: the heads of a group are one product
with B or C.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Chunk(NamedTuple):
    """What a chunk reads; `chunked` stacks all of them in front."""

    x: Array  # [b, q, r, p]
    dt: Array  # float32 [b, q, r]
    s: Array  # float32 [b, q, r], the sum of dt A up to q, within its document and chunk
    B: Array  # [b, q, n]
    C: Array  # [b, q, n]
    document: Array  # int32 [b, q]
    before: Array  # int32 [b], the document of the state that enters


class Decay(NamedTuple):
    """Factors in a chunk, 0 from one document to another."""

    within: Array  # [b, r, q, k], from place k to a later q: L
    enter: Array  # [b, q, r], from the state that enters to place q
    leave: Array  # [b, k, r], from place k to the end
    across: Array  # [b, r], of the state that enters


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
    rows = chunked(x, dt, A, B, C, documents, chunk)
    state, y = jax.lax.scan(forward, by_group(state, B.shape[2]), rows)
    return joined(y, x), by_head(state, x)


def forward(state: Array, c: Chunk) -> tuple[Array, Array]:
    """The state that enters a chunk -> the state that leaves it, and y [b, q, r, p]."""
    decay = decays(c)
    scores = product("bqn,bkn->bqk", c.C, c.B)
    weights = scores[:, None] * decay.within * c.dt.swapaxes(1, 2)[:, :, None]
    y = product("brqk,bkrp->bqrp", weights.astype(c.x.dtype), c.x)
    y += decay.enter[..., None] * product("bqn,bnrp->bqrp", c.C, state.astype(c.C.dtype))
    left = ((decay.leave * c.dt)[..., None] * c.x).astype(c.x.dtype)
    state = decay.across[:, None, :, None] * state + product("bkn,bkrp->bnrp", c.B, left)
    return state, y.astype(c.x.dtype)


def decays(c: Chunk) -> Decay:
    same = c.document[:, :, None] == c.document[:, None, :]
    first, last = (c.document == c.before[:, None])[..., None], same[:, -1, :, None]
    s = c.s.swapaxes(1, 2)
    # masked before exp, whose gradient would not be finite where it is not used
    return Decay(
        _exp(s[..., :, None] - s[..., None, :], jnp.tril(same)[:, None]),
        _exp(c.s, first),
        _exp(c.s[:, -1:] - c.s, last),
        _exp(c.s[:, -1], first[:, -1]),
    )


def product(equation: str, a: Array, b: Array) -> Array:
    """einsum in float32 of operands that may be narrower: not all products of bfloat16 summed in
    float32 exist on CPUs, and on TPUs float32 operands are multiplied as bfloat16."""
    return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32))


def sums(a: Array, begins: Array, axis: int, reverse: bool = False) -> Array:
    """Running sums that start anew where a document begins, so that none changes another's bits."""

    def join(first: tuple[Array, Array], then: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.where(then[1], then[0], first[0] + then[0]), first[1] | then[1]

    begins = jnp.broadcast_to(begins, a.shape)
    return jax.lax.associative_scan(join, (a, begins), axis=axis, reverse=reverse)[0]


def chunked(
    x: Array, dt: Array, A: Array, B: Array, C: Array, documents: Array, chunk: int
) -> Chunk:
    """[batch, length, heads or groups, ...] -> [chunks, b, chunk, ...]."""
    groups = B.shape[2]
    document = split(jnp.repeat(documents[:, :, None], groups, 2), groups, chunk)[..., 0]
    begins = document != jnp.concatenate((document[..., :1], document[..., :-1]), -1)
    dts = split(dt, groups, chunk)
    return Chunk(
        split(x, groups, chunk),
        dts,
        sums(split(dt * A, groups, chunk), begins[..., None], axis=2),
        split(B, groups, chunk)[..., 0, :],
        split(C, groups, chunk)[..., 0, :],
        document,
        jnp.pad(document[:-1, :, -1], ((1, 0), (0, 0))),
    )


def split(v: Array, groups: int, chunk: int) -> Array:
    """[batch, length, heads, ...] -> [chunks, b, chunk, heads of a group, ...]."""
    batch, length, heads, *rest = v.shape
    v = v.reshape(batch, length // chunk, chunk, groups, heads // groups, *rest)
    v = v.transpose(1, 0, 3, 2, *range(4, v.ndim))
    return v.reshape(length // chunk, batch * groups, chunk, heads // groups, *rest)


def joined(v: Array, like: Array) -> Array:
    """[chunks, b, chunk, ...] -> the shape of `like`, [batch, length, heads, ...]."""
    chunks, b, chunk, *rest = v.shape
    v = v.reshape(chunks, like.shape[0], b // like.shape[0], chunk, *rest)
    return v.transpose(1, 0, 3, 2, *range(4, v.ndim)).reshape(like.shape)


def by_group(state: Array, groups: int) -> Array:
    """[batch, heads, p, n] -> [b, n, r, p]."""
    batch, heads, channels, width = state.shape
    state = state.reshape(batch * groups, heads // groups, channels, width)
    return state.transpose(0, 3, 1, 2)


def by_head(state: Array, x: Array) -> Array:
    """[b, n, r, p] -> [batch, heads, p, n]."""
    return state.transpose(0, 2, 3, 1).reshape(x.shape[0], *x.shape[2:], state.shape[1])


def _exp(s: Array, where: Array) -> Array:
    return jnp.exp(jnp.where(where, s, -jnp.inf))
