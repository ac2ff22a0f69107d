"""The selective scan, the public operation: validates and chooses."""

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp

from bestiary.kernels.chunks import whole_chunks
from bestiary.kernels.dispatch import check_impl, vary_alike
from bestiary.kernels.selective_scan import reference
from bestiary.kernels.selective_scan.reference import Method

Array = jax.Array


def selective_scan(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    *,
    D: Array | None = None,
    initial_state: Array | None = None,
    documents: Array | None = None,
    chunk: int = 64,
    method: Method = "sequential",
    impl: str = "auto",
) -> tuple[Array, Array]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t and y_t = h_t C_t + D x_t, in every channel.

    Mamba (Gu & Dao 2023, arXiv 2312.00752, section 3): exact decay, Euler input. Computed in
    float32; the gradient of every argument but `documents` is defined. The states of one chunk
    exist at a time; for the backward pass those between chunks are kept.

    Args:
      x: [batch, length, channels], any float type.
      dt: [batch, length, channels]; 0 leaves the state as it is.
      A: [channels, n], negative.
      B, C: [batch, length, groups, n]; channel e reads group e // (channels / groups).
      D: [channels]; None: no skip.
      initial_state: [batch, channels, n]; None: zeros.
      documents: int32 [batch, length], not falling along a row; the initial state belongs to 0.
        Others begin from zeros, and no bit of a document depends on another.
      chunk: tokens whose states exist at a time.
      method: of a chunk: "sequential", token after token, least work and memory; "associative",
        log2(chunk) parallel steps over the whole chunk.
      impl: "auto" or "reference".

    Returns:
      y like x, and the last state, float32 [batch, channels, n].

    Raises:
      ValueError: shapes that do not fit, a chunk below 1, an unknown `method` or `impl`.
      NotImplementedError: impl "tpu" or "gpu", for which there is no kernel.
    """
    if x.ndim != 3 or dt.shape != x.shape or A.ndim != 2 or A.shape[0] != x.shape[2]:
        raise ValueError(
            f"shapes x {x.shape}, dt {dt.shape}, A {A.shape}; need [batch, length, channels] twice "
            "and [channels, n]"
        )
    shape = (*x.shape[:2], A.shape[1])
    if B.ndim != 4 or C.shape != B.shape or (*B.shape[:2], B.shape[3]) != shape:
        raise ValueError(
            f"shapes B {B.shape}, C {C.shape}; need [batch, length, groups, n] for both"
        )
    batch, length, channels = x.shape
    if channels % B.shape[2]:
        raise ValueError(f"groups: {B.shape[2]} does not divide channels {channels}")
    if chunk < 1:
        raise ValueError(f"chunk: {chunk}; need at least 1")
    if method not in get_args(Method):
        raise ValueError(f"method: {method!r}; need one of {', '.join(get_args(Method))}")
    check_impl(impl)
    if impl in ("tpu", "gpu"):
        raise NotImplementedError(f"impl={impl!r} cannot serve this call: there is no kernel yet")
    shape = (batch, *A.shape)
    state = jnp.zeros(shape, jnp.float32) if initial_state is None else initial_state
    if state.shape != shape:
        raise ValueError(f"initial_state: shape {state.shape}; need {shape}")
    documents = jnp.zeros((batch, length), jnp.int32) if documents is None else documents
    chunk = min(chunk, length)

    padded = partial(whole_chunks, chunk=chunk)
    wide, dt, A, B, C, state = (v.astype(jnp.float32) for v in (x, dt, A, B, C, state))
    args = [
        padded(wide),
        padded(dt),
        A,
        padded(B),
        padded(C),
        state,
        padded(documents, fill=None),
    ]
    y, state = reference.selective_scan(*vary_alike(*args), chunk=chunk, method=method)
    y = y[:, :length]
    return (y if D is None else y + D.astype(jnp.float32) * wide).astype(x.dtype), state
