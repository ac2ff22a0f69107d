"""Samples for click models: every prefix of a user's choices, what came next, and what did not."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from bestiary.layers.base import Layer, Param
from bestiary.train.dataset import Batch, Dataset, Table
from bestiary.train.interaction_log import Log, read_log, synthetic_log
from bestiary.zoo.din import DIN


@dataclass(frozen=True, kw_only=True)
class Interactions(Dataset):
    """A log of interactions and how it is cut into batches."""

    unit: ClassVar[str] = "samples"

    path: str | None = None
    """MovieLens file or folder (u.data, ratings.dat, ratings.csv), or a CSV with columns user,
    item, timestamp and perhaps category or genres; a synthetic log when absent."""
    like: str | None = None
    """Another log, whose items and categories the model knows: ids are that log's, and rows about
    other items are left out."""
    length: int = 50
    """Newest choices of a history that a sample keeps."""
    batch_size: int = 32
    """Samples in a batch, over all processes."""
    seed: int = 0
    """Of the negatives, and of the synthetic log."""

    def __post_init__(self) -> None:
        for name in ("path", "like"):
            if getattr(self, name) == "":
                raise ValueError(f"data.{name}='' must name a file or folder")
        if self.like is not None and self.path is None:
            raise ValueError(f"data.like={self.like!r} is for another log; need data.path as well")
        for name in ("length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"data.seed={self.seed} must not be negative")

    def declare(self) -> dict[str, Param]:
        """int32 user, item, category [batch], history, history_category [batch, length]: the newest
        choice last, 0 before the oldest; float32 labels, weights [batch], and how often each id
        occurs in the training samples: item_count and others."""
        row, history = (self.batch_size,), (self.batch_size, self.length)
        declared = {name: Param(row, ("batch",), dtype=jnp.int32) for name in ("user", *IDS[:2])}
        declared |= {name: Param(history, ("batch", "seq"), dtype=jnp.int32) for name in IDS[2:]}
        counts = {f"{n}_count": Param(declared[n].shape, declared[n].axes) for n in IDS}
        return declared | counts | {n: Param(row, ("batch",)) for n in ("labels", "weights")}

    def elsewhere(self, path: str) -> "Interactions":
        if self.path is None:
            raise ValueError(f"data.path={path!r}: the model knows items of the synthetic log only")
        return replace(self, path=path, like=self.like or self.path)

    def load(self) -> "Samples":
        """The samples of Zhou et al. 2018, as the released demo draws them.

        Of a user's choices b_1 .. b_n every b_i from the second on is a positive with the history
        b_1 .. b_(i-1), beside one negative of the items that the user never chose. The last pair of
        each user is for validation, the others for training; a user's only choice gives none.

        Raises:
          ValueError: a log that cannot be read (see `read_log`), a user who has chosen every item,
            or no pair for training or validation.
        """
        if self.path is None:
            log = synthetic_log(seed=self.seed)
        else:
            log = read_log(self.path, None if self.like is None else read_log(self.like))
        source = "the synthetic log" if self.path is None else repr(self.path)
        negatives = draw_negatives(log, np.random.default_rng(self.seed), source)
        first = np.append(True, log.users[1:] != log.users[:-1])
        last = np.append(first[1:], True)
        train, validation = np.flatnonzero(~first & ~last), np.flatnonzero(~first & last)
        if not len(train):
            raise ValueError(f"data.path={source}: no user has 3 interactions, nothing to train on")

        def rows(places: np.ndarray) -> Batch:
            return {
                "place": np.repeat(places, 2),
                "item": np.stack([log.items[places], negatives[places]], 1).reshape(-1),
                "labels": np.tile(np.array([1, 0], np.float32), len(places)),
            }

        counts = _occurrences(log, train, negatives, self.length)
        return Samples(self, rows(train), rows(validation), log, *counts)


IDS = ("item", "category", "history", "history_category")


@dataclass(frozen=True, eq=False)
class Samples(Table):
    """Candidates for places in users' histories. A row: place, the interaction of the log before
    which the candidate is shown; item, the candidate; labels, 1 for what was chosen there."""

    log: Log
    counts: np.ndarray
    """float32 [num_items + 1]: how often an item occurs in the training samples, as candidate or in
    a history."""
    category_counts: np.ndarray
    """float32 [num_categories + 1]."""

    def check(self, model: Layer) -> None:
        if not isinstance(model, DIN):
            raise ValueError(f"model: {type(model).__name__} reads no interactions; need a DIN")
        if model.num_items < self.log.num_items:
            raise ValueError(
                f"model.num_items: {model.num_items}; need at least the log's {self.log.num_items}"
            )
        if 0 < model.num_categories < self.log.num_categories:
            raise ValueError(
                f"model.num_categories: {model.num_categories}; need 0 or at least the log's "
                f"{self.log.num_categories}"
            )

    def prepare(self, rows: Batch) -> Batch:
        """Samples as `Interactions.declare` says, but for the weights."""
        log, place, item = self.log, rows["place"], rows["item"]
        assert isinstance(self.data, Interactions)
        at = place[:, None] + np.arange(-self.data.length, 0)
        user = log.users[place]
        inside = (at >= 0) & (log.users[np.maximum(at, 0)] == user[:, None])
        history = np.where(inside, log.items[np.maximum(at, 0)], 0)
        ids = (item, log.categories[item], history, log.categories[history])
        counts = (self.counts, self.category_counts) * 2
        return (
            {"user": user, "labels": rows["labels"]}
            | dict(zip(IDS, ids, strict=True))
            | {f"{n}_count": c[i] for n, i, c in zip(IDS, ids, counts, strict=True)}
        )


def draw_negatives(log: Log, random: np.random.Generator, source: str) -> np.ndarray:
    """For every interaction an item that its user never chose, all of these equally likely: int32
    [n]."""
    keys = np.unique(log.users.astype(np.int64) * (log.num_items + 1) + log.items)
    chosen = np.bincount(keys // (log.num_items + 1), minlength=log.num_users + 1)
    if (chosen == log.num_items).any():
        user = log.names["user"][int(chosen.argmax()) - 1]
        raise ValueError(f"data.path={source}: user {user!r} has chosen every item; no negative")
    drawn = random.integers(1, log.num_items + 1, len(log.items), dtype=np.int32)
    left = np.arange(len(drawn))
    while len(left):
        key = log.users[left].astype(np.int64) * (log.num_items + 1) + drawn[left]
        at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        left = left[keys[at] == key]
        drawn[left] = random.integers(1, log.num_items + 1, len(left), dtype=np.int32)
    return drawn


def _occurrences(
    log: Log, places: np.ndarray, negatives: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """How often items and categories occur in the samples of `places`, two of each."""
    start = np.maximum.accumulate(
        np.where(np.append(True, log.users[1:] != log.users[:-1]), np.arange(len(log.users)), 0)
    )
    oldest = np.maximum(start[places], places - length)
    # every history is a run of the log: +1 where it begins, -1 behind its end
    change = np.zeros(len(log.users) + 1)
    np.add.at(change, oldest, 1)
    np.add.at(change, places, -1)
    reads = 2 * np.cumsum(change)[:-1]
    reads[places] += 1
    size = log.num_items + 1
    counts = np.bincount(log.items, reads, size) + np.bincount(negatives[places], minlength=size)
    of_category = np.bincount(log.categories, counts, log.num_categories + 1)
    return counts.astype(np.float32), of_category.astype(np.float32)
