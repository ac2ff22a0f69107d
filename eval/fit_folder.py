"""The folder of a fit: fit.json, parameters and pictures, each of which appears whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bestiary.layers.base import Tree, flatten
from bestiary.train.files import put_json

FIT = "fit.json"
PARAMS = "params.npz"


def once(
    out: Path, settings: dict[str, Any], what: str, fit: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What `fit` finds, or has found before with these settings, in which case it is not run; for
    people it is a `what`.

    Raises ValueError for a folder that holds something else.
    """
    result = begin(out, settings)
    if result is not None:
        print(f"{out} holds this {what} already")
        return result
    result = fit()
    finish(out, settings, result)
    return result


def begin(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What a finished fit of these settings left in `out`, None where it has yet to be run (again);
    the settings are then written there.

    Raises ValueError for a folder that holds something else.
    """
    file = out / FIT
    settings = json.loads(json.dumps(settings))
    if file.is_file():
        try:
            found = json.loads(file.read_text())
            old, result = found["settings"], found["result"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"out: {file} cannot be read; need another folder") from None
        differs = [k for k in {**old, **settings} if old.get(k) != settings.get(k)]
        if differs:
            other = ", ".join(sorted(differs))
            raise ValueError(f"out: {out} holds another fit ({other} differ); need a new folder")
        return result
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} holds something else; need a new folder")
    out.mkdir(parents=True, exist_ok=True)
    finish(out, settings, None)
    return None


def finish(out: Path, settings: dict[str, Any], result: dict[str, Any] | None) -> None:
    """Writes fit.json, the last file of a fit."""
    put_json(out / FIT, {"settings": settings, "result": result})


def save_params(out: Path, params: Tree) -> None:
    """Arrays by their paths, without pickle."""
    beside = out / "params.tmp.npz"
    np.savez(beside, allow_pickle=False, **dict(flatten(jax.tree.map(np.asarray, params))))
    beside.replace(out / PARAMS)


def load_params(out: Path) -> Tree:
    """What `save_params` wrote. Raises ValueError where it did not."""
    params: Tree = {}
    try:
        with np.load(out / PARAMS, allow_pickle=False) as arrays:
            for path in arrays.files:
                *branches, leaf = path.split("/")
                here = params
                for name in branches:
                    here = here.setdefault(name, {})
                here[leaf] = arrays[path]
    except (OSError, ValueError) as error:
        raise ValueError(f"{out / PARAMS}: cannot be read: {error}") from None
    return params
