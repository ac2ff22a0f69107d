"""Static sparsity of attention: which keys a query may see, as small objects that compose.

A mask says for a query and a key, by their positions, whether the query sees the key, and for
rectangles of positions whether some or all of these pairs are visible, from which the blocks that
need no work follow without an array [T, S]. Masks combine by `&`, `|` and `~`; they are frozen and
hashable. What differs from row to row, such as documents, are arguments of the operation; in rows
of several documents, masks that are not `relative` need positions that restart with each.

    Causal() & (Window(1024) | Sinks(4))
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

Positions = Any  # int32 arrays that broadcast, of NumPy or jax.numpy


class Rectangles(NamedTuple):
    """Ranges of positions, ends included: int arrays that broadcast; of jax.numpy, which has no
    static values, the queries are single ones: `q_first` is `q_last`."""

    q_first: Positions
    q_last: Positions
    kv_first: Positions
    kv_last: Positions

    @property
    def distances(self) -> tuple[Positions, Positions]:
        """The smallest and the largest query minus key; all between occur."""
        return self.q_first - self.kv_last, self.q_last - self.kv_first


class Mask:
    """The base of masks."""

    @property
    def relative(self) -> bool:
        """Whether a pair's visibility follows from query minus key alone."""
        return False

    def __call__(self, q: Positions, kv: Positions) -> Any:
        """Whether queries at `q` see keys at `kv`: bool, elementwise."""
        raise NotImplementedError

    def some_all(self, at: Rectangles) -> tuple[Any, Any]:
        """Whether some, and whether all pairs of each rectangle are visible.

        Exact for the masks below; a combination may say "some" where there are none and "not all"
        where there are all, never the reverse.
        """
        raise NotImplementedError

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)

    def __invert__(self) -> "Mask":
        return Not(self)


@dataclass(frozen=True)
class And(Mask):
    left: Mask
    right: Mask

    @property
    def relative(self) -> bool:
        return self.left.relative and self.right.relative

    def __call__(self, q: Positions, kv: Positions) -> Any:
        return self.left(q, kv) & self.right(q, kv)

    def some_all(self, at: Rectangles) -> tuple[Any, Any]:
        (some, all_), (other_some, other_all) = self.left.some_all(at), self.right.some_all(at)
        return some & other_some, all_ & other_all


@dataclass(frozen=True)
class Or(Mask):
    left: Mask
    right: Mask

    @property
    def relative(self) -> bool:
        return self.left.relative and self.right.relative

    def __call__(self, q: Positions, kv: Positions) -> Any:
        return self.left(q, kv) | self.right(q, kv)

    def some_all(self, at: Rectangles) -> tuple[Any, Any]:
        (some, all_), (other_some, other_all) = self.left.some_all(at), self.right.some_all(at)
        return some | other_some, all_ | other_all


@dataclass(frozen=True)
class Not(Mask):
    mask: Mask

    @property
    def relative(self) -> bool:
        return self.mask.relative

    def __call__(self, q: Positions, kv: Positions) -> Any:
        return ~self.mask(q, kv)

    def some_all(self, at: Rectangles) -> tuple[Any, Any]:
        some, all_ = self.mask.some_all(at)
        return ~all_, ~some


@dataclass(frozen=True)
class Full(Mask):
    """Every key, later ones too."""

    @property
    def relative(self) -> bool:
        return True

    def __call__(self, q: Positions, kv: Positions) -> Any:
        return (q == q) & (kv == kv)

    def some_all(self, at: Rectangles) -> tuple[Any, Any]:
        everywhere = at.distances[0] == at.distances[0]
        return everywhere, everywhere


@dataclass(frozen=True)
class Causal(Mask):
    """The query's own key and earlier ones."""

    @property
    def relative(self) -> bool:
        return True

    def __call__(self, q: Positions, kv: Positions) -> Any:
        return q >= kv

    def some_all(self, at: Rectangles) -> tuple[Any, Any]:
        least, most = at.distances
        return most >= 0, least >= 0


@dataclass(frozen=True)
class Window(Mask):
    """Keys nearer than `size`, on both sides: causal, `size` keys with the query's own."""

    size: int

    def __post_init__(self) -> None:
        _positive(window=self.size)

    @property
    def relative(self) -> bool:
        return True

    def __call__(self, q: Positions, kv: Positions) -> Any:
        return (q - kv < self.size) & (kv - q < self.size)

    def some_all(self, at: Rectangles) -> tuple[Any, Any]:
        least, most = at.distances
        some = (least < self.size) & (most > -self.size)
        return some, (most < self.size) & (least > -self.size)


@dataclass(frozen=True)
class Chunked(Mask):
    """Keys of the query's own chunk of `size` positions (Llama 4) and of `neighbours` chunks on
    either side."""

    size: int
    neighbours: int = 0

    def __post_init__(self) -> None:
        _positive(size=self.size)
        if self.neighbours < 0:
            raise ValueError(f"neighbours: {self.neighbours}; need at least 0")

    def __call__(self, q: Positions, kv: Positions) -> Any:
        return self._window(q // self.size, kv // self.size)

    def some_all(self, at: Rectangles) -> tuple[Any, Any]:
        return self._window.some_all(Rectangles(*(end // self.size for end in at)))

    @property
    def _window(self) -> Window:
        return Window(self.neighbours + 1)


@dataclass(frozen=True)
class Strided(Mask):
    """Keys at multiples of `stride` from the query; with a window, a dilated window."""

    stride: int

    def __post_init__(self) -> None:
        _positive(stride=self.stride)

    @property
    def relative(self) -> bool:
        return True

    def __call__(self, q: Positions, kv: Positions) -> Any:
        return (q - kv) % self.stride == 0

    def some_all(self, at: Rectangles) -> tuple[Any, Any]:
        least, most = at.distances
        some = most // self.stride * self.stride >= least
        return some, some & ((least == most) | (self.stride == 1))


@dataclass(frozen=True)
class Sinks(Mask):
    """The first `num` keys (StreamingLLM, arXiv 2309.17453)."""

    num: int

    def __post_init__(self) -> None:
        _positive(num=self.num)

    def __call__(self, q: Positions, kv: Positions) -> Any:
        return (q == q) & (kv < self.num)

    def some_all(self, at: Rectangles) -> tuple[Any, Any]:
        everywhere = at.q_first == at.q_first
        return everywhere & (at.kv_first < self.num), everywhere & (at.kv_last < self.num)


@dataclass(frozen=True)
class Global(Mask):
    """Tokens at `positions` see all keys and are seen by all queries (Longformer)."""

    positions: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.positions or min(self.positions) < 0:
            raise ValueError(f"positions: {self.positions}; need one or more, none negative")

    def __call__(self, q: Positions, kv: Positions) -> Any:
        def chosen(x: Positions) -> Any:
            found = x != x
            for first, last in self._runs():
                found = found | ((x >= first) & (x <= last))
            return found

        return chosen(q) | chosen(kv)

    def some_all(self, at: Rectangles) -> tuple[Any, Any]:
        def chosen(first: Positions, last: Positions) -> tuple[Any, Any]:
            some = all_ = first != first
            for start, end in self._runs():
                some = some | ((first <= end) & (last >= start))
                all_ = all_ | ((first >= start) & (last <= end))
            return some, all_

        of_q, of_kv = chosen(at.q_first, at.q_last), chosen(at.kv_first, at.kv_last)
        return of_q[0] | of_kv[0], of_q[1] | of_kv[1]

    def _runs(self) -> list[tuple[int, int]]:
        positions = np.unique(self.positions)
        runs = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
        return [(int(run[0]), int(run[-1])) for run in runs]


@dataclass(frozen=True)
class RandomBlocks(Mask):
    """Per block of `block` queries, `num` blocks of keys at random, always the same ones.

    They are drawn among the earlier blocks or, where `length` is given, among all of that length:
    one from each of `num` equal parts, so that none is drawn twice. Where there are fewer blocks
    than parts, those that are there may be missed.
    """

    block: int
    num: int
    seed: int = 0
    length: int | None = None

    def __post_init__(self) -> None:
        _positive(block=self.block, num=self.num, length=self.length)

    def __call__(self, q: Positions, kv: Positions) -> Any:
        block, found = kv // self.block, (q != q) & (kv != kv)
        for chosen, there in self._drawn(q // self.block):
            found = found | (there & (block == chosen))
        return found

    def some_all(self, at: Rectangles) -> tuple[Any, Any]:
        q_first, q_last, kv_first, kv_last = (end // self.block for end in at)
        single = at.q_first is at.q_last
        steps = 0 if single else int((q_last - q_first).max(initial=0))
        some = (q_first != q_first) & (kv_first != kv_first)
        all_ = ~some
        for step in range(steps + 1):
            block = q_first if single else np.minimum(q_first + step, q_last)
            hits = 0
            for chosen, there in self._drawn(block):
                hits = hits + (there & (kv_first <= chosen) & (chosen <= kv_last))
            some, all_ = some | (hits > 0), all_ & (hits > kv_last - kv_first)
        return some, all_

    def _drawn(self, block: Positions) -> Any:
        """Per part: which block of keys, and whether there is one, for blocks of queries."""
        blocks = block if self.length is None else -(-self.length // self.block)
        for part in range(self.num):
            first, end = blocks * part // self.num, blocks * (part + 1) // self.num
            size = end - first
            number = _scrambled(block, self.seed * self.num + part)
            yield first + number % (size * (size > 0) + (size < 1)), size > 0


CAUSAL = Causal()


def longformer(window: int, global_tokens: tuple[int, ...] = (0,), dilation: int = 1) -> Mask:
    """Longformer (arXiv 2004.05150): `window` keys, half on each side, and global tokens.

    With a dilation d, every d-th of `window` d keys. Causal: `Causal() & longformer(...)`.
    """
    near: Mask = Window(window // 2 * dilation + 1)
    if dilation > 1:
        near &= Strided(dilation)
    return near | Global(global_tokens)


def big_bird(length: int, block: int = 64, num_random: int = 3, seed: int = 0) -> Mask:
    """BigBird (arXiv 2007.14062): neighbouring, random, and the first and last blocks as global.

    Drawn as RandomBlocks says; random blocks may be the neighbouring or global ones.
    """
    last = (length - 1) // block * block
    ends = (*range(min(block, length)), *range(last, length))
    near = Chunked(block, neighbours=1)
    return near | RandomBlocks(block, num_random, seed, length) | Global(ends)


def causal_big_bird(block: int = 64, num_random: int = 3, seed: int = 0) -> Mask:
    """BigBird for decoders, for which the paper has no form: the block before, `num_random` earlier
    blocks and the first one."""
    near = Chunked(block, neighbours=1) | Sinks(block)
    return Causal() & (near | RandomBlocks(block, num_random, seed))


def streaming(window: int, sinks: int = 4) -> Mask:
    """StreamingLLM (arXiv 2309.17453): the last `window` keys and the first `sinks`."""
    return Causal() & (Window(window) | Sinks(sinks))


def alternating(layer: int, window: int, every: int = 2) -> Mask:
    """Sliding windows with every `every`-th layer global (Gemma 2: 2, Gemma 3: 6)."""
    _positive(every=every)
    return Causal() if layer % every == every - 1 else Causal() & Window(window)


def seen_keys(mask: Mask, length: int, limit: int | None = None) -> float:
    """Keys that a query sees (at most `limit`), averaged over the positions of a whole row.

    Exact for causal rows and windows; of other masks see `visible_pairs`, and a limit bounds the
    average.
    """
    window = causal_window(mask, length)
    if window is None:
        return min(visible_pairs(mask, length) / length, limit or length)
    window = min(window, limit or length)
    return window - window * (window - 1) / (2 * length)


def causal_window(mask: Mask, length: int) -> int | None:
    """How many keys of `length` a mask shows that is causal or a causal window; of others None."""
    match mask:
        case Causal():
            return length
        case And(Causal(), Window(size)):
            return min(size, length)
    return None


@cache
def live_blocks(mask: Mask, length: int, keys: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a block of `length` queries and one of `keys` keys, int32 [pairs, 2] in order of
    queries: those fully and those partly visible, as which a block of keys counts that ends early.
    """
    q, kv = np.arange(0, length, block)[:, None], np.arange(0, keys, block)[None]
    ends = np.minimum(q + block, length) - 1, np.minimum(kv + block, keys) - 1
    some, all_ = mask.some_all(Rectangles(q, ends[0], kv, ends[1]))
    all_ = all_ & (kv + block <= keys)
    full, partly = (np.argwhere(live).astype(np.int32) for live in (all_, some & ~all_))
    return full, partly


@cache
def num_live(mask: Mask, length: int, block: int) -> int:
    """How many pairs `live_blocks` has of a whole row, which may be too long to list them."""
    whole, q, _ = _rectangles(mask, length, block)
    return int((-(-whole // block)).prod(1).sum()) + len(q)


@cache
def visible_pairs(mask: Mask, length: int, sampled: int = 4096) -> float:
    """How many of the `length` x `length` pairs are visible: exact, unless there are more than
    `sampled` rectangles of 64 x 64 that are partly visible, of which then as many, evenly spread,
    stand for all."""
    whole, q, kv = _rectangles(mask, length, 64)
    total = int(whole.prod(1).sum())
    number = len(q)
    if number > sampled:
        chosen = np.linspace(0, number - 1, sampled).astype(int)
        q, kv = q[chosen], kv[chosen]
    inner = np.arange(64)
    seen = 0
    for first_q, first_kv in zip(q, kv, strict=True):
        rows, columns = first_q + inner, first_kv + inner
        rows, columns = rows[rows < length], columns[columns < length]
        seen += int(mask(rows[:, None], columns[None]).sum())
    return total + seen * (number / max(len(q), 1))


def _rectangles(mask: Mask, length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a whole row, heights and widths [n, 2] of rectangles that are visible, and the corners of
    the squares of `size` that partly are; together they hold all visible pairs."""
    end, found = size, []
    while size < length:
        size *= 2
    q = kv = np.zeros(1, int)
    while True:
        last = np.minimum(q + size, length) - 1, np.minimum(kv + size, length) - 1
        some, all_ = mask.some_all(Rectangles(q, last[0], kv, last[1]))
        found.append(np.stack((last[0] - q + 1, last[1] - kv + 1), 1)[all_])
        q, kv = q[some & ~all_], kv[some & ~all_]
        if size == end:
            return np.concatenate(found), q, kv
        size //= 2
        quarter = np.array([0, 0, size, size]), np.array([0, size, 0, size])
        q, kv = ((x[:, None] + d).ravel() for x, d in zip((q, kv), quarter, strict=True))
        inside = (q < length) & (kv < length)
        q, kv = q[inside], kv[inside]


def _scrambled(x: Positions, seed: int) -> Any:
    """A number of 31 bits per entry of x that looks random (the finaliser of MurmurHash 3)."""
    with np.errstate(over="ignore"):
        x = (x + 1).astype(np.uint32) * np.uint32(0x9E3779B1)
        x = x ^ np.uint32((seed + 1) * 0x85EBCA77 % 2**32)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
        return ((x ^ (x >> np.uint32(16))) >> np.uint32(1)).astype(np.int32)


def _positive(**fields: int | None) -> None:
    for name, value in fields.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value}; need at least 1")
