"""Rows for next-token prediction: windows of a corpus, shuffled, batched, split over processes."""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from bestiary.layers.base import Layer, Param, Tree
from bestiary.train.corpus import Corpus, read_corpus
from bestiary.train.dataset import Batch, Dataset, Loaded, ahead, local_rows, of_epochs
from bestiary.train.tasks import is_task, read_task
from bestiary.train.tokenizer import Tokenizer, load_tokenizer
from bestiary.zoo.decoder import Decoder

if TYPE_CHECKING:
    import grain

_PROMPT, _SAMPLE = 32, 200  # tokens of the text at the end of a run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Dataset):
    """Text to learn from and how it is cut into batches."""

    unit: ClassVar[str] = "tokens"

    path: str | None = None
    """Text file, folder, .jsonl, .parquet, .array_record or token file (.npy, .bin); this Python's
    own library sources when absent. A synthetic task: recall:facts=4096 (see train/tasks.py)."""
    tokenizer: str = "bytes"
    """Either "bytes" or the path of a Hugging Face tokenizer.json."""
    text_field: str = "text"
    """Field of JSON records, or column of Parquet files, that holds the text."""
    length: int = 256
    """Tokens in a row."""
    batch_size: int = 32
    """Rows in a batch, over all processes."""
    validation_fraction: float = 0.1
    """Share of the tokens, at the end, that is kept for validation."""
    isolate_documents: bool = True
    """Whether the documents that share a row are hidden from each other."""

    def __post_init__(self):
        if self.path == "":
            raise ValueError("data.path='' must name a file or folder")
        if not self.text_field:
            raise ValueError("data.text_field='' must name a field")
        for name in ("length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.validation_fraction <= 1:
            raise ValueError(
                f"data.validation_fraction={self.validation_fraction} must be between 0 and 1"
            )

    @property
    def units(self) -> int:
        return self.batch_size * self.length

    def describe(self) -> str:
        return f"{self.batch_size} sequences of {self.length} tokens"

    def declare(self) -> dict[str, Param]:
        """As `train_iterator` says."""
        names = ("inputs", "targets", "positions", "segment_ids", "weights")
        dtypes = dict.fromkeys(names, jnp.int32) | {"weights": jnp.float32}
        shape = (self.batch_size, self.length)
        return {n: Param(shape, ("batch", "seq"), dtype=dtype) for n, dtype in dtypes.items()}

    def load(self) -> "Text":
        return Text(self, *load(self))


@dataclasses.dataclass(frozen=True, eq=False)
class Text(Loaded):
    """A tokeniser and the corpora to train and to validate on."""

    data: Data
    tokenizer: Tokenizer
    corpus: Corpus
    held_out: Corpus

    @property
    def validation_batches(self) -> int:
        return -(-max(0, len(self.held_out) - 1) // self.data.units)

    def check(self, model: Layer) -> None:
        if not isinstance(model, Decoder):
            raise ValueError(f"model: {type(model).__name__} reads no text; need a language model")
        if self.tokenizer.vocab_size > model.vocab_size:
            raise ValueError(
                f"data.tokenizer: {self.data.tokenizer!r} has {self.tokenizer.vocab_size} tokens; "
                f"need at most the model's vocab_size {model.vocab_size}"
            )

    def train(self, seed: int, index: int = 0, count: int = 1) -> "grain.DatasetIterator[Batch]":
        return train_iterator(self.corpus, self.data, seed, index, count)

    def validation(self, index: int = 0, count: int = 1) -> "grain.IterDataset[Batch]":
        return validation_batches(self.held_out, self.data, index, count)

    def finish(self, run_dir: Path, model: Layer, params: Tree) -> None:
        """Writes samples.txt: the beginning of the held-out text, continued by the model."""
        from bestiary.eval.generate import generate, stream_text
        from bestiary.eval.sampling import Sampling

        assert isinstance(model, Decoder)
        text = self.held_out if len(self.held_out) else self.corpus
        prompt = np.asarray(text.tokens[:_PROMPT], np.int32)
        steps = generate(
            model,
            params,
            prompt[None],
            sampling=Sampling(),
            max_new_tokens=_SAMPLE,
            key=jax.random.key(0),
            eos=self.tokenizer.eos,
        )
        with (run_dir / "samples.txt").open("w", encoding="utf-8") as file:
            stream_text(steps, self.tokenizer, prompt, file)


def load(data: Data) -> tuple[Tokenizer, Corpus, Corpus]:
    """The tokeniser, the training corpus and the validation corpus, which share no token.

    Raises:
      ValueError: naming the field, when a source cannot be used (see `corpus.read_corpus`) or is
        too short for a row of training (`length + 1` tokens) or validation (2 tokens).
    """
    tokenizer = load_tokenizer(data.tokenizer)
    if data.path is not None and is_task(data.path):
        corpus = read_task(data.path, tokenizer, data.length)
    else:
        corpus = read_corpus(data.path, tokenizer, data.text_field)
    train, validation = corpus.split(data.validation_fraction)
    if data.validation_fraction < 1:
        _require(train, data, "training", data.length + 1)
    if data.validation_fraction > 0:
        _require(validation, data, "validation", 2)
    return tokenizer, train, validation


def train_iterator(
    corpus: Corpus, data: Data, seed: int, process_index: int = 0, process_count: int = 1
) -> "grain.DatasetIterator[Batch]":
    """Endless training batches of this process, prepared two ahead by a thread.

    An epoch cuts the corpus into rows of `length` tokens at a random offset and visits them in a
    random order; both follow from `(seed, epoch)`. The batch of step `i` is rows `i * batch_size`
    and on, of which each process makes its own contiguous part.

    Args:
      corpus: at least `length + 1` tokens.
      data: see `Data`.
      seed: of the order, any non-negative integer.
      process_index: which part of each batch to give.
      process_count: number of parts; must divide `batch_size`.

    Returns:
      An iterator over dicts of arrays `[batch_size / process_count, length]`: int32 `inputs`,
      `targets`, `positions` (from 0 in each document), `segment_ids` (1, 2, ... in each row) and
      float32 `weights` (0 where the target is not of the input's document, or not scored).
      `get_state()` is a dict fit for JSON; `set_state()` of it continues with exactly the batch
      that would have come next.

    Raises:
      ValueError: corpus too short, negative seed, or process numbers that do not fit.
    """
    import grain  # takes a second: not for those who only read the configuration

    local = local_rows(data.batch_size, process_index, process_count)
    _require(corpus, data, "training", data.length + 1)
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative")
    last = len(corpus) - data.length - 1
    rows = (len(corpus) - 1) // data.length

    @functools.lru_cache(maxsize=2)
    def epoch_starts(epoch: int) -> np.ndarray:
        random = np.random.default_rng((seed, epoch))
        offset = random.integers(data.length) // corpus.row * corpus.row
        # The row that the offset pushes over the end is moved back to it.
        return np.minimum(random.permutation(rows) * data.length + offset, last)

    def batch(step: int) -> Batch:
        first = step * data.batch_size + process_index * local
        starts = of_epochs(epoch_starts, rows, first, local)
        return cut_rows(corpus, starts, data.length, data.isolate_documents)

    steps = grain.MapDataset.range(sys.maxsize // data.batch_size).map(batch)
    return iter(steps.to_iter_dataset(ahead()))


def validation_batches(
    corpus: Corpus, data: Data, process_index: int = 0, process_count: int = 1
) -> "grain.IterDataset[Batch]":
    """The whole corpus once, in order, as batches like those of `train_iterator`.

    Every token but the first is a target exactly once. Where the corpus ends inside the last row or
    batch, what is missing has token, position and segment 0 and weight 0.

    Returns:
      What can be iterated over any number of times.

    Raises:
      ValueError: fewer than 2 tokens, or process numbers that do not fit.
    """
    import grain

    local = local_rows(data.batch_size, process_index, process_count)
    _require(corpus, data, "validation", 2)
    rows = -(-(len(corpus) - 1) // data.length)

    def batch(step: int) -> Batch:
        first = step * data.batch_size + process_index * local
        starts = np.arange(first, first + local) * data.length
        return cut_rows(corpus, starts, data.length, data.isolate_documents)

    return grain.MapDataset.range(-(-rows // data.batch_size)).map(batch).to_iter_dataset(ahead())


def cut_rows(corpus: Corpus, starts: np.ndarray, length: int, isolate: bool) -> Batch:
    """The rows that begin at `starts` [rows]; padded with weight 0 beyond the corpus's end."""
    column = np.arange(length + 1)
    at = starts[:, None] + column
    inside = at < len(corpus)
    tokens = np.where(inside, corpus.tokens[np.minimum(at, len(corpus) - 1)], 0)
    segments, positions = inside.astype(np.int32), np.where(inside, column, 0)
    if isolate:
        # Documents that begin inside a row, after its first token, as (row, column) pairs.
        first = np.searchsorted(corpus.starts, starts, side="right")
        count = np.searchsorted(corpus.starts, starts + length, side="right") - first
        row = np.repeat(np.arange(len(starts)), count)
        document = np.arange(count.sum()) + np.repeat(first - np.cumsum(count) + count, count)
        begins = np.zeros(at.shape, np.int32)
        begins[row, corpus.starts[document] - starts[row]] = 1
        segments *= 1 + np.cumsum(begins, axis=1, dtype=np.int32)
        positions -= np.where(inside, np.maximum.accumulate(begins * column, axis=1), 0)
    counted = inside[:, 1:] & (segments[:, 1:] == segments[:, :-1])
    if corpus.scored is not None:
        counted &= corpus.scored[np.minimum(at[:, 1:], len(corpus) - 1)]
    return {
        "inputs": tokens[:, :-1].astype(np.int32),
        "targets": tokens[:, 1:].astype(np.int32),
        "positions": positions[:, :-1].astype(np.int32),
        "segment_ids": segments[:, :-1].astype(np.int32),
        "weights": counted.astype(np.float32),
    }


def _require(corpus: Corpus, data: Data, use: str, least: int) -> None:
    if len(corpus) < least:
        raise ValueError(
            f"data.path={data.path!r}: {len(corpus)} tokens for {use}, but at least {least} are "
            f"needed with data.length={data.length}, "
            f"data.validation_fraction={data.validation_fraction}"
        )
