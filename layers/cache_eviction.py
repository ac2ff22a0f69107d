"""Cache policies that keep what attention asks for: H2O and SnapKV, with keys chosen per head.

Slots are in the order of their tokens, empty ones first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax.numpy as jnp

from bestiary.layers.base import Array, Param, Tree, constant, positive
from bestiary.layers.cache import INDEX, CachePolicy, Received, alive, declare, no_window
from bestiary.layers.kv_selection import Pooling, best, heavy_hitters, newer, snap

Heads = Literal["kv", "query"]


@dataclass(frozen=True, kw_only=True)
class Evicting(CachePolicy):
    """What H2O and SnapKV share."""

    heads: Heads = "kv"
    """Whose keys are chosen: a key-value head's, by the mean over the query heads that share it, or
    each query head's own, as in the papers, which then stores keys and values once per query head.
    """

    def __post_init__(self) -> None:
        if self.heads not in get_args(Heads):
            raise ValueError(f"heads: {self.heads!r}; need one of {', '.join(get_args(Heads))}")

    @property
    def most(self) -> int:
        """Tokens that it keeps."""
        raise NotImplementedError

    def slots(self, length: int, window: int | None) -> int:
        no_window(self, window)
        return min(length, self.most)

    def attended(self, length: int) -> int:
        return min(length, self.most + 1)  # it evicts behind the call

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
        if self.heads == "query":
            entries = {name: replace(p, shape=(heads, *p.shape[1:])) for name, p in entries.items()}
        slots = self.slots(length, window)
        head = next(iter(entries.values()))
        index = (batch, head.shape[0], slots), ("batch", head.axes[0], None)
        spec = declare(entries, batch, slots, dtype)
        return spec | dict.fromkeys(INDEX, Param(*index, constant(-1), jnp.int32))

    def update(
        self, cache: Tree, new: Tree, received: Received, window: int | None = None
    ) -> tuple[Tree, Tree]:
        del window
        both = side_by_side(cache, new)
        keys = both
        if cache["position"].shape[1] == 1:  # one choice for all heads needs no positions by head
            keys = both | {name: both[name][:, 0] for name in INDEX}
        return keys, self.evict(both, cache, new, received)

    def evict(self, both: Tree, cache: Tree, new: Tree, received: Received) -> Tree:
        """The next cache, of the slots and the new tokens side by side."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class H2O(Evicting):
    """Heavy hitters (Zhang et al. 2023, arXiv 2306.14048), the streaming form: the newest `recent`
    tokens and, of those before, the `heavy` that have received most attention while in the cache.

    A call attends to the cache and its own tokens; then it evicts.
    """

    heavy: int = 128
    recent: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(heavy=self.heavy, recent=self.recent)

    @property
    def most(self) -> int:
        return self.heavy + self.recent

    def spec(self, *args: Any, **options: Any) -> Tree:
        spec = super().spec(*args, **options)
        index = spec["position"]
        return spec | {"score": Param(index.shape, index.axes)}

    def evict(self, both: Tree, cache: Tree, new: Tree, received: Received) -> Tree:
        slots = cache["score"].shape[-1]
        score = received(both).mean(2).at[..., :slots].add(cache["score"])
        recent = min(self.recent, slots)
        kept = heavy_hitters(score, of_document(both, new), slots - recent, recent)
        return take(both | {"score": score}, kept)


@dataclass(frozen=True, kw_only=True)
class SnapKV(Evicting):
    """SnapKV (Li et al. 2024, arXiv 2404.14469): what a prompt's end looks at is what its answer
    needs.

    A call of several tokens leaves `capacity` behind: its last `window` and, of those before, the
    ones that these attended to most, pooled over `kernel` neighbours. Single tokens are added; from
    the `room` + 1st on, the oldest of them makes place.
    """

    capacity: int = 256
    window: int = 32
    kernel: int = 5
    pooling: Pooling = "avg"
    room: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(window=self.window, kernel=self.kernel, room=self.room)
        if self.capacity < self.window:
            raise ValueError(f"capacity: {self.capacity}; need at least window {self.window}")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel: {self.kernel}; need an odd number")
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"pooling: {self.pooling!r}; need {' or '.join(get_args(Pooling))}")

    @property
    def most(self) -> int:
        return self.capacity + self.room

    def evict(self, both: Tree, cache: Tree, new: Tree, received: Received) -> Tree:
        real = of_document(both, new)
        slots = cache["position"].shape[-1]
        if new["position"].shape[1] == 1:
            oldest = jnp.arange(slots + 1) == min(self.capacity, slots)
            return take(both, best(jnp.where(oldest, 0.0, 1.0), real, slots))
        capacity = min(self.capacity, slots)
        before = real & (newer(real) >= self.window)
        seen = jnp.where(before, received(both, self.window).mean(2), 0)
        score = jnp.where(before, snap(seen, self.kernel, self.pooling), jnp.inf)
        return pad(take(both, best(score, real, capacity)), slots - capacity)


def side_by_side(cache: Tree, new: Tree) -> Tree:
    """Slots and new tokens, those repeated for every head that keeps keys of its own: entries
    [batch, S, heads, width], position and segment [batch, heads, S]."""
    shape = cache["position"].shape
    new = {"segment": jnp.zeros_like(new["position"])} | new
    both = {}
    for name, old in cache.items():
        if name in INDEX:
            added = jnp.broadcast_to(new[name][:, None], (*shape[:2], new[name].shape[1]))
            both[name] = jnp.concatenate((old, added), -1)
        elif name in new:
            added = jnp.repeat(new[name], old.shape[2] // new[name].shape[2], 2)
            both[name] = jnp.concatenate((old, added.astype(old.dtype)), 1)
    return both


def of_document(both: Tree, new: Tree) -> Array:
    """Which keys can still be seen: bool [batch, heads, S]."""
    return alive({name: both[name] for name in INDEX if name in new})


def take(keys: Tree, index: Array) -> Tree:
    """The keys at `index` [batch, heads, kept]."""
    slots = index.swapaxes(1, 2)[..., None]
    return {
        name: jnp.take_along_axis(x, *((slots, 1) if x.ndim == 4 else (index, 2)))
        for name, x in keys.items()
    }


def pad(keys: Tree, slots: int) -> Tree:
    """Puts empty slots in front."""
    return {
        name: jnp.pad(
            x,
            ((0, 0), (slots, 0), (0, 0), (0, 0)) if x.ndim == 4 else ((0, 0), (0, 0), (slots, 0)),
            constant_values=-1 if name in INDEX else 0,
        )
        for name, x in keys.items()
    }
