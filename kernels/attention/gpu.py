"""Attention on GPU: cuDNN's flash attention, called through JAX."""

from functools import partial
from typing import Any

import jax

from bestiary.kernels.attention.masks import Mask, causal_window

Array = jax.Array


def supports(*operands: Any, **options: Any) -> str | None:
    """Why these operands of `attention` cannot be served, or None."""
    q, k, _, sinks, bias, _ = operands
    if causal_window(options["mask"], q.shape[1]) is None:
        return f"cuDNN serves causal rows and windows; the mask is {options['mask']}"
    if options["softcap"] is not None:
        return "cuDNN's attention has no soft-cap"
    if sinks is not None:
        return "cuDNN's attention has no sinks"
    if bias is not None:
        return "cuDNN's attention would write the bias of every query"
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
    bias: Array | None,
    segments: Array | None,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None,
) -> Array:
    """Rows that attend to themselves, in order: shapes as in `api.attention`."""
    del sinks, bias, softcap
    window = causal_window(mask, q.shape[1])
    assert window is not None  # `supports` says so
    same = None
    if segments is not None:
        same = segments[:, None, :, None] == segments[:, None, None, :]
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=same,
        scale=scale,
        is_causal=True,
        local_window_size=(window - 1, 0) if window < q.shape[1] else None,
        implementation="cudnn",
    )
