"""Attention on GPU: cuDNN's flash attention, called through JAX."""

from functools import partial
from typing import Any

import jax

Array = jax.Array


def supports(*operands: Any, **options: Any) -> str | None:
    """Why these operands of `attention` cannot be served, or None."""
    q, k, _, sinks, _ = operands
    if options["softcap"] is not None:
        return "cuDNN's attention has no soft-cap"
    if sinks is not None:
        return "cuDNN's attention has no sinks"
    if q.shape[1] != k.shape[1]:
        return f"{q.shape[1]} queries of {k.shape[1]} keys; served are whole rows"
    try:  # JAX looks for cuDNN, and for what it can do, when it traces the call
        jax.eval_shape(partial(attention, **options), *operands)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error)
    return None


def attention(
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None,
    segments: Array | None,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Array:
    """Rows that attend to themselves, in order: shapes as in `api.attention`."""
    del sinks, softcap
    mask = None
    if segments is not None:
        mask = segments[:, None, :, None] == segments[:, None, None, :]
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
