"""What a token mixer keeps of past tokens: cache policies behind one interface, and the exact ones.

A cache is a dict of entries [batch, slots, heads, width], such as "k" and "v", beside the int32
"position" (-1: an empty slot) and "segment" of every slot [batch, slots], or [batch, heads, slots]
where heads keep different tokens. What a call brings has the same names, with tokens for slots.

Positions may restart with a document: entries of a document that has ended are never seen again,
and make place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from bestiary.kernels.attention.masks import CAUSAL, Mask
from bestiary.kernels.chunks import runs
from bestiary.layers.base import Array, Param, Tree, constant, positive

INDEX = ("position", "segment")
Received = Callable[..., Array]
"""(keys, last=None) -> float32 [batch, heads, queries per head, S]: the attention that keys, as
`CachePolicy.update` returns them, receive from the queries of this call, or from the `last` newest
of every row."""


@dataclass(frozen=True, kw_only=True)
class CachePolicy:
    """What stays in the cache when it would grow beyond its slots."""

    complete: ClassVar[bool] = False
    """Whether that is every token, up to `length` or a window."""

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
        """Declares the cache for `length` tokens.

        `entries` says what a token brings, [heads, width] each; `heads` counts the queries'. Raises
        ValueError where the policy cannot serve.
        """
        del heads
        slots = self.slots(length, window)
        return declare(entries, batch, slots, dtype) | index_spec(batch, slots)

    def slots(self, length: int, window: int | None) -> int:
        """How many tokens it keeps of `length`. Raises ValueError beside a `window` it ignores."""
        raise NotImplementedError

    def attended(self, length: int) -> int:
        """How many of `length` tokens the last one attends to, itself included, read alone."""
        return self.slots(length, None)

    def update(
        self, cache: Tree, new: Tree, received: Received, window: int | None = None
    ) -> tuple[Tree, Tree]:
        """(what the queries of this call attend to, the cache behind it).

        Tokens at negative positions are padding and are not stored. `new` lacks "segment" where
        there is but one document.
        """
        raise NotImplementedError

    def moved(self, keys: Tree, rotate: Callable[[Array, Array], Array]) -> Tree:
        """What queries see, with "k" where its positions should be: `rotate` turns keys [batch, S,
        heads, width] by as many positions [batch, S]."""
        del rotate
        return keys


@dataclass(frozen=True, kw_only=True)
class Full(CachePolicy):
    """Everything, or with a window of w keys the newest w: position p is in slot p mod w."""

    complete = True

    def slots(self, length: int, window: int | None) -> int:
        return min(length, window or length)

    def update(
        self, cache: Tree, new: Tree, received: Received | None = None, window: int | None = None
    ) -> tuple[Tree, Tree]:
        del received
        slots = cache["position"].shape[1]
        stays, age = newest_first(new)
        stored = put(cache, new, jnp.where(stays & (age < slots), new["position"] % slots, slots))
        # would a token overwrite what an earlier one of the same call still sees?
        overwrites = new["position"].shape[1] > 1 and (window is not None or "segment" in new)
        return extend(cache, new) if overwrites else stored, stored


@dataclass(frozen=True, kw_only=True)
class SinksWindow(CachePolicy):
    """StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): the first `sinks` tokens of a document and
    the newest `window`.

    Exact for a mixer whose mask lets a query see no others and positions in the text. Otherwise the
    tokens of one call see all of each other.
    """

    sinks: int = 4
    window: int = 252
    in_cache: bool = False
    """Whether positions count what is seen without gaps, as in the paper, so that no distance
    exceeds the cache and a call; else they are those in the text."""

    def __post_init__(self) -> None:
        positive(sinks=self.sinks, window=self.window)

    def slots(self, length: int, window: int | None) -> int:
        no_window(self, window)
        return min(length, self.sinks + self.window)

    def update(
        self, cache: Tree, new: Tree, received: Received | None = None, window: int | None = None
    ) -> tuple[Tree, Tree]:
        del received, window
        slots, position = cache["position"].shape[1], new["position"]
        stays, age = newest_first(new)
        first = position < self.sinks
        slot = jnp.where(first, position, self.sinks + (position - self.sinks) % self.window)
        stored = put(cache, new, jnp.where(stays & (first | (age < self.window)), slot, slots))
        return stored if position.shape[1] == 1 else extend(cache, new), stored

    def moved(self, keys: Tree, rotate: Callable[[Array, Array], Array]) -> Tree:
        if not self.in_cache:
            return keys
        position, segment = keys["position"][:, None], keys["segment"]
        near = (segment[:, None] == segment[:, : self.sinks, None]) & (position >= self.sinks)
        oldest = jnp.where(near, position, jnp.iinfo(jnp.int32).max).min(-1)
        gap = jnp.where(near.any(-1), oldest - self.sinks, 0)
        sinks = rotate(keys["k"][:, : self.sinks], gap)
        return keys | {"k": keys["k"].at[:, : self.sinks].set(sinks)}


def in_the_text(policy: CachePolicy, mixer: str) -> None:
    """Raises ValueError where a mixer whose keys cannot move has a policy that moves them."""
    if getattr(policy, "in_cache", False):
        raise ValueError(f"cache.in_cache: True; the keys of {mixer} keep their positions")


def declare(entries: Mapping[str, Param], batch: int, slots: int, dtype: Any) -> Tree:
    """Entries [batch, slots, heads, width] of what a token brings, [heads, width] each."""
    return {
        name: Param((batch, slots, *p.shape), ("batch", None, *p.axes), dtype=dtype)
        for name, p in entries.items()
    }


def index_spec(batch: int, slots: int) -> Tree:
    """Position and segment of every slot, which is empty."""
    index = Param((batch, slots), ("batch", None), constant(-1), jnp.int32)
    return dict.fromkeys(INDEX, index)


def no_window(policy: CachePolicy, window: int | None) -> None:
    """Raises ValueError where a mixer with a window has another policy than its ring."""
    if window is not None:
        name = type(policy).__name__
        raise ValueError(f"cache: {name} beside window {window}; need Full, which keeps a window")


def need_complete(policy: CachePolicy, mixer: str) -> None:
    """Raises ValueError where a mixer that chooses among all keys has a policy that drops some."""
    if not policy.complete:
        name = type(policy).__name__
        raise ValueError(f"cache: {name}; {mixer} needs every key, as Full and KIVI keep them")


def tokens(entries: Tree, positions: Array, segments: Array | None) -> Tree:
    """What a call brings: its entries, and where they stand."""
    new = entries | {"position": positions}
    return new if segments is None else new | {"segment": segments}


def where(
    keys: Tree, positions: Array, segments: Array | None, mask: Mask = CAUSAL
) -> dict[str, Any]:
    """How queries at `positions` [batch or 1, T] and `keys` stand, as `attention` takes it; these
    are the tokens' own entries, or what a policy says the queries see."""
    if "position" not in keys:
        at = {"q_segments": segments, "kv_segments": segments}
        if segments is None or mask.relative:
            return at  # order in the row and equal segments say all
        place = jnp.arange(segments.shape[1]) - runs(segments)[1]
        return at | {"q_positions": place, "kv_positions": place}
    at = keys["position"]
    return {
        "q_positions": jnp.broadcast_to(positions, (at.shape[0], positions.shape[1])),
        "kv_positions": at,
        "q_segments": segments,
        "kv_segments": None if segments is None else keys["segment"],
    }


def alive(tokens: Tree) -> Array:
    """Which tokens belong to the document that is going on, that of the last one that is no
    padding: bool [batch, T]."""
    real = tokens["position"] >= 0
    if "segment" not in tokens:
        return real
    last = jnp.where(real, jnp.arange(real.shape[-1]), -1).argmax(-1, keepdims=True)
    return real & (tokens["segment"] == jnp.take_along_axis(tokens["segment"], last, -1))


def newest_first(new: Tree) -> tuple[Array, Array]:
    """Which tokens are alive, and by how many places the newest of them is ahead: [batch, T]."""
    stays = alive(new)
    newest = jnp.where(stays, new["position"], -1).max(1, keepdims=True)
    return stays, newest - new["position"]


def put(cache: Tree, new: Tree, slot: Array) -> Tree:
    """The cache with every token in its `slot` [batch, T]; in none where that is beyond all."""
    rows = jnp.arange(slot.shape[0])[:, None]
    new = {"segment": jnp.zeros_like(new["position"])} | new
    return {
        name: old.at[rows, slot].set(new[name].astype(old.dtype), mode="drop")
        for name, old in cache.items()
    }


def extend(cache: Tree, new: Tree) -> Tree:
    """The slots and the new tokens side by side."""
    new = {"segment": jnp.zeros_like(new["position"])} | new
    return {
        name: jnp.concatenate((old, new[name].astype(old.dtype)), 1) for name, old in cache.items()
    }
