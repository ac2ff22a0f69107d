"""Tables of numbers to fit a function to: from a CSV or npz file."""

import csv
import math
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

EXAMPLE = "exp(sin(pi*x) + y**2)"


class Samples(NamedTuple):
    """Rows of inputs and one target."""

    x: np.ndarray  # float64 [n, inputs]
    y: np.ndarray  # float64 [n]
    names: tuple[str, ...]
    """Of the inputs."""
    target: str


def example(n: int = 2000, seed: int = 0) -> Samples:
    """`EXAMPLE` at random points of [-1, 1]^2."""
    x = np.random.default_rng(seed).uniform(-1, 1, (n, 2))
    return Samples(x, np.exp(np.sin(np.pi * x[:, 0]) + x[:, 1] ** 2), ("x", "y"), "f")


def read(path: str, target: str | None = None) -> Samples:
    """From .csv (or .tsv), whose first line may name the columns and of which the column `target`
    (a name, or a number from 1; None: the last) is learned from the others; or from .npz with x [n]
    or [n, inputs] and y [n].

    Raises ValueError naming the file, and the line and column of what is wrong.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{path}: no such file; need .csv, .tsv or .npz")
    if file.suffix == ".npz":
        if target is not None:
            raise ValueError(f"target: {target!r}; an .npz file has its target under the name y")
        return _read_npz(file)
    if file.suffix not in (".csv", ".tsv", ".txt"):
        raise ValueError(f"{path}: {file.suffix or 'no suffix'}; need .csv, .tsv or .npz")
    names, table = _read_csv(file)
    at = _column(names, target)
    others = [i for i in range(len(names)) if i != at]
    return _checked(
        file, Samples(table[:, others], table[:, at], tuple(names[i] for i in others), names[at])
    )


def _column(names: list[str], target: str | None) -> int:
    if target is None:
        return len(names) - 1
    if target in names:
        return names.index(target)
    if target.isdecimal() and 1 <= int(target) <= len(names):
        return int(target) - 1
    raise ValueError(f"target: {target!r}; need one of {', '.join(names)}, or 1 to {len(names)}")


def _read_csv(file: Path) -> tuple[list[str], np.ndarray]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from None
    first = text.lstrip().partition("\n")[0]
    delimiter = max(("\t", ";", ","), key=first.count)
    reader = csv.reader(text.splitlines(), delimiter=delimiter, skipinitialspace=True)
    names: list[str] = []
    rows: list[list[float]] = []
    for cells in reader:
        line = reader.line_num
        if not any(cell.strip() for cell in cells):
            continue
        if not names:
            if len(cells) < 2:
                raise ValueError(f"{file}, line {line}: one column; need inputs and a target")
            if not any(_number(cell) is not None for cell in cells):
                names = [cell.strip() for cell in cells]
                _check_names(file, names)
                continue
            names = [*(f"x{i}" for i in range(1, len(cells))), "y"]
        if len(cells) != len(names):
            raise ValueError(f"{file}, line {line}: {len(cells)} columns; need {len(names)}")
        rows.append([_cell(file, line, *pair) for pair in zip(names, cells, strict=True)])
    _enough(file, len(rows))
    return names, np.array(rows, np.float64)


def _check_names(file: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        if not name or name in names[:i]:
            where = f"{file}, line 1, column {i + 1}"
            raise ValueError(f"{where}: {name!r}; need a name for each column, and each once")


def _cell(file: Path, line: int, name: str, cell: str) -> float:
    value = _number(cell)
    if value is None or not math.isfinite(value):
        raise ValueError(f"{file}, line {line}, column {name}: {cell!r}; need a finite number")
    return value


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _read_npz(file: Path) -> Samples:
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file}: no .npz archive; need what numpy.savez writes")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in ("x", "y") if name in arrays}
    except Exception as error:  # a broken archive raises what its part of it does
        raise ValueError(f"{file}: cannot be read: {error}") from None
    for name in ("x", "y"):
        if name not in found:
            raise ValueError(f"{file}: no array {name}; need x and y")
        if found[name].dtype.kind not in "biuf":
            raise ValueError(f"{file}: {name}: {found[name].dtype}; need real numbers")
        found[name] = found[name].astype(np.float64)
    x, y = found["x"], found["y"]
    x = x[:, None] if x.ndim == 1 else x
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if x.ndim != 2 or y.ndim != 1 or len(x) != len(y):
        raise ValueError(
            f"{file}: x {found['x'].shape}, y {found['y'].shape}; need [n, inputs] and [n]"
        )
    for name, values in (("x", x), ("y", y)):
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            where = ", column ".join(str(i) for i in bad[0])
            raise ValueError(f"{file}: {name}, row {where}: {values[tuple(bad[0])]}; need finite")
    _enough(file, len(y))
    names = ("x",) if x.shape[1] == 1 else tuple(f"x{i + 1}" for i in range(x.shape[1]))
    return _checked(file, Samples(x, y, names, "y"))


def _enough(file: Path, rows: int) -> None:
    if rows < 10:
        raise ValueError(f"{file}: {rows} rows of numbers; need at least 10")


def _checked(file: Path, samples: Samples) -> Samples:
    for name, values in zip(samples.names, samples.x.T, strict=True):
        if np.ptp(values) == 0:
            raise ValueError(f"{file}, column {name}: {values[0]} in all rows; leave it out")
    if np.ptp(samples.y) == 0:
        raise ValueError(f"{file}, column {samples.target}: {samples.y[0]} in all rows")
    return samples
