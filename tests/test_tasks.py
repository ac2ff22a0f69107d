"""Synthetic tasks of long contexts: rows against their definition, what is scored, exact rows."""

import dataclasses

import jax
import numpy as np
import pytest

from bestiary.eval.evaluate import evaluate
from bestiary.train.data import Data, load, train_iterator, validation_batches
from bestiary.train.tasks import FILLER, SYMBOLS, TASKS, is_task, parse, read_task
from bestiary.train.tokenizer import ByteTokenizer
from bestiary.zoo.llama import llama, multi_head, swiglu

LENGTH = 83


def rows(path: str, length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    corpus = read_task(path, ByteTokenizer(), length)
    assert corpus.row == length and corpus.scored is not None
    np.testing.assert_array_equal(corpus.starts, np.arange(0, len(corpus), length))
    return corpus.tokens.reshape(-1, length), corpus.scored.reshape(-1, length)


@pytest.mark.parametrize("pairs, distance, length", [(5, 40, 83), (1, 2, 7), (32, 9, 139)])
def test_queries_are_as_far_behind_their_pairs_as_is_said(
    pairs: int, distance: int, length: int
) -> None:
    starts, nearest = set(), length
    tokens, scored = rows(f"recall:pairs={pairs},distance={distance},rows=200", length)
    assert scored.sum(1).tolist() == [pairs] * 200
    for row, answers in zip(tokens, scored, strict=True):
        (symbols,) = np.nonzero(np.isin(row, SYMBOLS))
        assert len(symbols) == 4 * pairs
        assert np.isin(np.delete(row, symbols), FILLER).all()
        given, asked = symbols[: 2 * pairs : 2], symbols[2 * pairs :: 2]
        assert len(set(row[given])) == pairs  # each key once, and each asked for once
        where = {row[at]: at for at in given}
        assert {row[at] for at in asked} == set(where)
        for at in asked:
            assert answers[at + 1] and row[at + 1] == row[where[row[at]] + 1]
            assert at - where[row[at]] >= distance
            assert row[at + 1] not in row[given]  # a key is never taken for a value
            nearest = min(nearest, at - where[row[at]])
        assert asked[-1] == length - 2
        starts.add(given[0])
    slack = length - (4 * pairs + distance - 2)
    assert starts == set(range(slack + 1)) and nearest <= distance + 2 * pairs


def test_the_needle_is_everywhere_equally_often() -> None:
    tokens, scored = rows("needle:symbols=3,rows=4000")
    np.testing.assert_array_equal(scored, np.arange(LENGTH) >= LENGTH - 3 + np.zeros((4000, 1)))
    depths = []
    for row in tokens:
        (symbols,) = np.nonzero(np.isin(row, SYMBOLS))
        depth = symbols[0]
        np.testing.assert_array_equal(symbols, [*range(depth, depth + 6), *range(77, LENGTH)])
        np.testing.assert_array_equal(row[depth : depth + 6], row[77:])
        depths.append(depth)
    counts = np.bincount(depths, minlength=72)
    assert len(counts) == 72 and counts.min() > 20 and counts.max() < 100  # 56 on average


@pytest.mark.parametrize("symbols", [1, 13, 41])
def test_copies(symbols: int) -> None:
    tokens, scored = rows(f"copy:symbols={symbols},rows=50")
    text = tokens[:, :symbols]
    assert np.isin(text, SYMBOLS).all() and len(np.unique(text, axis=0)) > 25
    np.testing.assert_array_equal(tokens[:, symbols], ord("="))
    np.testing.assert_array_equal(tokens[:, symbols + 1 : 2 * symbols + 1], text)
    assert (tokens[:, 2 * symbols + 1 :] == ord("\n")).all()
    columns = np.arange(LENGTH)
    np.testing.assert_array_equal(
        scored, (columns > symbols) & (columns <= 2 * symbols) & np.ones((50, 1), bool)
    )


@pytest.mark.parametrize("path", ["needle:rows=40", "copy:symbols=9,rows=40"])
def test_long_rows_hold_one_document_and_are_never_cut(path: str) -> None:
    """In training too, where rows of text begin anywhere."""
    data = Data(path=path, length=700, batch_size=5, validation_fraction=0.25)
    _, train, validation = load(data)
    for corpus, batches in (
        (train, train_iterator(train, data, seed=3)),
        (validation, iter(validation_batches(validation, data))),
    ):
        known = {row.tobytes() for row in corpus.tokens.reshape(-1, 700)}
        for _ in range(2):
            batch = next(batches)
            assert {row.astype(np.uint8).tobytes() for row in batch["inputs"]} <= known
            np.testing.assert_array_equal(batch["segment_ids"], 1)
            np.testing.assert_array_equal(batch["positions"], np.arange(700) + np.zeros((5, 1)))
            assert batch["weights"][:, -1].max() == 0
            assert batch["weights"].sum() == 5 * (4 if path[0] == "n" else 9)


@pytest.mark.parametrize("name", TASKS)
def test_same_rows_again_and_others_with_another_seed(name: str) -> None:
    fields = "pairs=3,distance=9,rows=20" if name == "recall" else "rows=20,symbols=5"
    first, again, other = (rows(f"{name}:{fields}{more}")[0] for more in ("", "", ",seed=1"))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_what_is_a_task() -> None:
    assert is_task("needle:") and is_task("copy:symbols=3")
    assert not any(map(is_task, (None, "needle", "text.txt", "needles:", "./copy:")))
    assert dataclasses.asdict(parse("needle:")) == {"rows": 32768, "seed": 0, "symbols": 4}


@pytest.mark.parametrize(
    "path, said",
    [
        ("needle:depth=3", "'depth=3'; need NAME=NUMBER once each, of rows, seed, symbols"),
        ("needle:symbols=0", "symbols=0; need at least 1"),
        ("needle:symbols=21", "a row of 83 tokens is too short; need data.length 84"),
        ("copy:", "a row of 83 tokens is too short; need data.length 129"),
        ("copy:symbols=0", "symbols=0; need at least 1"),
        ("copy:rows=1,symbols=3", "rows=1; need at least 2"),
        ("copy:symbols=3,", "''; need NAME=NUMBER"),
        ("recall:facts=9,distance=9", "distance=9; need pairs, and 2 or more"),
        ("recall:pairs=9,distance=1", "distance=1; need pairs, and 2 or more"),
        ("recall:pairs=33,distance=9", "need at most 32 pairs at a distance"),
        ("recall:pairs=9,distance=50", "a row of 83 tokens is too short; need data.length 84"),
    ],
)
def test_refusals(path: str, said: str) -> None:
    with pytest.raises(ValueError, match="^data.path='") as caught:
        load(Data(path=path, length=LENGTH))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_rows_are_exact_when_all_their_answers_are_right() -> None:
    """Against NumPy."""
    data = Data(path="copy:symbols=2,rows=2000", length=5, batch_size=64)
    model = llama(
        vocab_size=256, num_layers=1, attention=multi_head(8, 1), ffn=swiglu(8, 8), tied=True
    )
    params = model.init(jax.random.key(1))
    _, _, validation = load(data)
    batches = list(validation_batches(validation, data))
    result = evaluate(model, params, batches, np.ones(256))
    exact = count = 0
    for batch in batches:
        logits = np.asarray(jax.jit(model.apply)(params, batch["inputs"])[0])
        right = (logits.argmax(-1) == batch["targets"]) | (batch["weights"] == 0)
        real = batch["weights"].sum(1) > 0
        exact, count = exact + (right.all(1) & real).sum(), count + real.sum()
    assert count == 200 and result.exact_rows == pytest.approx(exact / count)
