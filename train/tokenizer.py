"""Tokenisers: UTF-8 bytes by default, any Hugging Face `tokenizer.json` by its path."""

import codecs
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

# A tokenizer.json does not say which of its special tokens ends a document: the names in use.
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_PIECE = 1 << 20  # characters handed over at once: an encoding takes a hundred bytes per token
_PIECES = 64


class Decoder(Protocol):
    """Turns ids into text as they come, holding back what is not a whole character yet."""

    def decode(self, ids: ArrayLike, final: bool = False) -> str:
        """Text that `ids` complete; with `final`, also what is left, as U+FFFD."""
        ...


class Tokenizer(Protocol):
    """Text to ids in `range(vocab_size)`, in the smallest unsigned dtype that holds them."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos(self) -> int | None:
        """The id that ends a document; it decodes to nothing."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal only for tokenisers that give the same ids: a cache key."""
        ...

    def encode(self, text: str) -> np.ndarray: ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: ArrayLike) -> str: ...

    def decoder(self) -> Decoder: ...

    def num_bytes(self) -> np.ndarray:
        """Bytes of UTF-8 that each id stands for behind other text: int32 [vocab_size]."""
        ...


class ByteTokenizer:
    """The bytes of UTF-8 are the ids. The byte 0xFF, which UTF-8 never uses, ends a document.

    So the vocabulary is 256: ids fit uint8 and an embedding divides over any mesh axis of 2^n.
    """

    vocab_size = 256
    eos = 0xFF
    fingerprint = "bytes"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: ArrayLike) -> str:
        return self.decoder().decode(ids, final=True)

    def decoder(self) -> Decoder:
        return _ByteDecoder()

    def num_bytes(self) -> np.ndarray:
        return (np.arange(self.vocab_size) != self.eos).astype(np.int32)


class _ByteDecoder:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def decode(self, ids: ArrayLike, final: bool = False) -> str:
        ids = np.asarray(ids).ravel()
        # A model's vocabulary may be padded beyond the tokeniser's: such ids say nothing either.
        return self._utf8.decode(ids[ids < ByteTokenizer.eos].astype(np.uint8).tobytes(), final)


class HFTokenizer:
    """A Hugging Face `tokenizer.json` (package `tokenizers`, extra `hf`).

    Special tokens are not added, only recognised. Texts longer than a mebicharacter are encoded in
    pieces cut after a line's end.
    """

    def __init__(self, path: str | Path):
        """Reads `path`. Raises ValueError when the package is missing or the file malformed."""
        try:
            from tokenizers import Tokenizer as Tokenizers
        except ImportError:
            raise _refuse(path, "needs tokenizers: pip install 'bestiary[hf]'") from None
        file = Path(path)
        try:
            text = file.read_text("utf-8")
            self._tokenizer = Tokenizers.from_str(text)
        except Exception as error:  # tokenizers raises bare Exception
            raise _refuse(path, f"is not a readable tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise _refuse(path, "has an empty vocabulary")
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos = vocabulary.get(_end_token(file, vocabulary))
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self._dtype = np.min_scalar_type(self.vocab_size - 1)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        cut = [_pieces(text) for text in texts]
        pieces = list(itertools.chain.from_iterable(cut))
        ids = iter(
            np.asarray(encoding.ids, self._dtype)
            for first in range(0, len(pieces), _PIECES)
            for encoding in self._tokenizer.encode_batch_fast(
                pieces[first : first + _PIECES], add_special_tokens=False
            )
        )
        return [np.concatenate([next(ids) for _ in parts]) for parts in cut]

    def decode(self, ids: ArrayLike) -> str:
        return self._tokenizer.decode(np.asarray(ids).ravel().astype(int).tolist())

    def decoder(self) -> Decoder:
        return _HFDecoder(self)

    def num_bytes(self) -> np.ndarray:
        context = self.encode("a")  # a word's leading space shows only behind something

        def size(token: int) -> int:
            decoder = self.decoder()
            decoder.decode(context)
            text = decoder.decode([token], final=True)
            if "\ufffd" not in text:
                return len(text.encode())
            # part of a character: one byte as <0x..>, or, at the level of bytes, a letter for each
            piece = self._tokenizer.id_to_token(token) or ""
            return 1 if piece.startswith("<0x") else len(piece)

        return np.array([size(token) for token in range(self.vocab_size)], np.int32)


class _HFDecoder:
    """Decodes new ids behind those of the last text: a word's leading space needs its left side."""

    def __init__(self, tokenizer: HFTokenizer):
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        self._held: list[int] = []

    def decode(self, ids: ArrayLike, final: bool = False) -> str:
        self._held += np.asarray(ids).ravel().astype(int).tolist()
        before = self._tokenizer.decode(self._shown)
        text = self._tokenizer.decode(self._shown + self._held)[len(before) :]
        if not text or (text.endswith("\ufffd") and not final):
            return ""
        self._shown, self._held = self._held, []
        return text


def load_tokenizer(name: str) -> Tokenizer:
    """`"bytes"`, or the path of a `tokenizer.json` or of the folder that holds one.

    Raises ValueError naming `data.tokenizer` when there is no such file, it is malformed, or the
    package to read it is missing.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = os.path.expanduser(name)
    path = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
    if not os.path.isfile(path):
        raise _refuse(name, "must be 'bytes' or the path of a tokenizer.json; no such file")
    return HFTokenizer(path)


def _end_token(file: Path, vocabulary: dict[str, int]) -> str:
    """The end-of-document token: what `tokenizer_config.json` beside says, else a usual name."""
    config = file.with_name("tokenizer_config.json")
    if config.is_file():
        try:
            token = json.loads(config.read_text("utf-8")).get("eos_token")
        except (ValueError, AttributeError):
            raise _refuse(file, "stands beside a malformed tokenizer_config.json") from None
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            return str(token)
    return next((token for token in _END_TOKENS if token in vocabulary), "")


def _pieces(text: str) -> list[str]:
    text = text.encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair
    cuts = [0]
    while len(text) - cuts[-1] > _PIECE and (end := text.find("\n", cuts[-1] + _PIECE) + 1):
        cuts.append(end)
    return [text[first:last] for first, last in itertools.pairwise([*cuts, len(text)])]


def _refuse(value: object, reason: str) -> ValueError:
    return ValueError(f"data.tokenizer={str(value)!r}: {reason}".partition("\n")[0])
