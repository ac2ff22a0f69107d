"""The selective scan in plain JAX, chunk after chunk; no array holds all tokens' states.

Letters: b batch, q places in a chunk, g groups, e channels of a group, n state channels. States are
[b, g, n, e], the channels innermost.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Method = Literal["sequential", "associative"]


class Chunk(NamedTuple):
    """What a chunk reads; the scan stacks all of them in front."""

    x: Array  # float32 [q, b, g, e]
    dt: Array  # float32 [q, b, g, e]
    B: Array  # float32 [q, b, g, n]
    C: Array  # float32 [q, b, g, n]
    begins: Array  # bool [q, b], where a document begins


def selective_scan(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    state: Array,
    documents: Array,
    *,
    chunk: int,
    method: Method,
) -> tuple[Array, Array]:
    """Shapes as in `bestiary.kernels.selective_scan.selective_scan`, all float32, without D."""
    batch, length, groups, width = B.shape
    channels = x.shape[-1] // groups

    def split(v: Array, *shape: int) -> Array:
        v = v.reshape(batch, length // chunk, chunk, *shape)
        return v.transpose(1, 2, 0, *range(3, v.ndim))

    begins = jnp.diff(documents, axis=1, prepend=0) != 0
    e, n = (groups, channels), (groups, width)
    rows = Chunk(split(x, *e), split(dt, *e), split(B, *n), split(C, *n), split(begins))
    A = A.reshape(groups, channels, width).swapaxes(1, 2)

    # of the forward pass stay the states between chunks
    @partial(jax.checkpoint, prevent_cse=False)
    def step(state: Array, c: Chunk) -> tuple[Array, Array]:
        return _METHODS[method](state, c, A)

    state = state.reshape(batch, groups, channels, width).swapaxes(2, 3)
    state, y = jax.lax.scan(step, state, rows)
    y = y.transpose(2, 0, 1, 3, 4).reshape(x.shape)
    return y, state.swapaxes(2, 3).reshape(batch, -1, width)


def _sequential(state: Array, c: Chunk, A: Array) -> tuple[Array, Array]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t and y_t = h_t C_t, token after token."""

    def token(h: Array, c: Chunk) -> tuple[Array, Array]:
        decay, new = _terms(c, A)
        h = decay * h + new
        return h, (h * c.C[..., None]).sum(-2)

    return jax.lax.scan(token, state, c)


def _associative(state: Array, c: Chunk, A: Array) -> tuple[Array, Array]:
    """The same, all tokens of the chunk in log2 steps."""
    decay, new = _terms(c, A)
    h = recurrence(decay, new, state)
    return h[-1], (h * c.C[..., None]).sum(-2)


_METHODS = {"sequential": _sequential, "associative": _associative}


def _terms(c: Chunk, A: Array) -> tuple[Array, Array]:
    """exp(dt A), 0 where a document begins, and dt x B: [..., b, g, n, e]."""
    decay = jnp.exp(c.dt[..., None, :] * A)
    decay = jnp.where(c.begins[..., None, None, None], 0, decay)
    return decay, (c.dt * c.x)[..., None, :] * c.B[..., None]


@jax.custom_vjp
def recurrence(decay: Array, new: Array, state: Array) -> Array:
    """h_t = decay_t h_{t-1} + new_t over the leading axis, from h_{-1} = state."""

    def join(first: tuple[Array, Array], then: tuple[Array, Array]) -> tuple[Array, Array]:
        return then[0] * first[0], then[0] * first[1] + then[1]

    new = new.at[0].add(decay[0] * state)
    return jax.lax.associative_scan(join, (decay, new))[1]


def _recurrence_forward(decay: Array, new: Array, state: Array) -> tuple[Array, tuple]:
    h = recurrence(decay, new, state)
    return h, (decay, state, h)


def _recurrence_backward(saved: tuple, dh: Array) -> tuple[Array, Array, Array]:
    """The same recurrence from the last token to the first."""
    decay, state, h = saved
    after = jnp.concatenate((decay[1:], jnp.zeros_like(decay[:1])))
    d_new = jnp.flip(recurrence(jnp.flip(after, 0), jnp.flip(dh, 0), jnp.zeros_like(state)), 0)
    before = jnp.concatenate((state[None], h[:-1]))
    return d_new * before, d_new, decay[0] * d_new[0]


recurrence.defvjp(_recurrence_forward, _recurrence_backward)
