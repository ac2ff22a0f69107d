"""Files that appear whole: written beside their place and renamed, over what was there."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def put(path: Path, text: str) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    beside.replace(path)


def put_json(path: Path, value: Any) -> None:
    put(path, json.dumps(value, indent=2) + "\n")


def put_figure(path: Path, figure: "Figure") -> None:
    """As .png."""
    beside = path.with_suffix(".tmp.png")
    figure.savefig(beside, dpi=120)
    beside.replace(path)
