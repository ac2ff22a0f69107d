"""Bit flips in the memory that holds a model: over any parameter tree, in any number format.

The fault model of FT-ClipAct and ProAct (Hoang et al. 2020; Mousavi et al. 2024): every stored bit
flips with the same probability, the bit-error rate, and the faulty weights stay for an evaluation.
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array, Tree

FLOATS = ("float32", "bfloat16", "float16")


class Format(Protocol):
    """How numbers are stored: as words of `bits` bits, the least significant first."""

    @property
    def bits(self) -> int: ...

    def encode(self, w: Array) -> tuple[Array, Array]:
        """(unsigned words, what `decode` needs beside them)."""
        ...

    def decode(self, words: Array, scale: Array) -> Array: ...


@jax.tree_util.register_static
@dataclass(frozen=True)
class Native:
    """The bits of an array type itself: IEEE 754, bfloat16, or whole numbers."""

    dtype: str = "float32"

    def __post_init__(self) -> None:
        kind = jnp.dtype(self.dtype)
        number = jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)
        if not number or kind.itemsize > 4:
            raise ValueError(f"dtype: {self.dtype}; need floats or integers of 8 to 32 bits")

    @property
    def bits(self) -> int:
        return 8 * jnp.dtype(self.dtype).itemsize

    def encode(self, w: Array) -> tuple[Array, Array]:
        words = jax.lax.bitcast_convert_type(w.astype(self.dtype), f"uint{self.bits}")
        return words, jnp.float32(1)

    def decode(self, words: Array, scale: Array) -> Array:
        del scale
        return jax.lax.bitcast_convert_type(words, jnp.dtype(self.dtype))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Fixed:
    """Fixed point Qm.n: a sign, m bits before and n behind the point, in two's complement.

    Rounds towards zero and saturates. Decoded to float32, which holds 24 significant bits.
    """

    whole: int = 15
    fraction: int = 16

    def __post_init__(self) -> None:
        if self.whole < 0 or self.fraction < 0 or not 1 <= self.whole + self.fraction <= 31:
            raise ValueError(
                f"Q{self.whole}.{self.fraction}: need 1 to 31 bits beside the sign, none negative"
            )

    @property
    def bits(self) -> int:
        return 1 + self.whole + self.fraction

    def encode(self, w: Array) -> tuple[Array, Array]:
        most = 2.0 ** (self.bits - 1)
        scaled = w.astype(jnp.float32) * 2.0**self.fraction
        inside = jnp.clip(scaled, -most, jnp.nextafter(jnp.float32(most), jnp.float32(0)))
        word = jnp.where(scaled >= most, int(most) - 1, inside.astype(jnp.int32))
        return word.astype(jnp.uint32), jnp.float32(2.0**-self.fraction)

    def decode(self, words: Array, scale: Array) -> Array:
        return _signed(words, self.bits).astype(jnp.float32) * scale


@jax.tree_util.register_static
@dataclass(frozen=True)
class Int8:
    """Symmetric 8-bit integers with one scale a tensor, max |w| / 127, which no fault meets."""

    @property
    def bits(self) -> int:
        return 8

    def encode(self, w: Array) -> tuple[Array, Array]:
        w = w.astype(jnp.float32)
        scale = jnp.maximum(jnp.abs(w).max(initial=0), jnp.finfo(jnp.float32).tiny) / 127
        return jnp.clip(jnp.round(w / scale), -127, 127).astype(jnp.int8).view(jnp.uint8), scale

    def decode(self, words: Array, scale: Array) -> Array:
        return words.view(jnp.int8).astype(jnp.float32) * scale


def number_format(name: str) -> Format:
    """The format called "float32", "bfloat16", "float16", "int8" or, for Qm.n, "q15.16".

    Raises ValueError for any other name.
    """
    if name in FLOATS:
        return Native(name)
    if name == "int8":
        return Int8()
    if match := re.fullmatch(r"q(\d+)\.(\d+)", name.lower()):
        return Fixed(int(match[1]), int(match[2]))
    raise ValueError(f"format: unknown {name!r}; need one of {', '.join(FLOATS)}, int8, q15.16")


def flip(params: Tree, key: Array, rate: Array | float, format: Format | None = None) -> Tree:
    """`params` as read from memory in which every bit flipped with probability `rate`.

    Args:
      params: any tree of arrays. Floating leaves are stored in `format`, others as they are.
      key: PRNG key; a leaf's faults follow from it and the leaf's place in the tree, on any mesh.
      rate: bit-error rate; each bit flips by itself, exactly with this probability.
      format: None stores every leaf in its own type.

    Returns:
      The tree with the shapes and types of `params`; NaN and infinities may occur.

    Raises:
      ValueError: a leaf's type is not one that can be stored.
    """
    leaves, tree = jax.tree.flatten(params)
    return tree.unflatten(_flip(leaves, key, rate, tuple(_stored(w, format) for w in leaves)))


@partial(jax.jit, static_argnames="formats")
def _flip(
    leaves: list[Array], key: Array, rate: Array | float, formats: tuple[Format, ...]
) -> list[Array]:
    return [
        _flip_word(w, faults(jax.random.fold_in(key, i), w.shape, form.bits, rate), form)
        for i, (w, form) in enumerate(zip(leaves, formats, strict=True))
    ]


def flip_bit(w: Array, bit: Array, format: Format | None = None) -> Array:
    """`w` [...] with bit number `bit` (int [...], 0 the least significant) of every entry
    flipped."""
    mask = jnp.left_shift(jnp.uint32(1), bit.astype(jnp.uint32))
    return _flip_word(w, mask, _stored(w, format))


def _flip_word(w: Array, mask: Array, format: Format) -> Array:
    """`w` with the bits of `mask`, uint32 of the same shape, flipped."""
    words, scale = format.encode(w)
    return format.decode(words ^ mask.astype(words.dtype), scale).astype(w.dtype)


def faults(key: Array, shape: tuple[int, ...], bits: int, rate: Array | float) -> Array:
    """uint32 [shape]: words whose lowest `bits` bits are 1 with probability `rate` each.

    A uniform float32 has steps of 1e-7, as large as the rates in question: 32 random bits are
    compared with rate 2^32, and a further draw decides where the two are equal.
    """
    scaled = jnp.float32(rate) * 2.0**32
    whole = jnp.floor(scaled)
    limit, rest = whole.astype(jnp.uint32), scaled - whole
    ties = jax.random.uniform(jax.random.fold_in(key, bits), shape) < rest

    def add(bit: Array, mask: Array) -> Array:
        u = jax.random.bits(jax.random.fold_in(key, bit), shape, jnp.uint32)
        hit = (u < limit) | ((u == limit) & ties) | (jnp.float32(rate) >= 1)
        return mask | (hit.astype(jnp.uint32) << bit.astype(jnp.uint32))

    return jax.lax.fori_loop(0, bits, add, jnp.zeros(shape, jnp.uint32))


def _stored(w: Array, format: Format | None) -> Format:
    """How a leaf is stored when floating ones are in `format`."""
    if format is None or not jnp.issubdtype(w.dtype, jnp.floating):
        return Native(w.dtype.name)
    return format


def _signed(words: Array, bits: int) -> Array:
    """int32 of words whose lowest `bits` bits are a two's complement number."""
    left = 32 - bits
    return (words << left).astype(jnp.int32) >> left
