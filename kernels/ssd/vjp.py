"""The gradient of state-space duality: chunks backwards, from the states that entered them.

Nothing else of the forward pass is kept. Letters as in `reference`.
"""

from functools import partial

import jax
import jax.numpy as jnp

from bestiary.kernels.ssd import reference
from bestiary.kernels.ssd.reference import Chunk, chunked, grouped, product, unchunked, ungrouped

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

    rows = chunked(x, dt, dt * A, B, C, documents, chunk)
    last, (y, states) = jax.lax.scan(step, grouped(state, B.shape[2]), rows)
    return (unchunked(y, x), ungrouped(last)), (args, states)


def _backward(chunk: int, saved: tuple, cotangents: tuple[Array, Array]) -> tuple:
    (x, dt, A, B, C, _, documents), states = saved
    dy, d_last = cotangents
    rows = chunked(x, dt, dt * A, B, C, documents, chunk)
    dys = dy.reshape(rows.x.swapaxes(0, 1).shape).swapaxes(0, 1)

    def step(d_state: Array, row: tuple[Chunk, Array, Array]) -> tuple[Array, tuple]:
        return backward(d_state, *row)

    d_state, grads = jax.lax.scan(
        step, grouped(d_last, B.shape[2]), (rows, states, dys), reverse=True
    )
    dx, d_dt, da, dB, dC = map(unchunked, grads, (x, dt, dt, B, C))
    return dx, d_dt + A * da, (dt * da).sum((0, 1)), dB, dC, ungrouped(d_state), None


def backward(d_after: Array, c: Chunk, state: Array, dy: Array) -> tuple[Array, tuple]:
    """The gradient of the state that leaves a chunk -> of the one that enters it, and those of x,
    dt, a, B and C."""
    decay = reference.decays(c)
    dt = c.dt.transpose(0, 2, 3, 1)[..., None, :]
    scores = product("bqgn,bkgn->bgqk", c.C, c.B)[:, :, None]
    weights = scores * decay.within * dt
    d_weights = product("bqgrp,bkgrp->bgrqk", dy, c.x)
    to_dt = d_weights * scores * decay.within
    to_s = to_dt * dt
    d_scores = (d_weights * decay.within * dt).sum(2).astype(c.B.dtype)

    # y += enter C state
    state_in, d_out = state.astype(c.C.dtype), decay.enter[..., None] * dy
    d_enter = (d_out * product("bqgn,bgnrp->bqgrp", c.C, state_in)).sum(-1)
    d_out = d_out.astype(c.C.dtype)
    dC = product("bgqk,bkgn->bqgn", d_scores, c.B)
    dC += product("bqgrp,bgnrp->bqgn", d_out, state_in)
    across = decay.across[:, :, None, :, None]
    d_state = across * d_after + product("bqgn,bqgrp->bgnrp", c.C, d_out)

    # state' = across state + B (leave dt x)
    d_after_in, leave_dt = d_after.astype(c.B.dtype), decay.leave * c.dt
    d_left = product("bkgn,bgnrp->bkgrp", c.B, d_after_in)
    dB = product("bgqk,bqgn->bkgn", d_scores, c.C)
    dB += product("bkgrp,bgnrp->bkgn", (leave_dt[..., None] * c.x).astype(c.B.dtype), d_after_in)
    d_leave = (d_left * c.x).sum(-1)  # [b, k, g, r], of leave dt

    dx = product("bgrqk,bqgrp->bkgrp", weights.astype(dy.dtype), dy) + leave_dt[..., None] * d_left
    d_dt = to_dt.sum(-2).transpose(0, 3, 1, 2) + decay.leave * d_leave
    # s: sums of a up to a place, in its document
    ds = (to_s.sum(-1) - to_s.sum(-2)).transpose(0, 3, 1, 2) + d_enter - leave_dt * d_leave
    end = (leave_dt * d_leave).sum(1) + decay.across * (d_after * state).sum((2, 4))
    ds = ds.at[:, -1].add(end)
    seen = jnp.tril(c.document[:, :, None] == c.document[:, None, :]).astype(ds.dtype)
    da = jnp.einsum("bqk,bqgr->bkgr", seen, ds, precision="highest")
    return d_state, (dx.astype(c.x.dtype), d_dt, da, dB.astype(c.B.dtype), dC.astype(c.C.dtype))


ssd.defvjp(_forward, _backward)
