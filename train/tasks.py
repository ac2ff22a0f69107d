"""Synthetic tasks with exact scores: can a model look up what it has read, or learned by heart?

    recall:facts=4096               a fixed table of facts, which must be memorised
    recall:pairs=16                 new pairs in every row, then queries about them (in context)
    recall:pairs=16,distance=256    each query 256 or more tokens behind its pair
    needle:                         one key and value in filler, asked for at the end of the row
    copy:symbols=64                 a random string, a separator, and the string again

as `data.path`. Rows consist of letters and digits, filler of punctuation, and only answers are
scored. The recall in context is the multi-query associative recall of Arora et al. 2023 (arXiv
2312.04927), copying that of Jelassi et al. 2024 (arXiv 2402.01032).
"""

import string
from dataclasses import dataclass

import numpy as np

from bestiary.train.corpus import Corpus
from bestiary.train.sources import refuse
from bestiary.train.tokenizer import ByteTokenizer, Tokenizer

SYMBOLS = np.frombuffer((string.ascii_letters + string.digits + "+-").encode(), np.uint8)
"""64 bytes that keys and values consist of: guessing is right 1.6 % of the time."""
FILLER = np.frombuffer(b" .,:;!?'\"()[]/*&", np.uint8)
_BLANK = ord("\n")  # fills a row up
_SEPARATOR = ord("=")
_WIDEST = 4  # symbols of a key: 16.8M facts

Rows = tuple[np.ndarray, np.ndarray]
"""Of all rows: the tokens, uint8 [rows, length], and bool, which of them are scored."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The fields of a path `NAME:FIELD=NUMBER,...`."""

    rows: int = 32768
    """How many rows there are, training and validation together."""
    seed: int = 0
    """Of the rows; the same in all runs, whatever their own seeds."""

    def __post_init__(self) -> None:
        if self.rows < 2:
            raise ValueError(f"rows={self.rows}; need at least 2")

    @property
    def least(self) -> int:
        """Tokens in the shortest row."""
        raise NotImplementedError

    def draw(self, random: np.random.Generator, length: int) -> Rows:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Recall(Task):
    """`key value key value ...`: facts in rounds, or pairs and then queries about them.

    A round is the whole table in a new random order. So every fact is seen equally often, and is
    repeated within a row only where the table is shorter than the row.
    """

    facts: int = 0
    """Entries of the fixed table; 0 for recall in context."""
    pairs: int = 0
    """Pairs of a row, with keys of their own; 0 for recall of facts."""
    distance: int = 0
    """Tokens from a pair to its query, at the least. The pairs are somewhere in filler, and each is
    asked for once, at the end; no value of a row is one of its keys. 0: queries follow the pairs
    until the row is full."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.facts > 0) == (self.pairs > 0):
            raise ValueError("need exactly one of facts and pairs, for example recall:facts=4096")
        most = len(SYMBOLS) ** _WIDEST
        if self.facts > most or self.pairs > len(SYMBOLS):
            raise ValueError(f"need at most {most} facts, or {len(SYMBOLS)} pairs")
        if self.distance and (self.facts or self.distance < 2):
            raise ValueError(f"distance={self.distance}; need pairs, and 2 or more")
        if self.distance and self.pairs > len(SYMBOLS) // 2:
            raise ValueError(f"need at most {len(SYMBOLS) // 2} pairs at a distance")

    @property
    def key_width(self) -> int:
        """Symbols in a key."""
        widths = range(1, _WIDEST + 1)
        return next(w for w in widths if len(SYMBOLS) ** w >= max(self.facts, self.pairs))

    @property
    def least(self) -> int:
        if self.distance:
            return 4 * self.pairs + self.distance - 2
        return (self.pairs + 1) * (self.key_width + 1)

    def draw(self, random: np.random.Generator, length: int) -> Rows:
        if self.distance:
            return self._draw_apart(random, length)
        width, units = self.key_width, length // (self.key_width + 1)
        keys, values = (self._facts if self.facts else self._pairs)(random, units)
        digits = keys[..., None] // len(SYMBOLS) ** np.arange(width) % len(SYMBOLS)
        tokens = np.full((self.rows, length), _BLANK, np.uint8)
        unit = np.concatenate((digits, values[..., None]), -1)
        tokens[:, : units * (width + 1)] = SYMBOLS[unit].reshape(self.rows, -1)
        answers = np.arange(self.pairs, units) * (width + 1) + width
        return tokens, _only(answers, tokens)

    def _facts(self, random: np.random.Generator, units: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [rows, units] of the table's facts in rounds: numbers."""
        keys = random.choice(len(SYMBOLS) ** self.key_width, self.facts, replace=False)
        values = random.integers(len(SYMBOLS), size=self.facts)
        rounds = -(-self.rows * units // self.facts)
        order = random.permuted(np.tile(np.arange(self.facts), (rounds, 1)), axis=1)
        order = order.ravel()[: self.rows * units].reshape(self.rows, units)
        return keys[order], values[order]

    def _pairs(self, random: np.random.Generator, units: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [rows, units]: `pairs` of a row, then queries in random order."""
        keys = self._symbols(random)[:, : self.pairs]
        values = random.integers(len(SYMBOLS), size=keys.shape)
        asked = random.integers(self.pairs, size=(self.rows, units - self.pairs))
        first = np.tile(np.arange(self.pairs), (self.rows, 1))
        which = np.concatenate((first, asked), 1)
        return np.take_along_axis(keys, which, 1), np.take_along_axis(values, which, 1)

    def _symbols(self, random: np.random.Generator) -> np.ndarray:
        """[rows, 64] in random order."""
        return random.permuted(np.tile(np.arange(len(SYMBOLS)), (self.rows, 1)), axis=1)

    def _draw_apart(self, random: np.random.Generator, length: int) -> Rows:
        symbols = self._symbols(random)
        drawn = random.integers(self.pairs, len(SYMBOLS), size=(self.rows, self.pairs))
        values = np.take_along_axis(symbols, drawn, 1)
        units = np.stack((symbols[:, : self.pairs], values), -1)
        order = random.permuted(np.tile(np.arange(self.pairs), (self.rows, 1)), axis=1)
        asked = np.take_along_axis(units, order[..., None], 1)
        tokens = random.choice(FILLER, (self.rows, length))
        start = random.integers(length - self.least + 1, size=(self.rows, 1))
        at = start + np.arange(2 * self.pairs)
        np.put_along_axis(tokens, at, SYMBOLS[units].reshape(self.rows, -1), 1)
        tokens[:, length - 2 * self.pairs :] = SYMBOLS[asked].reshape(self.rows, -1)
        return tokens, _only(np.arange(length - 2 * self.pairs + 1, length, 2), tokens)


@dataclass(frozen=True, kw_only=True)
class Needle(Task):
    """A key and its value somewhere in filler, everywhere equally often; the row ends in both."""

    symbols: int = 4
    """In the key, and in the value, all of which is scored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.symbols < 1:
            raise ValueError(f"symbols={self.symbols}; need at least 1")

    @property
    def least(self) -> int:
        return 4 * self.symbols

    def draw(self, random: np.random.Generator, length: int) -> Rows:
        unit = random.choice(SYMBOLS, (self.rows, 2 * self.symbols))
        tokens = random.choice(FILLER, (self.rows, length))
        depth = random.integers(length - self.least + 1, size=(self.rows, 1))
        np.put_along_axis(tokens, depth + np.arange(2 * self.symbols), unit, 1)
        tokens[:, length - 2 * self.symbols :] = unit
        return tokens, _only(np.arange(length - self.symbols, length), tokens)


@dataclass(frozen=True, kw_only=True)
class Copy(Task):
    """A random string, a separator, and the string again, which is scored."""

    symbols: int = 64
    """In the string."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.symbols < 1:
            raise ValueError(f"symbols={self.symbols}; need at least 1")

    @property
    def least(self) -> int:
        return 2 * self.symbols + 1

    def draw(self, random: np.random.Generator, length: int) -> Rows:
        text = random.choice(SYMBOLS, (self.rows, self.symbols))
        tokens = np.full((self.rows, length), _BLANK, np.uint8)
        tokens[:, : self.symbols] = text
        tokens[:, self.symbols] = _SEPARATOR
        tokens[:, self.symbols + 1 : self.least] = text
        return tokens, _only(np.arange(self.symbols + 1, self.least), tokens)


TASKS: dict[str, type[Task]] = {"recall": Recall, "needle": Needle, "copy": Copy}


def _only(columns: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    scored = np.zeros(tokens.shape, bool)
    scored[:, columns] = True
    return scored


def is_task(path: str | None) -> bool:
    return path is not None and path.partition(":")[:2] in {(name, ":") for name in TASKS}


def parse(path: str) -> Task:
    """Raises ValueError for an unknown, repeated or impossible field."""
    name, _, text = path.partition(":")
    fields: dict[str, int] = {}
    known = TASKS[name].__dataclass_fields__
    for part in text.split(",") if text else ():
        field, _, value = part.partition("=")
        if field not in known or field in fields or not value.isdecimal():
            raise refuse(path, f"{part!r}; need NAME=NUMBER once each, of {', '.join(known)}")
        fields[field] = int(value)
    try:
        return TASKS[name](**fields)
    except ValueError as error:
        raise refuse(path, str(error)) from None


def read_task(path: str, tokenizer: Tokenizer, length: int) -> Corpus:
    """The rows of a task, each a document of `length` tokens, as a corpus.

    Raises:
      ValueError: a path that says something else, a tokeniser other than bytes, rows too short for
        the task.
    """
    task = parse(path)
    if not isinstance(tokenizer, ByteTokenizer):
        raise refuse(path, "the rows are bytes; need data.tokenizer='bytes'")
    if length < task.least:
        raise refuse(path, f"a row of {length} tokens is too short; need data.length {task.least}")
    tokens, scored = task.draw(np.random.default_rng(task.seed), length)
    starts = np.arange(task.rows, dtype=np.int64) * length
    return Corpus(tokens.ravel(), starts, scored.ravel(), row=length)
