"""State-space duality, the public operation: validates and chooses."""

from functools import partial

import jax
import jax.numpy as jnp

from bestiary.kernels.chunks import whole_chunks
from bestiary.kernels.dispatch import check_impl, vary_alike
from bestiary.kernels.ssd import vjp

Array = jax.Array


def ssd(
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
    impl: str = "auto",
) -> tuple[Array, Array]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T and y_t = S_t C_t + D x_t, in every head.

    Mamba-2 (Dao & Gu 2024, arXiv 2405.21060, section 6), exact for any chunk. Decays and states are
    float32; products are of the type of x, summed in float32. The gradient of every argument but
    `documents` is defined, from the states between chunks, which alone are kept.

    Args:
      x: [batch, length, heads, p], any float type.
      dt: float32 [batch, length, heads], at least 0; 0 leaves the state as it is.
      A: float32 [heads], negative.
      B, C: [batch, length, groups, n] in the type of x; head h reads group h // (heads / groups).
      D: [heads]; None: no skip.
      initial_state: float32 [batch, heads, p, n]; None: zeros.
      documents: int32 [batch, length], not falling along a row; the initial state belongs to 0.
        Others begin from zeros, and no bit of a document depends on another.
      chunk: tokens of one matrix product. Memory for states falls with it, work grows by
        2 heads p per token, and sums of dt A lose digits in proportion to it.
      impl: "auto" or "reference".

    Returns:
      y like x, and the last state, float32 [batch, heads, p, n].

    Raises:
      ValueError: shapes that do not fit, a chunk below 1, an unknown `impl`.
      NotImplementedError: impl "tpu" or "gpu", for which there is no kernel.
    """
    if x.ndim != 4 or dt.shape != x.shape[:3] or A.shape != x.shape[2:3]:
        raise ValueError(
            f"shapes x {x.shape}, dt {dt.shape}, A {A.shape}; need [batch, length, heads, p], "
            "[batch, length, heads] and [heads]"
        )
    if B.ndim != 4 or B.shape[:2] != x.shape[:2] or C.shape != B.shape:
        raise ValueError(
            f"shapes B {B.shape}, C {C.shape}; need [batch, length, groups, n] for both"
        )
    batch, length, heads, channels = x.shape
    if heads % B.shape[2]:
        raise ValueError(f"groups: {B.shape[2]} does not divide heads {heads}")
    if chunk < 1:
        raise ValueError(f"chunk: {chunk}; need at least 1")
    check_impl(impl)
    if impl in ("tpu", "gpu"):
        raise NotImplementedError(f"impl={impl!r} cannot serve this call: there is no kernel yet")
    shape = (batch, heads, channels, B.shape[3])
    state = jnp.zeros(shape, jnp.float32) if initial_state is None else initial_state
    if state.shape != shape:
        raise ValueError(f"initial_state: shape {state.shape}; need {shape}")
    documents = jnp.zeros((batch, length), jnp.int32) if documents is None else documents
    chunk = min(chunk, length)

    padded = partial(whole_chunks, chunk=chunk)
    A, dt = A.astype(jnp.float32), dt.astype(jnp.float32)
    B, C = B.astype(x.dtype), C.astype(x.dtype)
    args = [padded(x), padded(dt), A, padded(B), padded(C)]
    args += [state.astype(jnp.float32), padded(documents, fill=None)]
    result: tuple[Array, Array] = vjp.ssd(chunk, *vary_alike(*args))
    y, state = result[0][:, :length], result[1]
    return (y if D is None else y + D.astype(x.dtype)[:, None] * x), state
