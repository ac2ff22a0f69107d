"""Data: tokenisers, sources, corpus and rows, against slow oracles and by invariants."""

import concurrent.futures
import functools
import io
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bestiary.train.corpus import Corpus, cache_folder, read_corpus
from bestiary.train.data import Data, cut_rows, load, train_iterator, validation_batches
from bestiary.train.tokenizer import ByteTokenizer, load_tokenizer

TEXTS = ["A first document.\n", "Ein zweites: Größe, 語, 🐍.\n", "{not JSON", "four\r\n\r\n"]
EOS = b"\xff"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))


@functools.cache
def hf_json() -> str:
    """A byte-level BPE of 300 tokens with an end-of-document token, trained here."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS + ["the theme of the thesis there\n"] * 9, trainer)
    tokenizer.enable_truncation(4)  # left in many published files; must not cut documents short
    tokenizer.enable_padding(length=9)
    return tokenizer.to_str()


@pytest.fixture
def hf_path(tmp_path):
    path = tmp_path / "hf" / "tokenizer.json"
    path.parent.mkdir()
    path.write_text(hf_json(), "utf-8")
    return path


def make_corpus(lengths, vocabulary=251, seed=0) -> Corpus:
    lengths = np.asarray(lengths)
    tokens = np.random.default_rng(seed).integers(1, vocabulary, lengths.sum()).astype(np.uint8)
    return Corpus(tokens, np.cumsum(lengths) - lengths)


def assert_batches_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# Tokenisers


@given(text=st.text(), cuts=st.lists(st.integers(0, 40)))
def test_bytes_round_trip_and_stream(text, cuts):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint8 and bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == tokenizer.decode([*ids, tokenizer.eos]) == text
    decoder = tokenizer.decoder()
    edges = [0, *sorted(cuts), max(len(ids), *cuts, 0)]
    parts = [decoder.decode(ids[a:b]) for a, b in itertools.pairwise(edges)]
    assert "".join(parts) + decoder.decode([], final=True) == text
    assert all(text.startswith("".join(parts[:n])) for n in range(len(parts)))


@given(st.binary())
def test_bytes_decode_takes_anything(data):
    ids = np.frombuffer(data, np.uint8)
    decoder = ByteTokenizer().decoder()
    streamed = "".join(decoder.decode(i) for i in ids) + decoder.decode([], final=True)
    expected = data.replace(EOS, b"").decode(errors="replace")
    assert streamed == ByteTokenizer().decode(ids) == expected


def test_bytes_ignore_ids_of_a_padded_vocabulary():
    assert ByteTokenizer().decode([72, 300, 105]) == "Hi"


def test_hf_tokenizer(hf_path):
    tokenizer = load_tokenizer(str(hf_path))
    assert tokenizer.vocab_size == 300 and tokenizer.eos == 0
    assert tokenizer.fingerprint == load_tokenizer(str(hf_path.parent)).fingerprint
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.dtype == np.uint16 and tokenizer.eos not in ids
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
        assert tokenizer.decode([*ids, tokenizer.eos, 999]) == text
    assert tokenizer.decode(tokenizer.encode("half \ud83d pair")) == "half ? pair"


@settings(max_examples=50)
@given(text=st.text(alphabet=st.sampled_from("the 語🐍é\n")))
def test_hf_stream(text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "stream.json"
    path.write_text(hf_json(), "utf-8")
    tokenizer = load_tokenizer(str(path))
    decoder = tokenizer.decoder()
    parts = [decoder.decode(i) for i in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts) + decoder.decode([], final=True) == text


def test_hf_stream_keeps_leading_spaces_and_flushes_halves(hf_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "▁a": 1, "▁b": 2, "<0xE8>": 3, "</s>": 4}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(words, [], unk_token="<unk>"))
    model.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Metaspace(prepend_scheme="always"),
        ]
    )
    model.add_special_tokens(["</s>"])
    model.save(str(hf_path))
    tokenizer = load_tokenizer(str(hf_path))
    decoder = tokenizer.decoder()
    assert [decoder.decode(i) for i in (4, 1, 2, 4, 1, 3)] == ["", "a", " b", "", " a", ""]
    assert decoder.decode([], final=True) == "\ufffd"


def test_hf_long_text_is_cut_after_a_line(hf_path, monkeypatch):
    monkeypatch.setattr("bestiary.train.tokenizer._PIECE", 50)
    monkeypatch.setattr("bestiary.train.tokenizer._PIECES", 3)
    tokenizer = load_tokenizer(str(hf_path))
    text = "the theme of 語\n" * 40 + "no end of line " * 10
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    monkeypatch.undo()
    np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_hf_end_token_from_the_config_beside(hf_path):
    config = hf_path.with_name("tokenizer_config.json")
    for token in ("A", {"content": "A"}):
        config.write_text(json.dumps({"eos_token": token}))
        tokenizer = load_tokenizer(str(hf_path))
        assert tokenizer.eos == tokenizer.encode("A")[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must be 'bytes' or the path of a tokenizer.json; no such file"),
        ("", "is not a readable tokenizer.json"),
        ("{}", "is not a readable tokenizer.json"),
        ("\udcff", "is not a readable tokenizer.json"),
        ('{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "has an empty vocabulary"),
    ],
)
def test_malformed_tokenizer(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content, "utf-8", "surrogateescape")
    with pytest.raises(ValueError, match=r"^data\.tokenizer='.*tokenizer\.json': .*$") as error:
        load_tokenizer(str(path))
    assert message in str(error.value)


def test_malformed_tokenizer_config(hf_path):
    for text in ("{", "[]"):
        hf_path.with_name("tokenizer_config.json").write_text(text)
        with pytest.raises(ValueError, match="malformed tokenizer_config.json"):
            load_tokenizer(str(hf_path))


@pytest.mark.parametrize(("package", "extra"), [("tokenizers", "hf"), ("pyarrow", "parquet")])
def test_missing_package(tmp_path, monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"pip install 'bestiary\[{extra}\]'"):
        if package == "tokenizers":
            load_tokenizer(str(tmp_path / "tokenizer.json"))
        else:
            read_corpus(str(tmp_path / "a.parquet"), ByteTokenizer(), "text")


# Sources: each writes TEXTS and says under which path and field they are found


def write_folder(folder: Path):
    for n, text in enumerate(TEXTS):
        file = folder / "texts" / f"{n % 2}" / f"{n}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    (folder / "texts" / "binary.bin").write_bytes(b"\0\1")
    (folder / "texts" / "latin-1").write_bytes("Größe".encode("latin-1"))
    (folder / "texts" / "empty").write_bytes(b"")
    (folder / "texts" / ".hidden").write_text("hidden")
    return folder / "texts", "text"


def write_jsonl(folder: Path):
    lines = [json.dumps({"body": text, "text": 1}) for text in TEXTS]
    (folder / "a.jsonl").write_text("\n".join([*lines, "", json.dumps({"body": ""}), "\n"]))
    return folder / "a.jsonl", "body"


def write_parquet(folder: Path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"n": range(5), "body": [*TEXTS, None]}), folder / "a.parquet")
    return folder / "a.parquet", "body"


def write_array_record(folder: Path, records=None, name="a.array_record"):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(folder / name), "group_size:1")
    for record in records or [text.encode() for text in TEXTS]:
        writer.write(record)
    writer.close()
    return folder / name, "text"


def write_array_record_of_json(folder: Path):
    records = [json.dumps({"body": text}).encode() for text in TEXTS]
    return write_array_record(folder, records, "a.arecord")[0], "body"


def write_folder_of_shards(folder: Path):
    (folder / "shards").mkdir()
    (folder / "shards" / "b.txt").write_bytes(TEXTS[0].encode())
    lines = [json.dumps({"text": text}) for text in TEXTS[1:]]
    (folder / "shards" / "a.jsonl").write_text("\n".join(lines))
    return folder / "shards", "text"


WRITERS = [
    write_folder,
    write_jsonl,
    write_parquet,
    write_array_record,
    write_array_record_of_json,
    write_folder_of_shards,
]


@pytest.mark.parametrize("write", WRITERS)
def test_collections(tmp_path, write):
    path, field = write(tmp_path)
    corpus = read_corpus(str(path), ByteTokenizer(), field)
    assert corpus.tokens.dtype == np.uint8 and corpus.tokens[-1] == ByteTokenizer.eos
    documents = [bytes(part) for part in np.split(corpus.tokens, corpus.starts[1:])]
    assert sorted(documents) == sorted(text.encode() + EOS for text in TEXTS)
    again = read_corpus(str(path), ByteTokenizer(), field)
    np.testing.assert_array_equal(again.tokens, corpus.tokens)
    assert not cache_folder().exists()


def test_collection_order_is_mixed(tmp_path):
    lines = [json.dumps({"text": f"{n:03}"}) for n in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    corpus = read_corpus(str(tmp_path / "a.jsonl"), ByteTokenizer(), "text")
    order = np.array([int(text) for text in bytes(corpus.tokens).split(EOS)[:-1]])
    assert sorted(order) == list(range(100))
    assert abs(np.corrcoef(order, np.arange(100))[0, 1]) < 0.3


@pytest.mark.parametrize("name", ["a.txt", "README", "a.rst.TXT"])
def test_text_file_is_taken_as_it_stands(tmp_path, name):
    text = "".join(TEXTS) * 7
    (tmp_path / name).write_bytes(text.encode())
    data = Data(path=str(tmp_path / name), length=5)
    tokenizer, train, validation = load(data)
    raw = text.encode()
    assert bytes(train.tokens) == raw[: int(0.9 * len(raw))]
    assert bytes(validation.tokens) == raw[int(0.9 * len(raw)) :]
    assert list(train.starts) == list(validation.starts) == [0]
    assert tokenizer.decode(np.concatenate([train.tokens, validation.tokens])) == text


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_token_files(tmp_path, dtype, hf_path):
    ids = np.array([7, 8, 0, 9, 0, 5, 6, 0]).astype(dtype)
    np.save(tmp_path / "ids.npy", ids)
    ids.astype("<u2").tofile(tmp_path / "ids.bin")
    for name in ("ids.npy", "ids.bin"):
        corpus = read_corpus(str(tmp_path / name), load_tokenizer(str(hf_path)), "text")
        assert isinstance(corpus.tokens, np.memmap)
        np.testing.assert_array_equal(corpus.tokens, ids)
        assert list(corpus.starts) == [0, 3, 5]


def test_token_file_is_scanned_in_parts(tmp_path, hf_path, monkeypatch):
    monkeypatch.setattr("bestiary.train.corpus._SCAN", 3)
    ids = np.array([4, 0, 3, 2, 2, 0, 0, 9, 299, 300])
    np.save(tmp_path / "ids.npy", ids[:9])
    corpus = read_corpus(str(tmp_path / "ids.npy"), load_tokenizer(str(hf_path)), "text")
    assert list(corpus.starts) == [0, 2, 6, 7]
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(ValueError, match="token 300 at 9 is outside .* vocabulary of 300"):
        read_corpus(str(tmp_path / "ids.npy"), load_tokenizer(str(hf_path)), "text")


def test_embedded_corpus():
    corpus = read_corpus(None, ByteTokenizer(), "text")
    assert len(corpus) > 6e6 and len(corpus.starts) > 300
    text = bytes(corpus.tokens)
    text.decode("utf-8", "ignore")
    assert b"class OrderedDict" in text and b'The "assert" statement' in text
    np.testing.assert_array_equal(
        corpus.starts[1:], np.flatnonzero(corpus.tokens[:-1] == ByteTokenizer.eos) + 1
    )
    again = read_corpus(None, ByteTokenizer(), "text")
    np.testing.assert_array_equal(again.tokens, corpus.tokens)


# The cache


@pytest.mark.parametrize("write", WRITERS)
def test_cache(tmp_path, hf_path, write):
    path, field = write(tmp_path)
    tokenizer = load_tokenizer(str(hf_path))
    corpus = read_corpus(str(path), tokenizer, field)
    assert isinstance(corpus.tokens, np.memmap) and corpus.tokens.dtype == np.uint16
    documents = np.split(corpus.tokens, corpus.starts[1:])
    assert all(ids[-1] == tokenizer.eos for ids in documents)
    assert sorted(tokenizer.decode(ids) for ids in documents) == sorted(TEXTS)
    assert len(list(cache_folder().iterdir())) == 1
    (stored,) = cache_folder().iterdir()
    before = (stored / "tokens.npy").stat()
    read_corpus(str(path), tokenizer, field)
    assert (stored / "tokens.npy").stat() == before


def test_cache_follows_the_source(tmp_path, hf_path):
    tokenizer, path = load_tokenizer(str(hf_path)), tmp_path / "a.txt"
    for version, text in enumerate(("one text", "two text")):
        path.write_text(text)
        os.utime(path, ns=(version, version))
        assert tokenizer.decode(read_corpus(str(path), tokenizer, "text").tokens) == text


def test_cache_follows_the_field(tmp_path, hf_path):
    tokenizer, path = load_tokenizer(str(hf_path)), tmp_path / "a.jsonl"
    path.write_text('{"one": "1", "two": "2"}')
    for field, text in (("one", "1"), ("two", "2")):
        assert tokenizer.decode(read_corpus(str(path), tokenizer, field).tokens) == text


def test_cache_filled_by_many_at_once(tmp_path, hf_path):
    path, tokenizer = tmp_path / "a.txt", load_tokenizer(str(hf_path))
    path.write_text("the theme " * 2000)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(read_corpus, str(path), tokenizer, "text") for _ in range(16)]
    for job in jobs:
        np.testing.assert_array_equal(job.result().tokens, jobs[0].result().tokens)
    assert len(list(cache_folder().iterdir())) == 1


def test_cache_folder_that_cannot_be_made(tmp_path, hf_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    (tmp_path / "a.txt").write_text("text")
    corpus = read_corpus(str(tmp_path / "a.txt"), load_tokenizer(str(hf_path)), "text")
    assert not isinstance(corpus.tokens, np.memmap) and len(corpus)


def test_failed_reading_leaves_no_cache(tmp_path, hf_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\nbroken\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_corpus(str(tmp_path / "a.jsonl"), load_tokenizer(str(hf_path)), "text")
    assert not list(cache_folder().iterdir())


# Malformed sources


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file or folder"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\xff\xfeb\0", "must be UTF-8 text"),
        ("a.txt", b"a\0b", "must be UTF-8 text"),
        ("a.txt", "Größe".encode("latin-1"), "must be UTF-8 text"),
        ("folder", {}, "holds no text"),
        ("folder", {"a.png": b"\x89PNG\0", ".git": b"text"}, "holds no text"),
        ("folder", {"a.txt": b"fine", "b.jsonl": b"{"}, "b.jsonl': line 1 is not JSON"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "line 3 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\nnull\n', "line 2 must be a JSON object, not NoneType"),
        ("a.jsonl", b'["text"]', "line 1 must be a JSON object, not list"),
        ("a.jsonl", b'{"body": "a", "id": 1}', "has no field 'text'; name one of ['body', 'id']"),
        ("a.jsonl", b'{"text": 5}', "line 1: field 'text' must be a string, not int"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.parquet", b"", "is not Parquet"),
        ("a.parquet", b"PAR1 nonsense PAR1", "is not Parquet"),
        ("a.array_record", b"", "is not ArrayRecord"),
        ("a.array_record", b"nonsense" * 20_000, "is not ArrayRecord"),
        ("a.npy", b"", "is empty"),
        ("a.npy", b"nonsense", "is not a NumPy array"),
        ("a.npy", npy(np.arange(99))[:200], "is not a NumPy array"),
        ("a.npy", npy(np.array([{}])), "is not a NumPy array"),
        ("a.npy", npy(np.ones(9)), "must be a 1-D array of integers, not float64 of shape (9,)"),
        ("a.npy", npy(np.array(["a"])), "must be a 1-D array of integers"),
        ("a.npy", npy(np.ones((2, 3), int)), "must be a 1-D array of integers"),
        ("a.npy", npy(np.array(3)), "must be a 1-D array of integers"),
        ("a.npy", npy(np.zeros(0, int)), "is empty"),
        ("a.npy", npy(np.array([1, -1])), "token -1 at 1 is outside"),
        ("a.npy", npy(np.array([256])), "token 256 at 0 is outside the tokeniser's vocabulary"),
        ("a.bin", b"", "is empty"),
        ("a.bin", b"abc", "odd size of 3 bytes"),
        ("a.bin", np.array([5, 999], "<u2").tobytes(), "name the tokenizer.json it was made with"),
    ],
)
def test_malformed_sources(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.mkdir()
        for leaf, data in content.items():
            (path / leaf).write_bytes(data)
    with pytest.raises(ValueError, match=r"^data\.path='.*': .+$") as error:
        load(Data(path=str(path)))
    assert message in str(error.value) and name in str(error.value)


@pytest.mark.parametrize("path", ["~nobody-of-this-name/a.txt", "x" * 5000, "a\0b", "/dev/null"])
def test_paths_that_lead_nowhere(path):
    with pytest.raises(ValueError, match=r"^data\.path='.*': no such file or folder$"):
        load(Data(path=path))
    with pytest.raises(ValueError, match=r"^data\.tokenizer='.*no such file$"):
        load(Data(tokenizer=path))


@pytest.mark.parametrize(
    ("column", "field", "message"),
    [
        (["a"], "body", "has no column 'body'; name one of ['text']"),
        ([1, 2], "text", "column 'text' must hold strings, not int64"),
        ([[1]], "text", "column 'text' must hold strings, not list"),
        ([], "text", "column 'text' must hold strings, not null"),
        ([""], "text", "holds no text"),
    ],
)
def test_malformed_parquet_column(tmp_path, column, field, message):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(ValueError) as error:
        load(Data(path=str(tmp_path / "a.parquet"), text_field=field))
    assert message in str(error.value)


def test_damaged_parquet(tmp_path):
    path, field = write_parquet(tmp_path)
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet': is damaged"):
        load(Data(path=str(path), text_field=field))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"\xff\xfe", "record 0 must be UTF-8 text or JSON"),
        (b'{"body": "a"}', "record 0 has no field 'text'; name one of ['body']"),
        (b'{"text": null}', "record 0: field 'text' must be a string, not NoneType"),
    ],
)
def test_malformed_array_record(tmp_path, record, message):
    path, _ = write_array_record(tmp_path, [record])
    with pytest.raises(ValueError) as error:
        load(Data(path=str(path)))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (64, {}, "57 tokens for training, but at least 257 are needed with data.length=256"),
        (20, {"length": 5}, None),
        (19, {"length": 5}, None),
        (9, {"length": 5}, "1 tokens for validation, but at least 2"),
        (6, {"length": 5, "validation_fraction": 0.0}, None),
        (5, {"length": 5, "validation_fraction": 0.0}, "5 tokens for training"),
        (2, {"length": 5, "validation_fraction": 1.0}, None),
        (1, {"length": 5, "validation_fraction": 1.0}, "1 tokens for validation"),
    ],
)
def test_short_corpus(tmp_path, size, changes, message):
    (tmp_path / "a.txt").write_bytes(b"x" * size)
    data = Data(path=str(tmp_path / "a.txt"), **changes)
    if message is None:
        _, train, validation = load(data)
        assert len(train) + len(validation) == size
    else:
        with pytest.raises(ValueError, match=r"^data\.path=.*a\.txt': .*$") as error:
            load(data)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0}, "data.length=0 must be at least 1"),
        ({"batch_size": -3}, "data.batch_size=-3 must be at least 1"),
        ({"validation_fraction": -0.1}, "data.validation_fraction=-0.1 must be between 0 and 1"),
        ({"validation_fraction": 1.5}, "data.validation_fraction=1.5 must be between 0 and 1"),
        ({"validation_fraction": float("nan")}, "data.validation_fraction=nan must be between"),
        ({"path": ""}, "data.path='' must name a file or folder"),
        ({"text_field": ""}, "data.text_field='' must name a field"),
    ],
)
def test_impossible_configuration(changes, message):
    with pytest.raises(ValueError) as error:
        Data(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize("make", [train_iterator, validation_batches])
@pytest.mark.parametrize(
    ("index", "count", "message"),
    [
        (0, 3, "data.batch_size=4 must be a multiple of the 3 processes"),
        (2, 2, "process_index=2 must be below 2"),
        (-1, 2, "process_index=-1"),
    ],
)
def test_impossible_processes(make, index, count, message):
    seed = {"seed": 0} if make is train_iterator else {}
    with pytest.raises(ValueError, match=message):
        make(
            make_corpus([99]),
            Data(length=5, batch_size=4),
            process_index=index,
            process_count=count,
            **seed,
        )


def test_iterators_refuse_short_corpora_and_negative_seeds():
    data = Data(length=5, batch_size=4)
    with pytest.raises(ValueError, match="5 tokens for training"):
        train_iterator(make_corpus([5]), data, 0)
    with pytest.raises(ValueError, match="1 tokens for validation"):
        validation_batches(make_corpus([1]), data)
    with pytest.raises(ValueError, match="seed=-1 must not be negative"):
        train_iterator(make_corpus([50]), data, -1)


# Split


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    tail=st.sampled_from([0.0, 0.05, 0.1, 0.5, 0.99, 1.0]),
)
def test_split_shares_nothing(lengths, tail):
    corpus = make_corpus(lengths)
    numbered = Corpus(np.arange(len(corpus)), corpus.starts)
    first, last = numbered.split(tail)
    assert len(first) == int((1 - tail) * len(corpus))
    np.testing.assert_array_equal(np.concatenate([first.tokens, last.tokens]), numbered.tokens)
    found = {int(part.tokens[s]) for part in (first, last) for s in part.starts if len(part)}
    assert all((np.diff(part.starts) > 0).all() for part in (first, last))
    assert found == {*corpus.starts, *([len(first)] if len(last) else [])}


# Rows


def oracle_row(corpus: Corpus, start: int, length: int, isolate: bool):
    document = [int(np.sum(corpus.starts <= i)) for i in range(len(corpus))]
    row = {name: [] for name in ("inputs", "targets", "positions", "segment_ids", "weights")}
    segment, position = 1, 0
    for i in range(start, start + length):
        if i >= len(corpus):
            values = (0, 0, 0, 0, 0.0)
        else:
            if isolate and i > start and document[i] != document[i - 1]:
                segment, position = segment + 1, 0
            is_last = i + 1 == len(corpus)
            same = not is_last and (not isolate or document[i] == document[i + 1])
            target = 0 if is_last else int(corpus.tokens[i + 1])
            values = (int(corpus.tokens[i]), target, position, segment, float(same))
            position += 1
        for name, value in zip(row, values, strict=True):
            row[name].append(value)
    return row


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=9),
    length=st.integers(1, 11),
    starts=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    isolate=st.booleans(),
)
def test_rows_equal_the_oracle(lengths, length, starts, isolate):
    corpus = make_corpus(lengths)
    rows = cut_rows(corpus, np.array(starts), length, isolate)
    expected = [oracle_row(corpus, start, length, isolate) for start in starts]
    for name, array in rows.items():
        np.testing.assert_array_equal(array, [row[name] for row in expected], err_msg=name)
        assert array.dtype == (np.float32 if name == "weights" else np.int32)
        assert array.flags.c_contiguous


def test_no_weighted_target_crosses_a_document():
    lengths = [3, 1, 8, 2, 5, 13, 1, 1, 4]
    # Every token says which document it is of, so a crossing shows in the rows themselves.
    corpus = Corpus(np.repeat(np.arange(9, dtype=np.uint8), lengths), make_corpus(lengths).starts)
    batches = train_iterator(corpus, Data(length=7, batch_size=6), 1)
    for batch in itertools.islice(batches, 40):
        same = batch["inputs"] == batch["targets"]
        np.testing.assert_array_equal(batch["weights"], same)
        segments = batch["segment_ids"]
        np.testing.assert_array_equal(segments[:, 1:] == segments[:, :-1], same[:, :-1])
    batches.close()


@pytest.mark.parametrize("size", [211, 215, 217])  # a row needs 7 tokens and the one after
def test_each_epoch_visits_all_rows_at_another_offset(size):
    corpus = Corpus(np.arange(size), np.zeros(1, np.int64))
    batches = train_iterator(corpus, Data(length=7, batch_size=6), 3)
    offsets, orders = set(), []
    for _ in range(8):
        epoch = np.concatenate([batch["inputs"] for batch in itertools.islice(batches, 5)])
        first = np.sort(epoch[:, 0])
        offset = first[0]
        expected = np.minimum(np.arange(30) * 7 + offset, size - 8)
        np.testing.assert_array_equal(first, expected)
        assert set(epoch.ravel()) == set(range(offset, min(offset + 210, size - 1)))
        offsets.add(int(offset))
        orders.append(tuple(epoch[:, 0] // 7))
    batches.close()
    assert len(offsets) > 2 and len(set(orders)) == 8
    assert all(list(order) != sorted(order) for order in orders)


def test_seed_decides():
    corpus, data = make_corpus([90, 31, 7]), Data(length=5, batch_size=3)
    one, same, other = (
        [batch["inputs"] for batch in itertools.islice(train_iterator(corpus, data, seed), 9)]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(8, 60),
    steps=st.integers(0, 30),
    more=st.integers(0, 5),
    seed=st.integers(0, 2**40),
)
def test_resume_is_exact(tokens, steps, more, seed):
    corpus, data = make_corpus([4, tokens]), Data(length=7, batch_size=3)
    batches = train_iterator(corpus, data, seed)
    for _ in range(steps):
        next(batches)
    state = json.dumps(batches.get_state())
    expected = list(itertools.islice(batches, 4))
    fresh = train_iterator(corpus, data, seed)
    for _ in range(more):
        next(fresh)
    fresh.set_state(json.loads(state))
    for one, other in zip(expected, itertools.islice(fresh, 4), strict=True):
        assert_batches_equal(one, other)
    batches.close()
    fresh.close()


@pytest.mark.parametrize("count", [2, 3, 6])
def test_processes_together_make_the_whole_batch(count):
    corpus, data = make_corpus([40, 3, 1, 29, 8]), Data(length=7, batch_size=6)

    def parts(make):
        for together in zip(*(make(index) for index in range(count)), strict=True):
            assert {len(part["inputs"]) for part in together} == {6 // count}
            yield {name: np.concatenate([p[name] for p in together]) for name in together[0]}

    def train(index, count=count):
        return itertools.islice(train_iterator(corpus, data, 5, index, count), 7)

    def validation(index, count=count):
        return validation_batches(corpus, data, index, count)

    for make in (train, validation):
        for whole, joined in zip(make(0, 1), parts(make), strict=True):
            assert_batches_equal(whole, joined)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=9),
    length=st.integers(1, 6),
    batch_size=st.integers(1, 5),
)
def test_validation_covers_every_target_once(lengths, length, batch_size):
    corpus = make_corpus(lengths)
    data = Data(length=length, batch_size=batch_size, isolate_documents=False)
    batches = list(validation_batches(corpus, data))
    assert all(batch["inputs"].shape == (batch_size, length) for batch in batches)
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    counted = joined["weights"] > 0
    np.testing.assert_array_equal(joined["inputs"][counted], corpus.tokens[:-1])
    np.testing.assert_array_equal(joined["targets"][counted], corpus.tokens[1:])
    assert (joined["weights"] <= (joined["segment_ids"] > 0)).all()
    isolated = validation_batches(corpus, Data(length=length, batch_size=batch_size))
    weights = sum(float(batch["weights"].sum()) for batch in isolated)
    assert weights == len(corpus) - len(corpus.starts)


def test_validation_can_be_read_again():
    batches = validation_batches(make_corpus([30, 20]), Data(length=4, batch_size=3))
    for one, other in zip(batches, batches, strict=True):
        assert_batches_equal(one, other)
