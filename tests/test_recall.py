"""Key-value recall: rows against their definition, what is scored, refusals, accuracy."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from bestiary.__main__ import main
from bestiary.eval.evaluate import evaluate
from bestiary.train.checkpoint import save_run
from bestiary.train.data import Data, load, train_iterator, validation_batches
from bestiary.train.experiment import load_experiment
from bestiary.train.tasks import SYMBOLS, Recall, read_task
from bestiary.train.tokenizer import ByteTokenizer
from bestiary.zoo.llama import llama, multi_head, swiglu

LENGTH = 29


def rows(path: str) -> list[str]:
    corpus = read_task(path, ByteTokenizer(), LENGTH)
    return [ByteTokenizer().decode(row) for row in corpus.tokens.reshape(-1, LENGTH)]


@pytest.mark.parametrize("facts, width", [(7, 1), (64, 1), (65, 2), (4096, 2), (5000, 3)])
def test_facts_are_one_table_seen_equally_often(facts: int, width: int) -> None:
    table: dict[str, str] = {}
    seen: dict[str, int] = {}
    units = LENGTH // (width + 1)
    for row in rows(f"recall:facts={facts},rows=2000"):
        assert row[units * (width + 1) :].strip("\n") == ""
        for i in range(0, units * (width + 1), width + 1):
            key, value = row[i : i + width], row[i + width]
            assert table.setdefault(key, value) == value
            seen[key] = seen.get(key, 0) + 1
    assert len(table) == facts
    assert max(seen.values()) - min(seen.values()) <= 1


@pytest.mark.parametrize("pairs", [1, 5, 13])
def test_pairs_are_new_in_each_row_and_answer_its_queries(pairs: int) -> None:
    first = []
    for row in rows(f"recall:pairs={pairs},rows=50"):
        units = [row[i : i + 2] for i in range(0, LENGTH - 1, 2)]
        known = {unit[0]: unit[1] for unit in units[:pairs]}
        assert len(known) == pairs
        assert all(known[unit[0]] == unit[1] for unit in units[pairs:])
        first.append(units[0])
    assert len(set(first)) > 25


@pytest.mark.parametrize(
    "path, scored", [("facts=300", slice(2, 27, 3)), ("pairs=4", slice(9, 28, 2))]
)
def test_rows_are_whole_and_only_answers_count(path: str, scored: slice) -> None:
    data = Data(
        path=f"recall:{path},rows=100", length=LENGTH, batch_size=5, validation_fraction=0.25
    )
    _, train, validation = load(data)
    whole = {row.tobytes() for row in train.tokens.reshape(-1, LENGTH)}
    held = {row.tobytes() for row in validation.tokens.reshape(-1, LENGTH)}
    assert len(whole) == 75 and len(held) == 25
    expected = np.zeros(LENGTH, np.float32)
    expected[scored] = 1
    batches = train_iterator(train, data, seed=5)
    for known, batch in [(whole, next(batches)), (whole, next(batches))] + [
        (held, batch) for batch in validation_batches(validation, data)
    ]:
        for tokens, targets, weights in zip(
            batch["inputs"], batch["targets"], batch["weights"], strict=True
        ):
            assert tokens.astype(np.uint8).tobytes() in known
            # a row's first token is no target of it
            np.testing.assert_array_equal(weights[:-1], expected[1:])
            np.testing.assert_array_equal(targets[:-1], tokens[1:])
            assert weights[-1] == 0


def test_same_rows_again_and_others_with_another_seed() -> None:
    assert rows("recall:facts=90") == rows("recall:facts=90")
    assert rows("recall:facts=90") != rows("recall:facts=90,seed=1")


@pytest.mark.parametrize(
    "path, said",
    [
        ("recall:", "exactly one of facts and pairs"),
        (
            "recall:fact=3",
            "'fact=3'; need NAME=NUMBER once each, of rows, seed, facts, pairs, distance",
        ),
        ("recall:facts=-3", "need NAME=NUMBER"),
        ("recall:facts=3,facts=4", "once each"),
        ("recall:rows=9", "exactly one of facts and pairs"),
        ("recall:facts=3,pairs=4", "exactly one of facts and pairs"),
        ("recall:facts=16777217", "at most 16777216 facts"),
        ("recall:pairs=65", "or 64 pairs"),
        ("recall:facts=3,rows=1", "rows=1; need at least 2"),
        ("recall:pairs=14", "a row of 29 tokens is too short; need data.length 30"),
    ],
)
def test_refusals(path: str, said: str) -> None:
    with pytest.raises(ValueError, match="^data.path='recall:") as caught:
        load(Data(path=path, length=LENGTH))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_another_tokeniser_is_refused() -> None:
    with pytest.raises(ValueError, match="need data.tokenizer='bytes'"):
        read_task("recall:facts=3", None, LENGTH)  # type: ignore[arg-type]


def test_accuracy_is_reported_of_answers(tmp_path, capsys: pytest.CaptureFixture) -> None:
    """Against argmax in NumPy, and by the command."""
    data = Data(path="recall:facts=40,rows=30", length=LENGTH, batch_size=4)
    model = llama(
        vocab_size=256, num_layers=1, attention=multi_head(16, 2), ffn=swiglu(16, 24), tied=True
    )
    params = model.init(jax.random.key(1))
    _, _, validation = load(data)
    batches = list(validation_batches(validation, data))
    hits = count = 0
    for batch in batches:
        logits = np.asarray(jax.jit(model.apply)(params, batch["inputs"])[0])
        hits += (batch["weights"] * (logits.argmax(-1) == batch["targets"])).sum()
        count += batch["weights"].sum()
    result = evaluate(model, params, batches, np.ones(256))
    assert count == result.tokens == 3 * (LENGTH // 2)
    np.testing.assert_allclose(result.accuracy, hits / count, rtol=1e-6)

    experiment = replace(load_experiment("tiny"), model=model, data=data)
    save_run(tmp_path / "run", experiment, params)
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    np.testing.assert_allclose(json.loads(capsys.readouterr().out)["accuracy"], result.accuracy)


def test_keys_are_as_short_as_they_can_be() -> None:
    assert len(set(SYMBOLS.tolist())) == 64 and SYMBOLS.max() < ByteTokenizer.eos
    assert [Recall(facts=n).key_width for n in (64, 65, 4097)] == [1, 2, 3]
