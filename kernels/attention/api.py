"""Attention, the public operation: validates and chooses."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bestiary.kernels.attention import reference
from bestiary.kernels.dispatch import IMPLS, by_platform, why_not_sharded

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
    spec: P | None = None,
    kv_spec: P | None = None,
    impl: str = "auto",
) -> Array:
    """Causal attention: q [batch, T, heads, head], k and v [batch, S, kv_heads, head] -> as q.

    Logits and softmax are float32, the result has the type of v. The kernels serve rows that
    attend to themselves: no positions, and the same segments on both sides. Sequences of 2048
    queries or more are computed in blocks by the reference.

    Args:
      q_positions, kv_positions: int32 [batch or 1, T] and [batch or 1, S] (negative: an empty key
        slot), or [batch, kv_heads, S] where heads hold keys of their own; by default 0, 1, 2, ...
      q_segments, kv_segments: int32 of the same shapes; they isolate documents.
      window: keeps that many keys, the query's own included.
      scale: multiplies q k; by default head ** -0.5.
      softcap: c bounds the logits by c tanh(s / c).
      sinks: [heads], extra logits without values.
      spec, kv_spec: how q, and k and v, are sharded under the current mesh, whose devices then run
        the kernel on their own rows and heads. Without them, or when these dimensions do not
        divide, the reference serves.
      impl: "auto" (the kernel for the platform being lowered for, where it can serve),
        "reference", "tpu" or "gpu".

    Raises:
      ValueError: heads is not a multiple of kv_heads, only one side has segments, a wrong `spec` or
        an unknown `impl`.
      NotImplementedError: the named kernel cannot serve; the message says why.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"heads: {q.shape[2]} is not a multiple of kv_heads {k.shape[2]}")
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("segments: give q_segments and kv_segments, or neither")
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}; got {impl!r}")
    options = {
        "window": window,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "softcap": softcap,
    }
    rows = q_positions is None and kv_positions is None and q_segments is kv_segments
    reason = None if rows else "it has positions, or segments of queries that are not those of keys"
    operands = (q, k, v, sinks, q_segments)
    usable = {}
    if impl != "reference":
        reason = reason or _why_not_sharded(q, k, spec, kv_spec)
        usable = _usable(impl, reason, operands, options)
    if not usable:
        q_positions = jnp.arange(q.shape[1])[None] if q_positions is None else q_positions
        kv_positions = jnp.arange(k.shape[1])[None] if kv_positions is None else kv_positions
        positions, segments = (q_positions, kv_positions), (q_segments, kv_segments)
        return reference.attention(q, k, v, *positions, *segments, sinks, **options)
    run = (
        usable[impl]
        if impl != "auto"
        else by_platform(
            # recomputed: else every platform's program would save what this backward pass needs
            jax.checkpoint(partial(_rows, **options)),
            usable,
        )
    )
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and spec is not None:
        in_specs = (spec, kv_spec, kv_spec, P(*spec[2:3]), P(*spec[:2]))
        # the library's kernels do not say over which axes their results vary
        run = jax.shard_map(run, in_specs=in_specs, out_specs=spec, check_vma=False)
    return run(*operands)


def _usable(
    impl: str, reason: str | None, operands: tuple, options: dict[str, Any]
) -> dict[str, Callable[..., Array]]:
    """The kernels that `impl` allows and that can serve; `reason` holds for all of them."""
    from bestiary.kernels.attention import gpu, tpu  # importing Pallas takes 0.3 s

    kernels = {"tpu": tpu, "gpu": gpu}
    found = {}
    for name in kernels if impl == "auto" else (impl,):
        why_not = reason or kernels[name].supports(*operands, **options)
        if why_not is None:
            found[name] = partial(kernels[name].attention, **options)
        elif impl != "auto":
            raise NotImplementedError(f"impl={impl!r} cannot serve this call: {why_not}")
    return found


def _why_not_sharded(q: Array, k: Array, spec: P | None, kv_spec: P | None) -> str | None:
    """Why the kernel cannot run on each device's own rows and heads, or None."""
    if jax.sharding.get_abstract_mesh().manual_axes:
        return "it is inside a jax.shard_map, where the kernels cannot be checked"
    if spec and kv_spec and spec != kv_spec:
        return f"queries lie as {spec}, keys and values as {kv_spec}"
    return why_not_sharded(q.shape, spec, (1, 3)) or why_not_sharded(k.shape, kv_spec, (1, 3))


def _rows(
    q: Array, k: Array, v: Array, sinks: Array | None, segments: Array | None, **options: Any
) -> Array:
    """The reference for rows that attend to themselves."""
    positions = jnp.arange(q.shape[1])[None]
    return reference.attention(q, k, v, positions, positions, segments, segments, sinks, **options)
