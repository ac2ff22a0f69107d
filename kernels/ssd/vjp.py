"""The gradient of state-space duality: chunks backwards, from the states that entered them.

Nothing else of the forward pass is kept. Letters as in `reference`.
"""

from functools import partial

import jax
import jax.numpy as jnp

from bestiary.kernels.ssd import reference
from bestiary.kernels.ssd.reference import Chunk, by_group, by_head, chunked, joined, product, split

Array = jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def ssd(chunk: int, *args: Array) -> tuple[Array, Array]:
    """`reference.ssd` of (x, dt, A, B, C, state, documents), with a gradient of its own."""
    return reference.ssd(*args, chunk=chunk)


def _forward(chunk: int, *args: Array) -> tuple[tuple[Array, Array], tuple]:
    x, dt, A, B, C, state, documents = args

    def step(state: Array, c: Chunk) -> tuple[Array, tuple[Array, Array]]:
        after, y = reference.forward(state, c)
        return after, (y, state)

    rows = chunked(x, dt, A, B, C, documents, chunk)
    last, (y, states) = jax.lax.scan(step, by_group(state, B.shape[2]), rows)
    return (joined(y, x), by_head(last, x)), (args, states)


def _backward(chunk: int, saved: tuple, cotangents: tuple[Array, Array]) -> tuple:
    (x, dt, A, B, C, _, documents), states = saved
    dy, d_last = cotangents
    groups = B.shape[2]
    rows = chunked(x, dt, A, B, C, documents, chunk)

    def step(d_state: Array, row: tuple[Chunk, Array, Array]) -> tuple[Array, tuple]:
        return backward(d_state, *row)

    xs = rows, states, split(dy, groups, chunk)
    d_state, grads = jax.lax.scan(step, by_group(d_last, groups), xs, reverse=True)
    dx, d_dt, ds, dB, dC = grads
    # what a adds to is the sums at and behind it
    document = rows.document
    ends = document != jnp.concatenate((document[..., 1:], document[..., -1:]), -1)
    da = joined(reference.sums(ds, ends[..., None], axis=2, reverse=True), dt)
    d_dt = joined(d_dt, dt) + A * da
    dB, dC = joined(dB[..., None, :], B), joined(dC[..., None, :], C)
    return joined(dx, x), d_dt, (dt * da).sum((0, 1)), dB, dC, by_head(d_state, x), None


def backward(d_after: Array, c: Chunk, state: Array, dy: Array) -> tuple[Array, tuple]:
    """The gradient of the state that leaves a chunk -> of the one that enters it, and those of x,
    dt, s, B and C."""
    decay = reference.decays(c)
    dt = c.dt.swapaxes(1, 2)[:, :, None]
    scores = product("bqn,bkn->bqk", c.C, c.B)[:, None]
    d_weights = product("bqrp,bkrp->brqk", dy, c.x)
    to_dt = d_weights * scores * decay.within
    to_s = to_dt * dt
    d_scores = (d_weights * decay.within * dt).sum(1).astype(c.B.dtype)

    # y += enter C state
    state_in, d_out = state.astype(c.C.dtype), decay.enter[..., None] * dy
    d_enter = _over_channels(d_out * product("bqn,bnrp->bqrp", c.C, state_in))
    d_out = d_out.astype(c.C.dtype)
    dC = product("bqk,bkn->bqn", d_scores, c.B) + product(
        "bnrp,bqrp->bnq", state_in, d_out
    ).swapaxes(1, 2)
    across = decay.across[:, None, :, None]
    d_state = across * d_after + product("bqn,bqrp->bnrp", c.C, d_out)

    # state' = across state + B (leave dt x)
    d_after_in, leave_dt = d_after.astype(c.B.dtype), decay.leave * c.dt
    left = (leave_dt[..., None] * c.x).astype(c.B.dtype)
    d_left = product("bkn,bnrp->bkrp", c.B, d_after_in)
    dB = product("bqk,bqn->bkn", d_scores, c.C) + product("bkrp,bnrp->bkn", left, d_after_in)
    d_leave = _over_channels(d_left * c.x)  # of leave dt

    weights = (scores * decay.within * dt).astype(dy.dtype)
    dx = product("brqk,bqrp->bkrp", weights, dy) + leave_dt[..., None] * d_left
    d_dt = to_dt.sum(2).swapaxes(1, 2) + decay.leave * d_leave
    ds = (to_s.sum(3) - to_s.sum(2)).swapaxes(1, 2) + d_enter - leave_dt * d_leave
    end = (leave_dt * d_leave).sum(1) + decay.across * _over_channels((d_after * state).sum(1))
    ds = ds.at[:, -1].add(end)
    return d_state, (dx.astype(c.x.dtype), d_dt, ds, dB.astype(c.B.dtype), dC.astype(c.C.dtype))


def _over_channels(v: Array) -> Array:
    """The sum over the last axis, of two: CPUs sum those faster than the last of many."""
    return v.reshape(-1, v.shape[-1]).sum(1).reshape(v.shape[:-1])


ssd.defvjp(_forward, _backward)
