"""Logs of interactions: every format, what is malformed, samples against loops, and metrics."""

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bestiary.eval.ranking import auc, gauc, relative_improvement
from bestiary.layers import Relu
from bestiary.train.interaction_log import Log, read_log, synthetic_log
from bestiary.train.interactions import Interactions
from bestiary.zoo.din import din

ROWS = [
    ("7", "40", "3", "100"),
    ("7", "41", "5", "50"),
    ("2", "40", "1", "7"),
    ("7", "9", "4", "50"),
]
"""User, item, rating, timestamp: user 7 took 41 and then, at the same time, 9; later 40."""


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def named(log: Log) -> list[tuple[str, str, str]]:
    """(user, item, category) in the log's order, as the files call them."""
    users, items, categories = (["-", *log.names[kind]] for kind in ("user", "item", "category"))
    return [
        (users[u], items[i], categories[log.categories[i]])
        for u, i in zip(log.users, log.items, strict=True)
    ]


MOVIES = "40::A Film: One (1990)::Drama|War\n9::Other (1991)::Comedy\n500::Unseen::Drama\n"
SHEET = 'movieId,title,genres\n40,"A, B",Drama|War\n9,C,Comedy\n'
FLAGS = "40|A|01-Jan-1990||u|" + "|".join("0001000010000000000") + "\n"
U_ITEM = FLAGS.replace("40|A", "9|B").replace("0|0|0|1", "0|1|0|0", 1) + FLAGS


@pytest.mark.parametrize(
    "files, categories",
    [
        ({"u.data": "\n".join("\t".join(r) for r in ROWS) + "\n"}, ("-", "-", "-")),
        ({"ratings.dat": "\r\n".join("::".join(r) for r in ROWS)}, ("-", "-", "-")),
        (
            {"ratings.dat": "\n".join("::".join(r) for r in ROWS), "movies.dat": MOVIES},
            ("-", "Comedy", "Drama"),
        ),
        (
            {
                "ratings.csv": "userId,movieId,rating,timestamp\n"
                + "\n".join(",".join(r) for r in ROWS),
                "movies.csv": SHEET,
            },
            ("-", "Comedy", "Drama"),
        ),
        (
            {"u.data": "\n".join("\t".join(r) for r in ROWS), "u.item": U_ITEM},
            ("-", "genre 1", "genre 3"),
        ),
        (
            {
                "clicks.csv": "timestamp,User,ITEM,genres,note\n100,7,40,Drama|War,x\n50,7,41,,\n\n"
                '7,2,40,Drama,"a, b"\n5e1,7,9,Comedy,\n'
            },
            ("-", "Comedy", "Drama"),
        ),
        (  # a row that is there again, and a line of spaces
            {
                "clicks.tsv": "user\titem\ttime\n7\t40\t100\n7\t41\t50\n \n7\t41\t50\n7\t9\t50\n"
                "7\t40\t100\n2\t40\t7\n"
            },
            ("-", "-", "-"),
        ),
        ({"u1.base": "\n".join("\t".join(r) for r in ROWS)}, ("-", "-", "-")),
    ],
)
def test_formats(files: dict[str, str], categories: tuple, tmp_path: Path) -> None:
    """Sorted by user in order of appearance, time, and place in the file."""
    for name, text in files.items():
        write(tmp_path / name, text)
    first, second, third = categories
    expected = [("7", "41", first), ("7", "9", second), ("7", "40", third), ("2", "40", third)]
    assert named(read_log(str(tmp_path / next(iter(files))))) == expected
    if {"u.data", "ratings.dat", "ratings.csv"} & files.keys():
        assert named(read_log(str(tmp_path))) == expected


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("u.data", "1\t2\t3\t4\n1\t2\t3\n", "row 2: 3 fields; need 4"),
        ("u.data", "1\t2\t3\t4\n\t2\t3\t4\n", "row 2: the user is empty"),
        ("ratings.dat", "1::2::3::x\n", "row 1: timestamp 'x' is no finite number"),
        ("ratings.dat", "1::2::3::nan\n", "row 1: timestamp 'nan' is no finite number"),
        ("ratings.dat", "1:2:3:4\n", "row 1: 1 fields; need 4"),
        ("u1.base", "1\t2\t3\t4\n1\t3\tNaN\t4\n", "row 2: rating 'NaN' is no finite number"),
        ("ratings.csv", "userId,movieId,rating,timestamp\n1,2,x,4\n", "row 2: rating 'x' is no"),
        ("a.csv", "user,item,timestamp\n1,2,3\n1,,3\n", "row 3: the item is empty"),
        ("a.csv", "user,item,timestamp\n1,2,3\n1,2,3,4\n", "row 3: 4 fields; need 3"),
        ("a.csv", "user,item,timestamp\n1,2,inf\n", "row 2: timestamp 'inf' is no finite number"),
        (
            "a.csv",
            "user,item,when\n1,2,3\n",
            "row 1: need one column timestamp, not the header ['user', 'item', 'when']",
        ),
        (
            "a.csv",
            "user,item,item_id,timestamp\n",
            "row 1: need one column item, not the header ['user', 'item', 'item_id', 'timestamp']",
        ),
        ("a.csv", "", "row 1: need one column user, not the header []"),
        ("a.csv", "user,item,timestamp\n", "holds no interaction"),
        ("a.csv", 'user,item,timestamp\n1,"2"x,3\n', "row 2: is not CSV: "),
    ],
)
def test_malformed_logs(name: str, text: str, message: str, tmp_path: Path) -> None:
    """One line that names the file and the row."""
    path = write(tmp_path / name, text)
    with pytest.raises(ValueError) as error:
        read_log(path)
    assert str(error.value).startswith(f"data.path={path!r}: {message}")
    assert "\n" not in str(error.value)


def test_other_sources_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.csv").write_bytes(b"user,item,timestamp\n\xff\xfe,1,2\n")
    for path, message in (
        (tmp_path / "binary.csv", "must be UTF-8 text (convert it first, e.g. with iconv)"),
        (tmp_path / "none.csv", "no such file or folder"),
        (tmp_path, "has none of u.data, ratings.dat, ratings.csv"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"data.path={str(path)!r}: {message}")):
            read_log(str(path))
    write(tmp_path / "u.data", "1\t2\t3\t4\n")
    movies = write(tmp_path / "movies.dat", "2::Name::Drama\n3:Name\n")
    with pytest.raises(ValueError, match=re.escape(f"{movies!r}: row 2: 1 fields; need 3")):
        read_log(str(tmp_path))


def by_user(log: Log) -> dict[int, list[int]]:
    groups = itertools.groupby(
        zip(log.users.tolist(), log.items.tolist(), strict=True), lambda x: x[0]
    )
    return {user: [item for _, item in rows] for user, rows in groups}


def test_samples_equal_a_loop(tmp_path: Path) -> None:
    """Histories, candidates, labels and counts; the last choice of each user is held out."""
    rng = np.random.default_rng(0)
    rows = [(user, rng.integers(12), t) for user, n in enumerate((1, 2, 5, 9)) for t in range(n)]
    rng.shuffle(rows)
    lines = [f"u{user},i{item},{t},c{item % 3}" for user, item, t in rows]
    path = write(
        tmp_path / "log.csv", "\n".join(["user,item,timestamp,category", *lines, lines[3]])
    )
    data = Interactions(path=path, length=4, batch_size=6)
    loaded = data.load()
    log = loaded.log
    number = {
        kind: {name: i for i, name in enumerate(log.names[kind], 1)} for kind in ("user", "item")
    }
    train, validation = [], []
    for user in log.names["user"]:  # from the rows themselves: what came before, by the clock
        mine = sorted((t, number["item"][f"i{i}"]) for u, i, t in rows if f"u{u}" == user)
        for k in range(1, len(mine)):
            kept = [item for t, item in mine if t < mine[k][0]][-4:]
            row = (number["user"][user], mine[k][1], [0] * (4 - len(kept)) + kept)
            (validation if k == len(mine) - 1 else train).append(row)
    counts = np.zeros(log.num_items + 1)
    for rows, expected in ((loaded.training_rows, train), (loaded.validation_rows, validation)):
        batch = loaded.prepare(rows)
        positives = {name: x[::2] for name, x in batch.items()}
        assert positives["labels"].all() and not batch["labels"][1::2].any()
        assert positives["user"].tolist() == [user for user, _, _ in expected]
        assert positives["item"].tolist() == [item for _, item, _ in expected]
        assert positives["history"].tolist() == [history for _, _, history in expected]
        np.testing.assert_array_equal(batch["history"][1::2], positives["history"])
        np.testing.assert_array_equal(batch["category"], log.categories[batch["item"]])
        np.testing.assert_array_equal(batch["history_category"], log.categories[batch["history"]])
        chosen = by_user(log)
        pairs = zip(batch["user"][1::2], batch["item"][1::2], strict=True)
        assert all(item not in chosen[user] and item > 0 for user, item in pairs)
        if expected is train:
            for ids in (batch["item"], batch["history"]):
                np.add.at(counts, ids, 1)
    counts[0] = 0
    np.testing.assert_array_equal(loaded.counts, counts)
    np.testing.assert_array_equal(
        loaded.category_counts[1:], np.bincount(log.categories, counts)[1:]
    )
    # as the experiment reads them: every shape as declared, the order reproducible
    batch, again = (next(loaded.train(seed=1)) for _ in range(2))
    for name, param in data.declare().items():
        assert batch[name].shape == param.shape and batch[name].dtype == param.dtype, name
        np.testing.assert_array_equal(batch[name], again[name])
    held_out = list(loaded.validation())
    assert sum(b["weights"].sum() for b in held_out) == 2 * len(validation)


def test_a_model_keeps_its_items_on_another_log(tmp_path: Path) -> None:
    """Ids are those of the log that it learned from, by name; what it does not know is left out."""
    head = "user,item,timestamp,category\n"
    old = write(tmp_path / "old.csv", head + "a,x,1,A\na,y,2,B\na,z,3,A\nb,w,1,B\n")
    new = write(tmp_path / "new.csv", head + "c,y,3,\nc,new,2,C\nc,z,1,B\nc,x,4,\n")
    data = Interactions(path=old).elsewhere(new)
    assert data == Interactions(path=new, like=old) == data.elsewhere(new)
    log = data.load().log
    assert named(log) == [("c", "z", "A"), ("c", "y", "B"), ("c", "x", "A")]
    assert log.num_items == 4 and log.items.tolist() == [3, 2, 1]
    write(tmp_path / "new.csv", head + "c,new,2,C\n")
    with pytest.raises(ValueError, match="new.csv': holds no interaction with a known item"):
        data.load()
    with pytest.raises(ValueError, match="the model knows items of the synthetic log only"):
        Interactions().elsewhere(new)


def test_negatives_are_uniform_over_what_was_not_chosen(tmp_path: Path) -> None:
    lines = [f"{user},{item},{item}" for user in range(500) for item in (0, 1, 2)]
    lines += [f"x,{item},0" for item in range(3, 9)]
    path = write(tmp_path / "log.csv", "user,item,timestamp\n" + "\n".join(lines))
    loaded = Interactions(path=path).load()
    drawn = np.concatenate(
        [rows["item"][1::2] for rows in (loaded.training_rows, loaded.validation_rows)]
    )[:1000]
    names = [loaded.log.names["item"][i - 1] for i in drawn]
    counts = {name: names.count(name) for name in set(names)}
    assert set(counts) <= {str(i) for i in range(9)}
    others = [counts[str(i)] for i in range(3, 9)]
    assert min(others) > 1000 / 6 * 0.7 and max(others) < 1000 / 6 * 1.3


def test_synthetic_log() -> None:
    log = synthetic_log(num_users=50, num_items=200, num_topics=10, length=15, seed=3)
    assert all(len(set(items)) == 15 for items in by_user(log).values())
    again = synthetic_log(num_users=50, num_items=200, num_topics=10, length=15, seed=3)
    np.testing.assert_array_equal(log.items, again.items)
    assert log.num_categories == 3 and log.categories.max() == 3


@pytest.mark.parametrize(
    "run, message",
    [
        (lambda p: Interactions(path=""), "data.path='' must name a file or folder"),
        (
            lambda p: Interactions(like="a.csv"),
            "data.like='a.csv' is for another log; need data.path as well",
        ),
        (lambda p: Interactions(length=0), "data.length=0 must be at least 1"),
        (lambda p: Interactions(seed=-1), "data.seed=-1 must not be negative"),
        (
            lambda p: synthetic_log(num_items=10, length=20),
            "synthetic log: 10 items in 20 topics; need at least 3 topics, and 20 items in two of "
            "them",
        ),
        (
            lambda p: Interactions(path=write(p, "user,item,timestamp\na,1,1\na,2,2\n")).load(),
            "data.path={p!r}: user 'a' has chosen every item; no negative",
        ),
        (
            lambda p: Interactions(path=write(p, "user,item,timestamp\na,1,1\nb,2,2\n")).load(),
            "data.path={p!r}: no user has 3 interactions, nothing to train on",
        ),
        (
            lambda p: Interactions().load().check(Relu()),
            "model: Relu reads no interactions; need a DIN",
        ),
        (
            lambda p: Interactions().load().check(din(num_items=3)),
            "model.num_items: 3; need at least the log's 1000",
        ),
        (
            lambda p: Interactions().load().check(din(num_items=1000, num_categories=2)),
            "model.num_categories: 2; need 0 or at least the log's 5",
        ),
    ],
)
def test_refuses(run: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    message = message.replace("{p!r}", repr(str(path)))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run(path)


# --- metrics --------------------------------------------------------------------------------------


def slow_auc(labels: Any, scores: Any) -> float:
    pairs = [
        (p > n) + 0.5 * (p == n)
        for p, y in zip(scores, labels, strict=True)
        if y
        for n, z in zip(scores, labels, strict=True)
        if not z
    ]
    return float(np.mean(pairs)) if pairs else float("nan")


ROW = st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(-2, 2))


@settings(max_examples=200, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=30))
def test_metrics_equal_all_pairs(rows: list) -> None:
    users, labels, scores = map(np.array, zip(*rows, strict=True))
    assert auc(labels, scores) == pytest.approx(slow_auc(labels, scores), nan_ok=True)
    total = weight = 0.0
    for user in set(users.tolist()):
        mine = users == user
        own = slow_auc(labels[mine], scores[mine])
        if own == own:
            total, weight = total + own * mine.sum(), weight + mine.sum()
    expected = total / weight if weight else float("nan")
    assert gauc(users, labels, scores) == pytest.approx(expected, nan_ok=True)


def test_improvement_and_refusals() -> None:
    assert relative_improvement(0.8, 0.75) == pytest.approx(0.2)
    for run, message in (
        (lambda: auc([0, 2], [1, 2]), "labels: need 0 and 1 only"),
        (lambda: auc([0, 1], [1.0, np.nan]), "scores: NaN cannot be ranked"),
        (lambda: auc([0, 1], [1.0]), "scores: 1 for 2 labels; need one each"),
        (lambda: gauc([1], [0, 1], [1, 2]), "users: shape (1,) with 2 labels; need one each"),
        (lambda: relative_improvement(0.6, 0.5), "base: 0.5; need an AUC other than chance"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            run()
