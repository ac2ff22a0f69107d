"""Logs of who chose what and when: MovieLens files, CSV tables, and a synthetic log."""

import csv
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bestiary.train.sources import NOT_TEXT, refuse

MOVIELENS = ("user", "item", "rating", "timestamp")
"""Columns of u.data (tabs) and ratings.dat (::), which have no header."""
PLAIN = {".data": "\t", ".base": "\t", ".test": "\t", ".dat": "::"}
"""What stands between these columns, by the file's suffix: ua.base, u1.test and others are parts of
u.data."""
NAMES = {
    "user": ("user", "userid", "user_id"),
    "item": ("item", "itemid", "item_id", "movieid"),
    "rating": ("rating",),
    "timestamp": ("timestamp", "time"),
    "category": ("category", "genres", "genre"),
}
"""What the columns of a table may be called, in any case."""
CATALOGUES = ("movies.dat", "movies.csv", "u.item")
"""Files beside a MovieLens log that say what its items are."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """Interactions sorted by user, then time, then place in the file. Ids count from 1."""

    users: np.ndarray
    """int32 [n]."""
    items: np.ndarray
    """int32 [n]."""
    categories: np.ndarray
    """int32 [num_items + 1]: of every item; 0 where none is known, and for item 0."""
    names: dict[str, list[str]] = field(repr=False)
    """What "user", "item" and "category" 1, 2, ... are called in the files."""

    @property
    def num_users(self) -> int:
        return len(self.names["user"])

    @property
    def num_items(self) -> int:
        return len(self.names["item"])

    @property
    def num_categories(self) -> int:
        return len(self.names["category"])


def read_log(path: str, like: Log | None = None) -> Log:
    """The log in a file, or in a folder that holds one of MovieLens' (u.data, ratings.*).

    u.data: user, item, rating, timestamp between tabs; ratings.dat: the same between "::". Any
    other file is a table with commas, semicolons or tabs, whose header names user, item and
    timestamp, and may name rating, category or genres ("Drama|Comedy": the first counts); other
    columns are left alone. Beside u.data or ratings.*, movies.dat, movies.csv or u.item tells the
    items' genres. Every row is a choice, whatever its rating, and counts once, however often user,
    item and time are repeated.

    With `like`, items and categories are those of that log, by their names, and rows about others
    are left out.

    Raises:
      ValueError: naming the file, and the row (a header is row 1), when it cannot be read, or a row
        has too few or too many fields, an empty id, or a rating or time that is no finite number.
    """
    file = _file(path)
    lines = _lines(file)
    if file.suffix in PLAIN:
        rows = _plain(file, lines, PLAIN[file.suffix])
    else:
        rows = _table(file, lines)
    ids: dict[str, dict[str, int]] = {"user": {}, "item": {}, "category": {}}
    users, items, times, categories = [], [], [], {}
    if like is not None:
        ids["item"] = {name: i for i, name in enumerate(like.names["item"], 1)}

    def number(kind: str, name: str) -> int:
        return ids[kind].setdefault(name, len(ids[kind]) + 1)

    for row, values in rows:
        for kind in ("user", "item"):
            if not values[kind]:
                raise refuse(file, f"row {row}: the {kind} is empty")
        if "rating" in values:
            _number(file, row, "rating", values["rating"])
        time = _number(file, row, "timestamp", values["timestamp"])
        if like is not None and values["item"] not in ids["item"]:
            continue
        times.append(time)
        users.append(number("user", values["user"]))
        items.append(number("item", values["item"]))
        if genre := values.get("category", "").split("|")[0]:
            categories[items[-1]] = number("category", genre)
    if not users:
        raise refuse(file, f"holds no interaction{' with a known item' if like else ''}")
    if like is None:
        for item, genre in _catalogue(file).items():
            if item in ids["item"]:
                categories[ids["item"][item]] = number("category", genre)
        of_item = np.zeros(len(ids["item"]) + 1, np.int32)
        of_item[list(categories)] = list(categories.values())
        names = {kind: list(found) for kind, found in ids.items()}
    else:
        of_item, names = like.categories, like.names | {"user": list(ids["user"])}
    columns = [np.asarray(column) for column in (items, times, users)]
    order = np.lexsort(columns)
    again = np.all([np.diff(column[order]) == 0 for column in columns], 0)
    kept = np.sort(order[np.append(True, ~again)])  # in the order of the file, which decides ties
    order = kept[np.lexsort([column[kept] for column in columns[1:]])]
    return Log(
        users=np.asarray(users, np.int32)[order],
        items=np.asarray(items, np.int32)[order],
        categories=of_item,
        names=names,
    )


def synthetic_log(
    num_users: int = 2000,
    num_items: int = 1000,
    num_topics: int = 20,
    length: int = 20,
    seed: int = 0,
) -> Log:
    """Users who are interested in two or three topics, and choose items of these at random.

    Every item has one topic, and there are as many of each; a user's `length` choices repeat no
    item. Categories join four topics each: they tell something of an item, not its topic.

    Raises:
      ValueError: too few items for `length` different choices from two topics.
    """
    if num_topics < 3 or 2 * (num_items // num_topics) < length:
        raise ValueError(
            f"synthetic log: {num_items} items in {num_topics} topics; need at least 3 topics, and "
            f"{length} items in two of them"
        )
    random = np.random.default_rng(seed)
    topics = random.permutation(np.arange(num_items) % num_topics)
    chosen = []
    for _ in range(num_users):
        liked = random.choice(num_topics, random.integers(2, 4), replace=False)
        chosen.append(random.choice(np.flatnonzero(np.isin(topics, liked)), length, replace=False))
    return Log(
        users=np.repeat(np.arange(1, num_users + 1, dtype=np.int32), length),
        items=np.concatenate(chosen).astype(np.int32) + 1,
        categories=np.append(0, topics // 4 + 1).astype(np.int32),
        names={
            "user": [str(i) for i in range(num_users)],
            "item": [str(i) for i in range(num_items)],
            "category": [str(i) for i in range((num_topics + 3) // 4)],
        },
    )


def _file(path: str) -> Path:
    file = Path(os.path.expanduser(path))
    if file.is_dir():
        known = ("u.data", "ratings.dat", "ratings.csv")
        found = [file / name for name in known if (file / name).is_file()]
        if not found:
            raise refuse(path, f"has none of {', '.join(known)}")
        return found[0]
    if not file.is_file():
        raise refuse(path, "no such file or folder")
    return file


def _lines(file: Path, encoding: str = "utf-8-sig") -> Iterator[str]:
    try:
        with file.open(encoding=encoding, newline="") as lines:
            yield from lines
    except UnicodeDecodeError:
        raise refuse(file, NOT_TEXT) from None
    except OSError as error:
        raise refuse(file, f"cannot be read: {error.strerror or error}") from None


def _plain(file: Path, lines: Iterator[str], separator: str) -> Iterator[tuple[int, dict]]:
    """(row, values by column) of a file without header."""
    for row, line in enumerate(lines, 1):
        if (line := line.strip("\r\n")).strip():
            yield row, _values(file, row, line.split(separator), MOVIELENS)


def _table(file: Path, lines: Iterator[str]) -> Iterator[tuple[int, dict]]:
    """(row, values by column) of a table with a header."""
    first = next(lines, "")
    delimiter = max(",\t;", key=first.count)
    reader = csv.reader(itertools.chain([first], lines), strict=True, delimiter=delimiter)
    row = 0
    try:
        header = next(reader, [])
        columns = [_column(name) for name in header]
        for name in ("user", "item", "timestamp"):
            if columns.count(name) != 1:
                raise refuse(file, f"row 1: need one column {name}, not the header {header}")
        for fields in reader:
            row = reader.line_num
            if any(field.strip() for field in fields):
                yield row, _values(file, row, fields, columns)
    except csv.Error as error:
        raise refuse(file, f"row {reader.line_num}: is not CSV: {error}") from None


def _column(name: str) -> str:
    """What a column of a table means; its own name where nothing is known."""
    plain = name.strip().lower()
    return next((kind for kind, names in NAMES.items() if plain in names), plain)


def _values(file: Path, row: int, fields: list[str], columns: tuple | list) -> dict[str, str]:
    if len(fields) != len(columns):
        raise refuse(file, f"row {row}: {len(fields)} fields; need {len(columns)}")
    return {name: value.strip() for name, value in zip(columns, fields, strict=True)}


def _number(file: Path, row: int, column: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise refuse(file, f"row {row}: {column} {text!r} is no finite number")
    return number


def _catalogue(log: Path) -> dict[str, str]:
    """The first genre of every item, from a file beside a MovieLens log."""
    if log.name not in ("u.data", "ratings.dat", "ratings.csv"):
        return {}
    file = next((log.parent / n for n in CATALOGUES if (log.parent / n).is_file()), None)
    if file is None:
        return {}
    genres = {}
    if file.suffix == ".csv":
        rows = enumerate(csv.reader(_lines(file)), 1)
    else:  # these were written in Latin-1
        separator = "::" if file.suffix == ".dat" else "|"
        lines = _lines(file, "latin-1")
        rows = ((i, line.strip("\r\n").split(separator)) for i, line in enumerate(lines, 1))
    for row, fields in rows:
        least = 24 if file.name == "u.item" else 3
        if fields in ([], [""]) or (row == 1 and file.suffix == ".csv"):
            continue
        if len(fields) < least:
            raise refuse(file, f"row {row}: {len(fields)} fields; need {least}")
        if file.name == "u.item":  # a 1 for each of 19 genres at the end
            genres[fields[0]] = f"genre {fields[-19:].index('1')}" if "1" in fields[-19:] else ""
        else:
            genres[fields[0]] = fields[-1].split("|")[0]
    return {item: genre for item, genre in genres.items() if genre}
