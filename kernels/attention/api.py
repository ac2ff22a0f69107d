"""Chooses how attention is computed."""

import jax
import jax.numpy as jnp

from bestiary.kernels.attention import reference

Array = jax.Array


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
    q_segments: Array | None = None,
    kv_segments: Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """Causal attention: q [batch, T, heads, head], k and v [batch, S, kv_heads, head] -> as q.

    Positions int32 [batch or 1, T] and [batch or 1, S] (negative: an empty key slot) default to 0,
    1, 2, ... for both; segments int32 of the same shapes isolate documents. `window` keeps that
    many keys, the query's own included; `scale` defaults to head ** -0.5; `softcap` c bounds the
    logits by c tanh(s / c); `sinks` [heads] are extra logits without values. Logits and softmax are
    float32, the result has the type of v.

    Raises ValueError when heads is not a multiple of kv_heads or only one side has segments.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"heads: {q.shape[2]} is not a multiple of kv_heads {k.shape[2]}")
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("segments: give q_segments and kv_segments, or neither")
    q_positions = jnp.arange(q.shape[1])[None] if q_positions is None else q_positions
    kv_positions = jnp.arange(k.shape[1])[None] if kv_positions is None else kv_positions
    seen = reference.visible(q_positions, kv_positions, q_segments, kv_segments, window)
    return reference.attention(
        q,
        k,
        v,
        seen,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
        sinks=sinks,
    )
