"""Attention on TPU: JAX's splash attention, which skips the blocks that no query sees."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash

from bestiary.kernels.attention.masks import Mask, Rectangles, causal_window

Array = jax.Array
_LANES = 128


def supports(q: Array, k: Array, *operands: Any, **options: Any) -> str | None:
    """Why these operands of `attention` cannot be served, or None."""
    del options
    if operands[2] is not None:
        return "splash attention takes no bias"
    length, head_dim = q.shape[1], q.shape[3]
    if k.shape[1] != length:
        return f"{length} queries of {k.shape[1]} keys; splash attention serves whole rows"
    if length % _LANES:
        return f"length {length} is not a multiple of {_LANES}"
    if head_dim % _LANES:
        return f"head dimension {head_dim} is not a multiple of {_LANES}"
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
    del bias
    length, heads = q.shape[1:3]
    kernel = make_splash_mha(
        MultiHeadMask([_splash_mask(mask, length)] * heads),
        block_sizes=_blocks(length),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
    )
    q = (q * scale).astype(q.dtype)  # splash takes no scale
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))

    def row(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
        ids = None if segments is None else SegmentIds(segments, segments)
        out = kernel(q, k, v, ids, None if sinks is None else sinks.astype(jnp.float32))
        assert isinstance(out, jax.Array)  # with residuals, which we do not ask for, a tuple
        return out

    return jax.vmap(row)(q, k, v, segments).swapaxes(1, 2).astype(v.dtype)


def _blocks(length: int) -> BlockSizes:
    size = next(n for n in (512, 256, _LANES) if length % n == 0)
    return BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )


def _splash_mask(mask: Mask, length: int) -> splash.Mask:
    """Causal rows and windows are evaluated in the kernel, of others it reads the blocks that are
    partly visible, equal ones stored once."""
    shape = (length, length)
    window = causal_window(mask, length)
    if window == length:
        return CausalMask(shape)
    if window is not None:
        return LocalMask(shape, (window - 1, 0), offset=0)
    return _Evaluated(mask, length)


@dataclass(frozen=True)
class _Evaluated(splash.Mask):
    """Blocks of a mask, evaluated where they are neither empty nor full."""

    mask: Mask
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.length, self.length

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        q, kv = (np.arange(*part.indices(self.length)) for part in index)
        some, all_ = self.mask.some_all(Rectangles(q[:1], q[-1:], kv[:1], kv[-1:]))
        if all_ or not some:
            return np.full((len(q), len(kv)), bool(all_))
        return np.asarray(self.mask(q[:, None], kv[None]))
