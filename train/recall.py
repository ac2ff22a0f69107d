"""Synthetic key-value recall: can a model look up what it has read, or has learned by heart?

    recall:facts=4096       a fixed table of facts, which must be memorised
    recall:pairs=16         new pairs in every row, then queries about them (in context)

as `data.path`. A row is `key value key value ...` of letters and digits, and only values are
scored: those of all facts, which the row's other tokens do not help with, or those of the queries.
The in-context form is the multi-query associative recall of Arora et al. 2023 (arXiv 2312.04927).
"""

import string
from dataclasses import dataclass

import numpy as np

from bestiary.train.corpus import Corpus
from bestiary.train.sources import refuse
from bestiary.train.tokenizer import ByteTokenizer, Tokenizer

PREFIX = "recall:"
SYMBOLS = np.frombuffer((string.ascii_letters + string.digits + "+-").encode(), np.uint8)
"""64 bytes that keys and values consist of: guessing is right 1.6 % of the time."""
_BLANK = ord("\n")  # fills a row up
_WIDEST = 4  # symbols of a key: 16.8M facts


@dataclass(frozen=True)
class Recall:
    """The fields of a path `recall:NAME=VALUE,...`."""

    facts: int = 0
    """Entries of the fixed table; 0 for recall in context."""
    pairs: int = 0
    """Pairs at the beginning of a row, with keys of their own; 0 for recall of facts."""
    rows: int = 32768
    """How many rows there are, training and validation together."""
    seed: int = 0
    """Of the table and of the rows; the same in all runs, whatever their own seeds."""

    @property
    def key_width(self) -> int:
        """Symbols in a key."""
        widths = range(1, _WIDEST + 1)
        return next(w for w in widths if len(SYMBOLS) ** w >= max(self.facts, self.pairs))


def is_recall(path: str | None) -> bool:
    return path is not None and path.startswith(PREFIX)


def parse(path: str) -> Recall:
    """Raises ValueError for an unknown, repeated or impossible field."""
    fields: dict[str, int] = {}
    known = Recall.__dataclass_fields__
    for part in path.removeprefix(PREFIX).split(","):
        name, _, value = part.partition("=")
        if name not in known or name in fields or not value.isdecimal():
            raise refuse(path, f"{part!r}; need NAME=NUMBER once each, of {', '.join(known)}")
        fields[name] = int(value)
    recall, most = Recall(**fields), len(SYMBOLS) ** _WIDEST
    if (recall.facts > 0) == (recall.pairs > 0):
        raise refuse(path, "need exactly one of facts and pairs, for example recall:facts=4096")
    if recall.facts > most or recall.pairs > len(SYMBOLS):
        raise refuse(path, f"need at most {most} facts, or {len(SYMBOLS)} pairs")
    if recall.rows < 2:
        raise refuse(path, f"rows={recall.rows}; need at least 2")
    return recall


def read_recall(path: str, tokenizer: Tokenizer, length: int) -> Corpus:
    """The rows of a recall task, each a document of `length` tokens, as a corpus.

    Facts come in rounds: each round is the whole table in a new random order. So every fact is seen
    equally often, and is repeated within a row only where the table is shorter than the row.

    Raises:
      ValueError: a path that says something else, a tokeniser other than bytes, rows too short for
        the pairs and a query.
    """
    recall = parse(path)
    if not isinstance(tokenizer, ByteTokenizer):
        raise refuse(path, "the rows are bytes; need data.tokenizer='bytes'")
    width, units = recall.key_width, length // (recall.key_width + 1)
    if units <= recall.pairs:
        least = (recall.pairs + 1) * (width + 1)
        raise refuse(path, f"a row of {length} tokens is too short; need data.length {least}")
    random = np.random.default_rng(recall.seed)
    draw = _facts if recall.facts else _pairs
    keys, values = draw(random, recall, units)  # of every unit of every row: numbers

    digits = keys[..., None] // len(SYMBOLS) ** np.arange(width) % len(SYMBOLS)
    tokens = np.full((recall.rows, length), _BLANK, np.uint8)
    scored = np.zeros((recall.rows, length), bool)
    unit = np.concatenate((digits, values[..., None]), -1)
    tokens[:, : units * (width + 1)] = SYMBOLS[unit].reshape(recall.rows, -1)
    answers = np.arange(recall.pairs, units) * (width + 1) + width
    scored[:, answers] = True
    starts = np.arange(recall.rows, dtype=np.int64) * length
    return Corpus(tokens.ravel(), starts, scored.ravel(), row=length)


def _facts(
    random: np.random.Generator, recall: Recall, units: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [rows, units] of the table's facts in rounds."""
    space = len(SYMBOLS) ** recall.key_width
    keys = random.choice(space, recall.facts, replace=False)
    values = random.integers(len(SYMBOLS), size=recall.facts)
    rounds = -(-recall.rows * units // recall.facts)
    order = random.permuted(np.tile(np.arange(recall.facts), (rounds, 1)), axis=1)
    order = order.ravel()[: recall.rows * units].reshape(recall.rows, units)
    return keys[order], values[order]


def _pairs(
    random: np.random.Generator, recall: Recall, units: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [rows, units]: `pairs` of a row, then queries about them in random order."""
    every = np.tile(np.arange(len(SYMBOLS)), (recall.rows, 1))
    keys = random.permuted(every, axis=1)[:, : recall.pairs]
    values = random.integers(len(SYMBOLS), size=keys.shape)
    asked = random.integers(recall.pairs, size=(recall.rows, units - recall.pairs))
    which = np.concatenate((np.tile(np.arange(recall.pairs), (recall.rows, 1)), asked), 1)
    return np.take_along_axis(keys, which, 1), np.take_along_axis(values, which, 1)
