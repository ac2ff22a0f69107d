"""What a run says: metrics.jsonl, TensorBoard events, and a progress bar or plain lines."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bestiary.layers.base import Tree, flatten
from bestiary.train.files import put

METRICS = "metrics.jsonl"
_QUIET = 3.0  # seconds between two plain lines

Line = dict[str, Any]


class Log:
    """Writes one line per logged step, in rising order, each step once over all restarts."""

    def __init__(self, run_dir: Path, step: int):
        """Goes on after `step`: later lines, from before a restart, are dropped."""
        self._file = run_dir / METRICS
        lines = [line for line in read_metrics(run_dir) if line["step"] <= step]
        put(self._file, "".join(json.dumps(line) + "\n" for line in lines))
        self._stream = self._file.open("a")
        self._events = _events(run_dir / "tensorboard", step)
        self._display = _Bar(step) if sys.stdout.isatty() else _Plain()

    def write(self, line: Line, total: int, left: float) -> None:
        """`line` has a "step"; `left` are the seconds until step `total`."""
        self._stream.write(json.dumps(_finite(line)) + "\n")
        self._stream.flush()
        for name, value in _scalars(line):
            self._events.add_scalar(name, value, line["step"])
        if "validation_loss" in line:
            self._events.flush()
        self._display.show(line, total, left)

    def close(self) -> None:
        self._display.close()
        self._events.close()
        self._stream.close()


def read_metrics(run_dir: Path) -> list[Line]:
    """The lines of metrics.jsonl; a last one that was not written to its end is left out."""
    lines = []
    if (file := run_dir / METRICS).is_file():
        for text in file.read_text(errors="replace").splitlines():
            try:
                line = json.loads(text)
                lines += [line] if isinstance(line["step"], int) else []
            except (ValueError, TypeError, KeyError):
                continue
    return lines


def layer_metrics(reported: Tree) -> dict[str, list[float]]:
    """What layers report by name, a value per layer from the first to the last.

    Reported is a tree of arrays [repeats]; a pattern's members, which have numbers for names, are
    woven in. Shares of non-zero activations appear where any is below 1.
    """
    members: dict[str, list[np.ndarray]] = {}
    for path, values in flatten(reported):
        name = "/".join(part for part in path.split("/") if not part.isdecimal())
        members.setdefault(name.removeprefix("blocks/"), []).append(np.ravel(values))
    woven = {name: np.stack(parts, 1).ravel().tolist() for name, parts in members.items()}
    return {
        name: values
        for name, values in woven.items()
        if not (name.endswith("nonzero") and min(values) >= 1)
    }


def nonzero(line: Line) -> float | None:
    """Mean share of non-zero activations in a line, None for a dense model."""
    shares = [v for n, vs in line.get("layers", {}).items() if n.endswith("nonzero") for v in vs]
    return sum(shares) / len(shares) if shares else None


def describe(line: Line, total: int, left: float) -> str:
    """A line for people."""
    parts = [f"step {line['step']}/{total}", f"loss {line['loss']:.4f}"]
    for name, value in line.items():
        if name.startswith("validation_"):
            parts.append(f"{name.removesuffix('_loss').replace('_', ' ')} {value:.4f}")
    parts.append(f"lr {line['learning_rate']:.2e}")
    speeds = {n.removesuffix("_per_second"): v for n, v in line.items() if n.endswith("per_second")}
    parts += [f"{value:,.0f} {unit}/s" for unit, value in speeds.items()]
    if (share := nonzero(line)) is not None:
        parts.append(f"nonzero {share:.1%}")
    if line.get("skipped"):
        parts.append(f"skipped {line['skipped']}")
    minutes, seconds = divmod(round(left), 60)
    return "  ".join([*parts, f"{minutes}:{seconds:02} left"])


class _Plain:
    """Lines, not too many."""

    def __init__(self) -> None:
        self._last = -math.inf

    def show(self, line: Line, total: int, left: float) -> None:
        now = time.monotonic()
        last = line["step"] == total
        if "validation_loss" in line or last or now - self._last >= _QUIET:
            self._last = now
            print(describe(line, total, left), flush=True)

    def close(self) -> None:
        pass


class _Bar:
    """A bar with the newest figures, and a line above it per evaluation."""

    def __init__(self, step: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(BarColumn(), TextColumn("{task.description}"))
        self._progress.start()
        self._task = self._progress.add_task("compiling", total=None, completed=step)

    def show(self, line: Line, total: int, left: float) -> None:
        text = describe(line, total, left)
        self._progress.update(self._task, total=total, completed=line["step"], description=text)
        if "validation_loss" in line:
            self._progress.console.print(text, highlight=False)

    def close(self) -> None:
        self._progress.stop()


def _events(folder: Path, step: int) -> Any:
    from tensorboardX import SummaryWriter

    # readers drop what an interrupted process wrote beyond the step we go on from
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _scalars(line: Line) -> list[tuple[str, float]]:
    scalars = [(name, value) for name, value in line.items() if name not in ("step", "layers")]
    for name, values in line.get("layers", {}).items():
        scalars += [(f"{name}/{i}", value) for i, value in enumerate(values)]
    return [(name, value) for name, value in scalars if math.isfinite(value)]


def _finite(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
