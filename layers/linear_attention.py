"""Linear attention with decay, and the gated mixer built on it (Yang et al. 2023, arXiv
2312.06635).

Token-mixer role: (params, x, ctx, cache) -> (y, cache, Aux).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bestiary.kernels.chunks import whole_chunks
from bestiary.kernels.dispatch import vary_alike
from bestiary.layers.attention import HEADS
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
from bestiary.layers.causal_conv import Places, recurrent, recurrent_spec
from bestiary.layers.linear import project
from bestiary.layers.norms import RMSNorm

STATE = ("batch", "heads", "state", "head")


class Documents(NamedTuple):
    """What a chunk knows of its documents; every array is [batch, 1, chunk]."""

    number: Array  # int32
    enters: Array  # bool, whether the state that enters the chunk is of this place's document
    leaves: Array  # bool, likewise of the state that leaves it


Step = Callable[[Array, tuple[Array, ...], Documents], tuple[Array, Array]]


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    state: Array | None = None,
    documents: Array | None = None,
    *,
    chunk: int = 64,
) -> tuple[Array, Array]:
    """S_t = diag(exp(decay_t)) S_{t-1} + k_t v_t^T and y_t = S_t^T q_t, in every head.

    Chunk by chunk; every exponent in it is a sum of decays, so none overflows. Decays, sums and
    states are float32, products of the type of q. Backward keeps the states between chunks only.

    Args:
      q, k: [batch, length, heads, n]; a key of 0 leaves no trace.
      v: [batch, length, heads, p].
      decay: float32 [batch, length, heads, n or 1], at most 0.
      state: float32 [batch, heads, n, p], of document 0; None: zeros.
      documents: int32 [batch, length], not falling along a row; None: all are 0. Others begin from
        zeros, and no bit of a document depends on another.
      chunk: tokens of one step, a power of two; any gives the same result.

    Returns:
      float32 y [batch, length, heads, p], and the last state.
    """
    if state is None:
        state = jnp.zeros((q.shape[0], *q.shape[2:], v.shape[-1]), jnp.float32)
    return by_chunks(_step, state, (q, k, v, decay), documents, chunk)


def _step(state: Array, rows: tuple[Array, ...], documents: Documents) -> tuple[Array, Array]:
    q, k, v, decay = rows
    parts = (x[None] for x in (q, k, v, decay, documents.number[..., None]))
    y, before, after = (x[0] for x in _within(*parts))
    entered = product(q * jnp.exp(before), state, q.dtype)
    y += jnp.where(documents.enters[..., None], entered, 0)
    left = jnp.where(documents.leaves[..., None], k * jnp.exp(after), 0)
    kept = jnp.where(documents.enters[..., -1:, None], jnp.exp(before[..., -1:, :]), 0)
    return kept.mT * state + product(left.mT, v, q.dtype), y


def _within(
    q: Array, k: Array, v: Array, decay: Array, document: Array
) -> tuple[Array, Array, Array]:
    """y [m, ..., chunk, p] of m chunks by themselves, and sums of decays: up to a place, and after
    it.

    A chunk is two halves by themselves, and what the first gives to the second: all that lies
    between a key and a query decays, on the key's side and on the query's.
    """
    if q.shape[-2] == 1:
        return (q * k).sum(-1, keepdims=True, dtype=jnp.float32) * v, decay, jnp.zeros_like(decay)

    def halves(x: Array) -> Array:  # on the first axis: XLA's CPU code allows few axes
        return jnp.concatenate(jnp.split(x, 2, -2))

    def first_and_second(x: Array) -> list[Array]:
        return jnp.split(x, 2)

    q, k, v, decay, document = map(halves, (q, k, v, decay, document))
    parts = _within(q, k, v, decay, document)
    y, before, after, documents = map(first_and_second, (*parts, document))
    (_, q), (k, _), (v, _) = map(first_and_second, (q, k, v))
    scores = product(q * jnp.exp(before[1]), (k * jnp.exp(after[0])).mT, q.dtype)
    scores = jnp.where(documents[1] == documents[0].mT, scores, 0)
    given = product(scores, v, q.dtype)
    first, second = before[0][..., -1:, :], before[1][..., -1:, :]
    return (
        jnp.concatenate((y[0], y[1] + given), -2),
        jnp.concatenate((before[0], first + before[1]), -2),
        jnp.concatenate((after[0] + second, after[1]), -2),
    )


def product(a: Array, b: Array, dtype: Any) -> Array:
    """Matrix product of operands rounded to `dtype`, summed in float32."""
    return jnp.matmul(a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def by_chunks(
    step: Step, state: Array, rows: tuple[Array, ...], documents: Array | None, chunk: int
) -> tuple[Array, Array]:
    """Runs a recurrence chunk by chunk: y [batch, length, heads, ...] and the last state.

    `step(state, rows, documents) -> (state, y)` gets a chunk of `rows` [batch, length, heads, ...]
    as [batch, heads, chunk, ...], zeros behind the last token, and returns y alike. Backward
    recomputes the steps. For `state` [batch, heads, ...] and `documents` see `linear_attention`.
    """
    batch, length = rows[0].shape[:2]
    documents = jnp.zeros((batch, length), jnp.int32) if documents is None else documents
    chunk = chunk_of(length, chunk)

    def split(x: Array, fill: int | None = 0) -> Array:
        x = whole_chunks(x, chunk, fill).reshape(batch, -1, chunk, *x.shape[2:])
        return jnp.moveaxis(x, (1, 2), (0, 3))  # [chunks, batch, heads, chunk, ...]

    number = split(documents[:, :, None], None)
    before = jnp.pad(number[:-1, ..., -1:], ((1, 0), (0, 0), (0, 0), (0, 0)))
    where = Documents(number, number == before, number == number[..., -1:])
    leaves, tree = jax.tree.flatten((state, (tuple(map(split, rows)), where)))
    state, chunks = tree.unflatten(vary_alike(*leaves))

    def body(state: Array, chunk: tuple) -> tuple[Array, Array]:
        return step(state, *chunk)

    state, y = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), state, chunks)
    y = jnp.moveaxis(y, (0, 3), (1, 2))
    return y.reshape(batch, -1, *y.shape[3:])[:, :length], state


def chunk_of(length: int, chunk: int) -> int:
    """The power of two that holds `length`, at most `chunk`."""
    return min(chunk, 1 << (length - 1).bit_length())


def power_of_two(chunk: int) -> None:
    """Raises ValueError where a chunk does not halve down to 1."""
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk: {chunk}; need a power of two")


def cost(length: int, n: int, p: int, chunk: int) -> Cost:
    """Of `linear_attention` per token and head; behind the last token, nothing is active."""
    chunk = chunk_of(length, chunk)
    flops = 4 * n * p + (chunk - 1) * (n + p)
    return Cost(flops * (-(-length // chunk) * chunk / length), flops)


@layer
class GatedLinearAttention(Layer):
    """GLA [batch, seq, dim] -> the same: a state per head that every key channel forgets at its own
    pace.

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t / sqrt(key_dim), where alpha =
    sigmoid(x W_down W_up + b)^(1 / temperature); y = (RMSNorm(o) silu(x W_gate)) W_out. The cache
    is that state, constant in length. Raises ValueError when `chunk` is not a power of two.
    """

    dim: int
    num_heads: int
    key_dim: int
    """Of a head; as published dim / 2 in all heads together."""
    value_dim: int
    """Of a head; as published dim in all heads together."""
    rank: int = 16
    """Of the map to the decays."""
    temperature: float = 16.0
    norm_eps: float = 1e-5
    out_gain: float = 1.0
    """Scales the initial output projection; 0 starts the layer as the identity of the residual."""
    chunk: int = 64
    """Tokens of one step; any gives the same result."""

    def __post_init__(self) -> None:
        positive(dim=self.dim, num_heads=self.num_heads, key_dim=self.key_dim)
        positive(value_dim=self.value_dim, rank=self.rank)
        power_of_two(self.chunk)

    def spec(self) -> Tree:
        keys, values = ((self.num_heads, width) for width in (self.key_dim, self.value_dim))
        axes = ("embed", "heads", "head")
        return {
            "query": weight((self.dim, *keys), axes),
            "key": weight((self.dim, *keys), axes),
            "value": weight((self.dim, *values), axes),
            "decay_down": weight((self.dim, self.rank), ("embed", None)),
            "decay": weight((self.rank, *keys), (None, "heads", "head")),
            "decay_bias": Param(keys, ("heads", "head")),
            "gate": weight((self.dim, *values), axes),
            "norm": self.norm,
            "out": weight((*values, self.dim), axes[1:] + axes[:1], inputs=2, gain=self.out_gain),
        }

    @property
    def norm(self) -> RMSNorm:
        return RMSNorm(dim=self.value_dim, eps=self.norm_eps)

    def cost(self, length: int) -> Cost:
        """Adds the recurrence in chunks."""
        per_head = cost(length, self.key_dim, self.value_dim, self.chunk)
        return super().cost(length) + per_head * self.num_heads

    def cache_spec(self, batch: int, length: int, dtype: Any = jnp.float32) -> Tree:
        del length, dtype
        shape = (batch, self.num_heads, self.key_dim, self.value_dim)
        return recurrent_spec(batch, Param(shape, STATE))

    def apply(
        self, params: Tree, x: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        """With a cache, negative `ctx.positions` are padding."""
        y, cache = recurrent(partial(self._mix, params), x, ctx, cache)
        return y, cache, Aux()

    def _mix(
        self, params: Tree, x: Array, places: Places, state: Array | None
    ) -> tuple[Array, Array]:
        q, k, v, gate = (
            project("bsd,dnh->bsnh", x, params, name, out=HEADS)
            for name in ("query", "key", "value", "gate")
        )
        low = project("bsd,dr->bsr", x, params, "decay_down")
        decay = project("bsr,rnh->bsnh", low, params, "decay", out=HEADS)
        decay = jax.nn.log_sigmoid(decay.astype(jnp.float32)) / self.temperature
        o, state = linear_attention(
            q * self.key_dim**-0.5,
            places.of_real(k),
            v,
            places.of_real(decay),
            state,
            places.documents,
            chunk=self.chunk,
        )
        o = self.norm.apply(params["norm"], o.astype(x.dtype)) * jax.nn.silu(gate)
        return project("bsnh,nhd->bsd", o, params, "out"), state
