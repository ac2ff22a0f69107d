"""Evaluation: against float64 NumPy, over batches and padding, and the command."""

import dataclasses
import functools
import json
import math
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.eval import evaluate as evaluation
from bestiary.eval.caching import Caching, with_cache
from bestiary.eval.evaluate import Evaluate, count_bytes, evaluate
from bestiary.layers.attention import Attention
from bestiary.layers.base import Context
from bestiary.layers.spark import SparkFFN
from bestiary.train.corpus import Corpus
from bestiary.train.data import Data, cut_rows, validation_batches
from bestiary.train.tokenizer import ByteTokenizer, load_tokenizer
from bestiary.zoo.gemma2 import gemma2
from bestiary.zoo.llama import llama

DIM, VOCAB = 24, 256
SPARK = SparkFFN(dim=DIM, hidden=40, predictor_dim=11, top_k=7)
ATTENTION = Attention(dim=DIM, num_heads=4, num_kv_heads=2, head_dim=8)
MODEL = llama(vocab_size=VOCAB, num_layers=3, attention=ATTENTION, ffn=SPARK)
LENGTH = 13


@functools.cache
def weights(model=MODEL):
    return model.init(jax.random.key(0))


@functools.cache
def corpus(documents=(31, 5, 44, 12)):
    lengths = np.array(documents)
    tokens = np.random.default_rng(0).integers(0, 255, lengths.sum()).astype(np.uint8)
    tokens[np.cumsum(lengths) - 1] = ByteTokenizer.eos
    return Corpus(tokens, np.cumsum(lengths) - lengths)


def batches(batch_size, **fields):
    data = Data(length=LENGTH, batch_size=batch_size, **fields)
    return list(validation_batches(corpus(), data))


@functools.cache
def measured(batch_size):
    return evaluate(MODEL, weights(), batches(batch_size), count_bytes(ByteTokenizer(), VOCAB))


def test_equals_a_float64_computation_document_by_document():
    """Each row's documents forwarded by themselves; the loss from logits in float64."""
    params = weights()
    apply = jax.jit(lambda tokens: MODEL.apply(params, tokens)[0])
    nats = tokens = num_bytes = 0
    for first in range(0, len(corpus()) - 1, LENGTH):
        row = cut_rows(corpus(), np.array([first]), LENGTH, isolate=True)
        for segment in range(1, row["segment_ids"].max() + 1):
            inside = row["segment_ids"][0] == segment
            size = inside.sum()
            inputs = np.pad(row["inputs"][0, inside], (0, LENGTH - size))
            z = np.asarray(apply(inputs[None])[0, :size], np.float64)
            log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
            targets, counts = row["targets"][0, inside], row["weights"][0, inside] > 0
            nats -= log_p[np.arange(size), targets][counts].sum()
            tokens += counts.sum()
            num_bytes += (targets[counts] != ByteTokenizer.eos).sum()
    result = measured(2)
    assert (result.tokens, result.bytes) == (tokens, num_bytes)
    assert num_bytes < tokens < len(corpus())
    np.testing.assert_allclose(result.nats_per_token, nats / tokens, rtol=1e-6)
    np.testing.assert_allclose(result.perplexity, np.exp(nats / tokens), rtol=1e-5)
    np.testing.assert_allclose(result.bits_per_byte, nats / np.log(2) / num_bytes, rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_batch_size_and_padding_rows_do_not_matter(batch_size):
    """92 tokens are 7 rows of 13: no padding row in batches of 1 and 7, one and two in others."""
    result, expected = measured(batch_size), measured(2)
    assert (result.tokens, result.bytes) == (expected.tokens, expected.bytes)
    np.testing.assert_allclose(result.nats_per_token, expected.nats_per_token, rtol=1e-6)
    np.testing.assert_allclose(result.bits_per_byte, expected.bits_per_byte, rtol=1e-6)


@pytest.mark.parametrize("chunk", [4, 13])
def test_reading_by_way_of_the_cache_measures_the_same(chunk):
    """Documents of packed rows, and padding, in chunks that do and do not divide a row."""
    counts = count_bytes(ByteTokenizer(), VOCAB)
    result, expected = evaluate(MODEL, weights(), batches(3), counts, chunk), measured(2)
    assert (result.tokens, result.bytes) == (expected.tokens, expected.bytes)
    np.testing.assert_allclose(result.nats_per_token, expected.nats_per_token, rtol=1e-5)


def test_nonzero_shares_are_those_of_the_layers():
    (path, shares), *others = measured(7).nonzero.items()
    assert path == "blocks/ffn/nonzero" and len(shares) == 3 and not others
    assert all(0.05 < share < 0.35 for share in shares)
    batch = batches(7)[0]
    positions, segments = jnp.asarray(batch["positions"]), jnp.asarray(batch["segment_ids"])
    ctx = Context(positions=positions, segment_ids=segments)
    aux = jax.jit(MODEL.apply)(weights(), batch["inputs"], ctx)[2]
    np.testing.assert_allclose(shares, aux.metrics["blocks"]["ffn"]["nonzero"], rtol=1e-6)


def test_unlike_layers_have_paths_of_their_own():
    model = gemma2(vocab_size=VOCAB, num_layers=4, attention=ATTENTION, ffn=SPARK, window=5)
    result = evaluate(model, weights(model), batches(7), count_bytes(ByteTokenizer(), VOCAB))
    assert {path: len(shares) for path, shares in result.nonzero.items()} == {
        "blocks/0/ffn/nonzero": 2,
        "blocks/1/ffn/nonzero": 2,
    }


def test_one_compilation():
    program: Any = evaluation.batch_sums
    before = program._cache_size()
    assert len(batches(1)) > 1
    evaluate(MODEL, weights(), batches(1) + batches(1), np.zeros(VOCAB + 1))
    assert program._cache_size() == before + 1


def test_targets_without_bytes_have_no_bits_per_byte():
    result = evaluate(MODEL, weights(), batches(2), np.zeros(VOCAB))
    assert result.bytes == 0 and math.isnan(result.bits_per_byte)


def test_nothing_to_measure_is_refused():
    empty = batches(2)[:1]
    empty[0]["weights"] = np.zeros_like(empty[0]["weights"])
    for given in ([], empty):
        with pytest.raises(ValueError, match="^batches: no target has a weight"):
            evaluate(MODEL, weights(), given, np.zeros(VOCAB))


def test_bytes_of_byte_tokens():
    expected = np.array([1] * 255 + [0] * 5)
    np.testing.assert_array_equal(count_bytes(ByteTokenizer(), 260), expected)


@pytest.mark.parametrize("text", ["The thesis there.\n", "Größe, 語 and 🐍"])
def test_bytes_of_subword_tokens_add_up(text, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    pieces = [*(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"thesr", "th", "the", "\u2581the"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the")]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, byte_fallback=True))
    made.add_special_tokens(["</s>"])
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    counts = count_bytes(tokenizer, tokenizer.vocab_size + 3)
    assert tokenizer.eos is not None and counts[tokenizer.eos] == 0 and not counts[-3:].any()
    ids = tokenizer.encode(text)
    # this tokeniser puts a space in front of the text
    assert counts[ids].sum() == len(text.encode()) + 1


def test_bytes_of_parts_of_characters_add_up(tmp_path):
    """At the level of bytes, with tokens that end inside a character."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    text = "語 🐍"
    first, second, *_ = tokenizers.pre_tokenizers.ByteLevel(False).pre_tokenize_str(text)[0][0]
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, first + second])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [(first, second)]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    ids = tokenizer.encode(text)
    assert ids[0] == len(alphabet) and len(ids) == len(text.encode()) - 1
    assert count_bytes(tokenizer, tokenizer.vocab_size)[ids].sum() == len(text.encode())


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    """A run on a text file of 130 tokens, of which the last half is for validation."""
    (tmp_path / "text.txt").write_text("0123456789" * 13)
    data = Data(
        path=str(tmp_path / "text.txt"), length=LENGTH, batch_size=2, validation_fraction=0.5
    )
    run = SimpleNamespace(model=MODEL, data=data), weights()
    module = SimpleNamespace(load_run=lambda path: run)
    monkeypatch.setitem(sys.modules, "bestiary.train.checkpoint", module)
    return tmp_path


def evaluated(capsys, **options):
    evaluation.run(Evaluate(run_dir="x", json=True, **options))
    return json.loads(capsys.readouterr().out)


def test_the_command_takes_the_validation_split_or_other_text(loaded, capsys):
    result = evaluated(capsys)
    assert list(result) == [field.name for field in dataclasses.fields(evaluation.Evaluation)]
    assert result["tokens"] == result["bytes"] == 64
    assert evaluated(capsys, steps=1)["tokens"] == 2 * LENGTH
    (loaded / "other.txt").write_text("abc" * 11)
    assert evaluated(capsys, data_path=str(loaded / "other.txt"))["tokens"] == 32


def test_the_command_measures_under_a_cache_policy(loaded, capsys):
    whole = evaluated(capsys)
    full = evaluated(capsys, caching=Caching(cache="full"))
    np.testing.assert_allclose(full["perplexity"], whole["perplexity"], rtol=1e-4)
    assert full["cache"]["bytes_per_token"] == full["cache"]["full_bytes_per_token"]
    few = evaluated(capsys, caching=Caching(cache="h2o", cache_budget=4), cache_chunk=1)
    assert few["tokens"] == whole["tokens"] and few["perplexity"] != whole["perplexity"]
    assert few["cache"]["policy"] == "h2o" and few["cache"]["length"] == LENGTH
    assert few["cache"]["bytes_per_token"] < 0.5 * few["cache"]["full_bytes_per_token"]
    evaluation.run(Evaluate(run_dir="x", caching=Caching(cache="sinks-window", cache_budget=5)))
    said = capsys.readouterr().out
    for word in ("sinks-window", "bytes per token at 13", "full cache"):
        assert word in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(cache_budget=9), "cache_budget: 9 beside cache unset; need cache sinks-window or "),
        (dict(cache="full", cache_sinks=2), "cache_sinks: 2 beside cache full; need cache sinks-"),
        (dict(cache="kivi4", cache_budget=9), "cache_budget: 9 beside cache kivi4; need cache "),
        (dict(cache="h2o", cache_budget=1), "cache_budget: 1; need at least 2"),
        (dict(cache="h2o", cache_budget=8, cache_recent=8), "cache_recent: 8; need 1 to 7 of "),
        (dict(cache="kivi2", cache_residual=40), "residual: 40; need a multiple of group_size 32"),
    ],
)
def test_impossible_cache_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Caching(**settings)


def test_a_model_without_a_mixer_for_the_policy_is_refused():
    windows = dataclasses.replace(ATTENTION, window=5)
    model = llama(vocab_size=VOCAB, num_layers=1, attention=windows, ffn=SPARK)
    with pytest.raises(ValueError, match="^cache: the model has Attention with window 5; none "):
        with_cache(model, Caching(cache="h2o").policy())
    mixed = gemma2(vocab_size=VOCAB, num_layers=2, attention=ATTENTION, ffn=SPARK, window=5)
    changed, others = with_cache(mixed, Caching(cache="h2o").policy())
    assert others == ["Attention with window 5"] and changed != mixed


def test_the_command_prints_tables(loaded, capsys):
    evaluation.run(Evaluate(run_dir="x"))
    said = capsys.readouterr().out
    for word in ("nats per token", "bits per byte", "perplexity", "blocks/ffn", "%"):
        assert word in said


def test_the_command_refuses_what_it_cannot_use(loaded, tmp_path):
    with pytest.raises(ValueError, match="^steps: 0; need at least 1$"):
        Evaluate(run_dir="x", steps=0)
    with pytest.raises(ValueError, match="^cache_chunk: 0; need at least 1$"):
        Evaluate(run_dir="x", cache_chunk=0)
    with pytest.raises(
        ValueError, match="^cache_chunk: 1; snapkv chooses by the tokens of a chunk"
    ):
        Evaluate(run_dir="x", caching=Caching(cache="snapkv"), cache_chunk=1)
    with pytest.raises(ValueError, match=r"^data.path[^\n]+$"):
        evaluation.run(Evaluate(run_dir="x", data_path=str(tmp_path / "none.txt")))


def test_the_command_refuses_a_folder_without_a_run(tmp_path):
    pytest.importorskip("bestiary.train.checkpoint")
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        evaluation.run(Evaluate(run_dir=str(tmp_path / "none")))
