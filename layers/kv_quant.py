"""KIVI (Liu et al. 2024, arXiv 2402.02750): keys and values as codes of few bits.

Keys are quantised per channel over groups of tokens, values per token over groups of channels, each
group between its minimum and maximum. Codes are packed into int32 words, the first lowest.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array

WORD = 32


class Quantised(NamedTuple):
    """The codes of x [..., N, ...] along one axis, in groups of it."""

    code: Array
    """int32 [..., words(N, bits), ...]."""
    scale: Array
    """[..., N / group, ...]; `minimum` alike."""
    minimum: Array


def words(n: int, bits: int) -> int:
    """int32 words that hold n codes; the last may be partly empty."""
    return -(-n * bits // WORD)


def quantise(x: Array, bits: int, group: int, axis: int, dtype: object = jnp.float32) -> Quantised:
    """Codes round((x - min) / scale), to even, with scale = (max - min) / (2^bits - 1) of `group`
    entries along `axis`; scale and minimum are rounded to `dtype` first. A constant group has scale
    0 and codes 0."""
    x = jnp.moveaxis(x, axis, -1).astype(jnp.float32)
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // group, group)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    top = 2**bits - 1
    low, scale = (a.astype(dtype) for a in (low, (high - low) / top))
    steps = (groups - low.astype(jnp.float32)) / jnp.where(scale == 0, 1, scale)
    code = pack(jnp.round(jnp.clip(steps, 0, top)).astype(jnp.int32).reshape(x.shape), bits)
    code, scale, low = (jnp.moveaxis(a, -1, axis) for a in (code, scale[..., 0], low[..., 0]))
    return Quantised(code, scale, low)


def dequantise(x: Quantised, bits: int, group: int, axis: int) -> Array:
    """code * scale + minimum: [..., N, ...] in the type of the scale."""
    scale, low = (jnp.moveaxis(a, axis, -1)[..., None] for a in (x.scale, x.minimum))
    groups = scale.shape[-2]
    code = unpack(jnp.moveaxis(x.code, axis, -1), bits)[..., : groups * group]
    code = code.reshape(*code.shape[:-1], groups, group).astype(scale.dtype)
    out = code * scale + low
    return jnp.moveaxis(out.reshape(*out.shape[:-2], groups * group), -1, axis)


def pack(code: Array, bits: int) -> Array:
    """int32 codes [..., N] -> int32 words [..., words(N, bits)], least significant bits first."""
    per_word = WORD // bits
    pad = -code.shape[-1] % per_word
    code = jnp.pad(code, ((0, 0),) * (code.ndim - 1) + ((0, pad),)).astype(jnp.uint32)
    shifted = code.reshape(*code.shape[:-1], code.shape[-1] // per_word, per_word) << _shifts(bits)
    # disjoint bits: their sum is their union
    return jax.lax.bitcast_convert_type(shifted.sum(-1, dtype=jnp.uint32), jnp.int32)


def unpack(packed: Array, bits: int) -> Array:
    """int32 words [..., W] -> int32 codes [..., 32 / bits W]."""
    unsigned = jax.lax.bitcast_convert_type(packed, jnp.uint32)[..., None]
    code = (unsigned >> _shifts(bits)) & jnp.uint32(2**bits - 1)
    return code.astype(jnp.int32).reshape(*packed.shape[:-1], packed.shape[-1] * WORD // bits)


def _shifts(bits: int) -> Array:
    return jnp.arange(0, WORD, bits, dtype=jnp.uint32)
