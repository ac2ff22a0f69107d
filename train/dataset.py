"""The contract of data: what an experiment learns from, whatever it is, as batches of one shape.

Also its plain form, rows of arrays in memory, shuffled anew in every epoch.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from bestiary.layers.base import Layer, Param, Tree

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]


class Dataset:
    """The base of data classes: frozen dataclasses that say what is read and how it is batched."""

    unit: ClassVar[str] = "rows"
    """What speeds count."""
    batch_size: int
    """Rows in a batch, over all processes."""
    length: int = 1
    """Of a row, where models cost more for longer ones."""

    @property
    def units(self) -> int:
        """How many `unit` a batch holds."""
        return self.batch_size

    def describe(self) -> str:
        """What a batch is, for people."""
        return f"{self.units} {self.unit}"

    def declare(self) -> dict[str, Param]:
        """The arrays of a batch over all processes; the first axis of each is "batch"."""
        raise NotImplementedError

    def load(self) -> "Loaded":
        """Raises ValueError, naming field or file, for what cannot be read or used."""
        raise NotImplementedError

    def elsewhere(self, path: str) -> Self:
        """The same of what is at another path, all of it for validation where that is a choice."""
        fields = {f.name for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        changes: dict[str, Any] = {"path": path, "validation_fraction": 1.0}
        changes = {name: value for name, value in changes.items() if name in fields}
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


class Loaded:
    """The base of what `Dataset.load` returns: a part to train on and a part to validate on."""

    @property
    def validation_batches(self) -> int:
        """How many batches the validation part makes; 0: there is none."""
        raise NotImplementedError

    def check(self, model: Layer) -> None:
        """Raises ValueError for a model that cannot read these batches."""

    def train(self, seed: int, index: int = 0, count: int = 1) -> "grain.DatasetIterator[Batch]":
        """Endless batches in an order that follows from `seed`: part `index` of `count` of each.

        `get_state()` is a dict fit for JSON; `set_state()` of it continues with exactly the batch
        that would have come next.
        """
        raise NotImplementedError

    def validation(self, index: int = 0, count: int = 1) -> "grain.IterDataset[Batch]":
        """The whole validation part once, in order; "weights" are 0 where rows are missing."""
        raise NotImplementedError

    def finish(self, run_dir: Path, model: Layer, params: Tree) -> None:
        """Leaves in the directory of a finished run what shows more than figures do."""


@dataclass(frozen=True, eq=False)
class Table(Loaded):
    """Rows [n, ...] of several arrays, alike in n."""

    data: Dataset
    training_rows: Batch
    validation_rows: Batch

    @property
    def draws(self) -> int:
        """How many random numbers `vary` takes for a row; 0 where rows do not vary."""
        return 0

    @property
    def validation_batches(self) -> int:
        return -(-_rows(self.validation_rows) // self.data.batch_size)

    def vary(self, rows: Batch, draws: np.ndarray) -> Batch:
        """Rows as an epoch shows them, by numbers [rows, draws] between 0 and 1."""
        del draws
        return rows

    def prepare(self, rows: Batch) -> Batch:
        """Rows as the model reads them."""
        return rows

    def train(self, seed: int, index: int = 0, count: int = 1) -> "grain.DatasetIterator[Batch]":
        """Every epoch visits all rows in an order of its own; a batch may reach into the next."""
        import grain  # takes a second: not for those who only read the configuration

        size, n = self.data.batch_size, _rows(self.training_rows)
        local = local_rows(size, index, count)
        if not n:
            raise ValueError("data: all of it is for validation; need some to train on")

        @functools.lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng((seed, epoch)).permutation(n)

        def batch(step: int) -> Batch:
            at = of_epochs(order, n, step * size + index * local, local)
            rows = {name: x[at] for name, x in self.training_rows.items()}
            if self.draws:  # for the whole batch, so that the number of processes changes nothing
                draws = np.random.default_rng((seed, step, self.draws)).random((size, self.draws))
                rows = self.vary(rows, draws[index * local :][:local])
            return self.prepare(rows) | {"weights": np.ones(local, np.float32)}

        steps = grain.MapDataset.range(sys.maxsize // size).map(batch)
        return iter(steps.to_iter_dataset(ahead()))

    def validation(self, index: int = 0, count: int = 1) -> "grain.IterDataset[Batch]":
        import grain

        size, n = self.data.batch_size, _rows(self.validation_rows)
        local = local_rows(size, index, count)

        def batch(step: int) -> Batch:
            at = np.arange(local) + step * size + index * local
            rows = {name: x[np.minimum(at, n - 1)] for name, x in self.validation_rows.items()}
            return self.prepare(rows) | {"weights": (at < n).astype(np.float32)}

        steps = grain.MapDataset.range(self.validation_batches)
        return steps.map(batch).to_iter_dataset(ahead())


def local_rows(batch_size: int, index: int, count: int) -> int:
    """How many rows of a batch each of `count` processes makes. Raises ValueError where they do not
    divide."""
    if batch_size % count:
        raise ValueError(
            f"data.batch_size={batch_size} must be a multiple of the {count} processes"
        )
    if not 0 <= index < count:
        raise ValueError(f"process_index={index} must be below {count}")
    return batch_size // count


def of_epochs(order: Callable[[int], np.ndarray], n: int, first: int, count: int) -> np.ndarray:
    """`count` entries from `first` on of the endless series order(0), order(1), ..., [n] each."""
    epochs, place = np.divmod(np.arange(first, first + count), n)
    return np.concatenate(
        [order(epoch)[place[epochs == epoch]] for epoch in range(epochs[0], epochs[-1] + 1)]
    )


def ahead() -> "grain.ReadOptions":
    """Two batches are prepared ahead, by a thread."""
    import grain

    return grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


def _rows(rows: Batch) -> int:
    return len(next(iter(rows.values())))
