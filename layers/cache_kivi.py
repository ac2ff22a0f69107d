"""KIVI (Liu et al. 2024, arXiv 2402.02750): a cache of codes, with a tail in full precision."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from bestiary.layers.base import Array, Param, Tree, positive
from bestiary.layers.cache import (
    INDEX,
    CachePolicy,
    Received,
    alive,
    extend,
    index_spec,
    no_window,
    put,
)
from bestiary.layers.kv_quant import WORD, Quantised, dequantise, quantise, words

BITS = (2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class KIVI(CachePolicy):
    """Codes of `bits` bits: of "v" per token over `group_size` channels, of other entries per
    channel over `group_size` tokens.

    The newest `residual` values of a document stay as they are, and as many keys as have come since
    a multiple of it: what is quantised is so in whole groups, and a call attends to its own tokens
    before they are. Slots are in the order of arrival.
    """

    complete = True

    bits: int = 2
    group_size: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        positive(group_size=self.group_size, residual=self.residual)
        if self.bits not in BITS:
            raise ValueError(f"bits: {self.bits}; need one of {', '.join(map(str, BITS))}")
        if self.residual % self.group_size:
            raise ValueError(
                f"residual: {self.residual}; need a multiple of group_size {self.group_size}"
            )
        if self.residual * self.bits % WORD:
            raise ValueError(f"residual: {self.residual}; need a multiple of {WORD // self.bits}")

    def spec(
        self,
        batch: int,
        length: int,
        entries: Mapping[str, Param],
        dtype: Any,
        *,
        heads: int,
        window: int | None = None,
    ) -> Tree:
        del heads
        no_window(self, window)

        def declare(name: str, entry: Param) -> Tree:
            heads, width = entry.shape
            slots = max(self.coded(name, length), 0)
            if name != "v":
                rows, groups, widths = (
                    slots * self.bits // WORD,
                    slots // self.group_size,
                    (width,) * 2,
                )
            elif width % self.group_size:
                raise ValueError(
                    f"group_size: {self.group_size} does not divide {width} channels of a head"
                )
            else:
                rows = groups = slots
                widths = words(width, self.bits), width // self.group_size

            def part(slots: int, width: int, dtype: Any) -> Param:
                axes = ("batch", None, entry.axes[0], None)
                return Param((batch, slots, heads, width), axes, dtype=dtype)

            scale = part(groups, widths[1], dtype)
            return {
                "code": part(rows, widths[0], jnp.int32),
                "scale": scale,
                "minimum": scale,
                "tail": part(self.residual, width, dtype),
            }

        parts = {name: declare(name, entry) for name, entry in entries.items()}
        count = Param((batch,), ("batch",), dtype=jnp.int32)
        return parts | index_spec(batch, length) | {"count": count}

    def coded(self, name: str, count: Any) -> Any:
        """How many of the first `count` tokens have codes, if above 0."""
        whole = count // self.residual * self.residual
        return count - self.residual if name == "v" else whole

    def update(
        self, cache: Tree, new: Tree, received: Received | None = None, window: int | None = None
    ) -> tuple[Tree, Tree]:
        del received, window
        index = {name: cache[name] for name in INDEX}
        names = cache.keys() - {*INDEX, "count"}
        slots = cache["position"].shape[1]
        old = index | {name: self.read(name, cache[name], cache["count"], slots) for name in names}
        stays = alive(new)
        start = jnp.where(goes_on(cache, new), cache["count"], 0)
        arrival = start[:, None] + jnp.cumsum(stays, 1) - 1
        whole = put(old, new, jnp.where(stays, arrival, slots))
        count = start + stays.sum(1)
        restarts = new["position"].shape[1] > 1 and "segment" in new
        keys = extend(old, new) if restarts else whole
        parts = {
            name: self.write(name, cache[name], whole[name], start, count, new[name].shape[1])
            for name in names
        }
        return keys, parts | {name: whole[name] for name in INDEX} | {"count": count}

    def read(self, name: str, entry: Tree, count: Array, slots: int) -> Array:
        """The entry [batch, slots, heads, width] of `count` [batch] tokens."""
        codes = Quantised(entry["code"], entry["scale"], entry["minimum"])
        coded = dequantise(codes, self.bits, self.group_size, 3 if name == "v" else 1)
        coded = jnp.pad(coded, ((0, 0), (0, slots - coded.shape[1]), (0, 0), (0, 0)))
        slot = jnp.arange(slots)
        whole = slot >= self.coded(name, count)[:, None]
        return jnp.where(whole[..., None, None], entry["tail"][:, slot % self.residual], coded)

    def write(
        self, name: str, entry: Tree, whole: Array, start: Array, count: Array, added: int
    ) -> Tree:
        """The entry when at most `added` tokens have brought it from `start` to `count` [batch];
        `whole` [batch, slots, heads, width] holds what now needs codes, and the tail."""
        rows, size = jnp.arange(len(start))[:, None], self.residual
        newest = count[:, None] - 1
        tail = newest - (newest - jnp.arange(size)) % size  # the newest token of every place
        out = entry | {"tail": whole[rows, jnp.maximum(tail, 0)]}
        if not entry["code"].size:
            return out
        # of values as many as came, of keys whole tails
        width, axis = (added, 3) if name == "v" else ((added + size - 1) // size * size, 1)
        first, end = jnp.maximum(self.coded(name, start), 0), self.coded(name, count)
        some = whole[rows, jnp.minimum(first[:, None] + jnp.arange(width), whole.shape[1] - 1)]
        codes = quantise(some, self.bits, self.group_size, axis, entry["scale"].dtype)
        for part, x in codes._asdict().items():
            tokens = width // x.shape[1]  # that one row of this part describes
            row = first[:, None] // tokens + jnp.arange(x.shape[1])
            row = jnp.where(row * tokens < end[:, None], row, entry[part].shape[1])
            out[part] = entry[part].at[rows, row].set(x, mode="drop")
        return out


def goes_on(cache: Tree, new: Tree) -> Array:
    """Whether the document of the newest slot is also that of the newest token: bool [batch]."""
    if "segment" not in new:
        return jnp.ones(len(new["position"]), bool)
    last = jnp.maximum(cache["count"] - 1, 0)[:, None]
    segment = jnp.take_along_axis(cache["segment"], last, 1)
    real = new["position"] >= 0
    return (alive(new) & (new["segment"] == segment)).any(1) | ~real.any(1)
