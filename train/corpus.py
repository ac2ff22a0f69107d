"""A corpus: one array of tokens and where its documents begin, tokenised once and mapped after."""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from bestiary.train.sources import is_single_document, read_documents, refuse, source_files
from bestiary.train.tokenizer import ByteTokenizer, Tokenizer

_BATCH = 1024  # documents per call of the tokeniser, which may use every core for them
_SCAN = 1 << 24  # tokens of a mapped file looked at together
_SMALL = 1 << 26  # bytes that are read as quickly as a cache of them


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Documents end to end.

    Attributes:
      tokens: [n] any integer dtype, in memory or mapped from a file.
      starts: [documents] int64, rising, the first of them 0: where each document begins.
      scored: [n] bool, which tokens count when they are predicted; None: all.
      row: rows begin at multiples of it (documents that must not be cut are as long).
    """

    tokens: np.ndarray
    starts: np.ndarray
    scored: np.ndarray | None = None
    row: int = 1

    def __len__(self) -> int:
        return len(self.tokens)

    def split(self, tail: float) -> tuple["Corpus", "Corpus"]:
        """The first `int((1 - tail) * n)` tokens, down to a multiple of `row`, and the others."""
        cut = int((1 - tail) * len(self)) // self.row * self.row
        at = np.searchsorted(self.starts, cut, side="right")
        last = np.append(0, self.starts[at:] - cut)
        first = self.starts[: np.searchsorted(self.starts, cut)]
        scored = (None, None) if self.scored is None else (self.scored[:cut], self.scored[cut:])
        return (
            Corpus(self.tokens[:cut], first, scored[0], self.row),
            Corpus(self.tokens[cut:], last, scored[1], self.row),
        )


def read_corpus(path: str | None, tokenizer: Tokenizer, text_field: str) -> Corpus:
    """Reads, tokenises and joins the documents of a source (see `sources.read_documents`).

    A text file is one document, taken as it stands. Other sources are collections: each document
    ends with the tokeniser's end-of-document id and they are put in one fixed random order, so that
    the tail is a fair sample. `.npy` (1-D integers) and `.bin` (uint16) files hold tokens already,
    are mapped, keep their order, and their documents end at each end-of-document id.

    What was expensive to tokenise is kept in `cache_folder()` and mapped. The tokens of a source
    pass through memory once; for more than fits, write a token file.

    Raises:
      ValueError: no such source, or it holds nothing, is malformed, or has ids the tokeniser lacks.
    """
    files = source_files(path)
    if is_single_document(path) and files[0].suffix.lower() in (".npy", ".bin"):
        return _read_tokens(files[0], tokenizer)
    states = [(str(file.resolve()), file.stat()) for file in files]
    size = sum(state.st_size for _, state in states)

    def tokenise() -> Corpus:
        eos = None if is_single_document(path) else tokenizer.eos
        corpus = _join(read_documents(path, text_field), tokenizer, eos)
        if not len(corpus):
            raise refuse(path, "holds no text")
        return corpus

    if isinstance(tokenizer, ByteTokenizer) and size <= _SMALL:
        return tokenise()
    versions = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    key = json.dumps([path is None, versions, tokenizer.fingerprint, text_field])
    return _cached(cache_folder() / hashlib.sha256(key.encode()).hexdigest(), tokenise)


def cache_folder() -> Path:
    """Where tokenised text is kept: a folder of the user's cache, which may be emptied any time."""
    if sys.platform == "darwin":
        root = "~/Library/Caches"
    elif sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(root)) / "bestiary" / "tokens"


def _join(texts: Iterable[str], tokenizer: Tokenizer, eos: int | None) -> Corpus:
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    end = [] if eos is None else [np.array([eos], dtype)]
    documents: list[np.ndarray] = []
    texts = iter(texts)
    while batch := list(itertools.islice(texts, _BATCH)):
        documents += (ids for ids in tokenizer.encode_batch(batch) if len(ids))
    if not documents:
        return Corpus(np.empty(0, dtype), np.zeros(1, np.int64))
    order = np.random.default_rng(0).permutation(len(documents))
    tokens = np.concatenate([part for i in order for part in (documents[i], *end)])
    lengths = np.array([len(documents[i]) + len(end) for i in order])
    return Corpus(tokens, np.cumsum(lengths) - lengths)


def _cached(folder: Path, make: Callable[[], Corpus]) -> Corpus:
    """The corpus in `folder`, made first if need be. The folder appears at once and whole."""
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(dir=folder.parent))
        except OSError:  # a home that cannot be written
            return make()
        try:
            corpus = make()
            np.save(beside / "tokens.npy", corpus.tokens)
            np.save(beside / "starts.npy", corpus.starts)
            beside.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return Corpus(
        np.load(folder / "tokens.npy", mmap_mode="r"), np.load(folder / "starts.npy", mmap_mode="r")
    )


def _read_tokens(file: Path, tokenizer: Tokenizer) -> Corpus:
    if not (size := file.stat().st_size):
        raise refuse(file, "is empty")
    if file.suffix.lower() == ".bin":
        if size % 2:
            raise refuse(file, f"must hold uint16 tokens, but has an odd size of {size} bytes")
        tokens = np.memmap(file, np.uint16, "r")
    else:
        try:
            tokens = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise refuse(file, f"is not a NumPy array: {error}") from None
        if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            shape, dtype = getattr(tokens, "shape", "?"), getattr(tokens, "dtype", "?")
            raise refuse(file, f"must be a 1-D array of integers, not {dtype} of shape {shape}")
        if not len(tokens):
            raise refuse(file, "is empty")
    starts = [np.zeros(1, np.int64)]
    for first in range(0, len(tokens), _SCAN):
        chunk = tokens[first : first + _SCAN]
        wrong = np.flatnonzero((chunk < 0) | (chunk >= tokenizer.vocab_size))
        if len(wrong):
            at, size = first + wrong[0], tokenizer.vocab_size
            raise refuse(
                file,
                f"token {tokens[at]} at {at} is outside the tokeniser's vocabulary of {size}; name "
                "the tokenizer.json it was made with in data.tokenizer",
            )
        if tokenizer.eos is not None:
            starts.append(first + np.flatnonzero(chunk == tokenizer.eos) + 1)
    joined = np.concatenate(starts)
    return Corpus(tokens, joined[joined < len(tokens)])
