"""Checkpoints of a run: saved behind its back, checked by sums of their files, restored anywhere.

RUN/checkpoints/STEP holds the items `params` (the whole declared tree), `optimizer` (what else the
state has, an entry per leaf), `run` (JSON: position of the data, schedule, time) and `sums.json`.
A damaged checkpoint is set aside as STEP.damaged; only what is not to be kept is deleted.
"""

import itertools
import json
import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.sharding as js
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from bestiary.layers.base import Tree, map_params
from bestiary.train.experiment import (
    Checkpoints,
    Experiment,
    read_experiment,
    save_experiment,
)
from bestiary.train.mesh import placed
from bestiary.train.step import State, abstract_state, init_state, merge, split

EXPERIMENT, FOLDER = "experiment.json", "checkpoints"
_SUMS = "sums.json"
_REST = ("opt", "step", "bad", "skipped")
_ALL_DAMAGED = -2


class Saver:
    """Writes the checkpoints of a run while it goes on, and drops those that are not to be kept."""

    def __init__(self, run_dir: Path, options: Checkpoints):
        self._options = options
        self._folder = (run_dir / FOLDER).resolve()
        self._losses = {step: _loss(run_dir, step) for step in saved_steps(run_dir)}
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self,
                cleanup_tmp_directories=True,
                lightweight_initialize=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._sum),
            ),
        )

    def save(self, state: State, run: dict[str, Any]) -> None:
        """Copies the state to the host and returns; an earlier save is waited for.

        `run` is the JSON beside it: its "step" names the checkpoint, its "validation_loss" (None:
        not measured) ranks it.
        """
        params, rest = _items(state)
        self._write({"params": params, "optimizer": rest}, run)

    def save_params(self, params: Tree) -> None:
        """Like `save` before the first step, without the optimiser's state."""
        self._write({"params": params}, {"step": 0})

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax asks which checkpoints stay: the newest and the best."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        measured = [(loss, s) for s in steps if (loss := self._losses.get(s)) is not None]
        best = [step for _, step in sorted(measured)[: self._options.keep_best]]
        return [step in {*steps[-self._options.keep :], *best} for step in steps]

    def _write(self, items: dict[str, Tree], run: dict[str, Any]) -> None:
        self._losses[run["step"]] = run.get("validation_loss")
        trees = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        args = ocp.args.Composite(**trees, run=ocp.args.JsonSave(run))
        self._manager.save(run["step"], args=args, force=True)

    def wait(self) -> None:
        """Returns when everything is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the writing threads."""
        self._manager.close()

    def _sum(self) -> None:
        # called when all is written and the folder does not have its final name yet
        if jax.process_index() == 0:
            for folder in self._folder.glob("*-tmp*"):
                (folder / _SUMS).write_text(json.dumps(_sums(folder)))


def restore(run_dir: Path, experiment: Experiment, mesh: js.Mesh) -> tuple[State, dict] | None:
    """The newest sound checkpoint as a state on `mesh`, and its `run` entry; None without any.

    Parameters that came without an optimiser's state (`save_run`) get a fresh one. Damaged
    checkpoints are reported on stderr and set aside.

    Raises ValueError when there are checkpoints, but none is sound.
    """
    step, damaged = -1, {}
    if jax.process_index() == 0:
        step, damaged = _newest_sound(run_dir)
    if jax.process_count() > 1:
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    if step == _ALL_DAMAGED:
        raise ValueError(f"run_dir: every checkpoint in {run_dir / FOLDER} is damaged; need one")
    for at, reason in damaged.items():
        aside = _set_aside(run_dir / FOLDER / str(at))
        print(
            f"checkpoint {at} is damaged ({reason}); moved to {aside}, using {step}",
            file=sys.stderr,
        )
    if step < 0:
        return None
    folder = run_dir.resolve() / FOLDER / str(step)
    run = json.loads((folder / "run" / "metadata").read_text())
    abstract = abstract_state(experiment, mesh)
    params, rest = _items(abstract)
    fresh = not (folder / "optimizer").is_dir()
    with ocp.StandardCheckpointer() as reader:
        params = reader.restore(folder / "params", params)
        rest = {} if fresh else reader.restore(folder / "optimizer", rest)
    trained, frozen = split(experiment.declare(), params)
    if fresh:
        state = init_state(experiment, mesh)
    else:
        structure = jax.tree.structure({name: abstract[name] for name in _REST})
        state = jax.tree.unflatten(structure, [rest[name] for name in _names(abstract)])
    return state | {"params": trained, "frozen": frozen}, run


def load_run(
    path: str | Path, step: int | None = None, mesh: js.Mesh | None = None
) -> tuple[Experiment, Tree]:
    """The experiment of a run and its parameters at `step` (None: the newest sound checkpoint).

    Parameters lie on one device or, by the experiment's rules, on `mesh`. Nothing is changed.

    Raises ValueError when the folder is no run, has no checkpoint (of this step), or it is damaged.
    """
    run_dir = Path(path)
    if not (run_dir / EXPERIMENT).is_file():
        raise ValueError(f"run: {str(path)!r} is no run; need a folder with {EXPERIMENT}")
    experiment = read_experiment(run_dir / EXPERIMENT)
    steps = saved_steps(run_dir)
    if not steps:
        raise ValueError(
            f"run: {str(path)!r} has no checkpoint yet; need one, see checkpoints.every"
        )
    if step is not None and step not in steps:
        raise ValueError(f"step: {step}; {path} has checkpoints of {', '.join(map(str, steps))}")
    if step is None:
        step, damaged = _newest_sound(run_dir)
        if step == _ALL_DAMAGED:
            raise ValueError(f"run: every checkpoint in {run_dir / FOLDER} is damaged; need one")
        for at, reason in damaged.items():
            print(f"checkpoint {at} is damaged ({reason}); using {step}", file=sys.stderr)
    elif reason := _damage(run_dir / FOLDER / str(step)):
        raise ValueError(f"step: checkpoint {step} of {path} is damaged ({reason})")
    if mesh is None:
        single = js.SingleDeviceSharding(jax.local_devices()[0])
        abstract = map_params(
            lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=single),
            experiment.model.declare(),
        )
    else:
        with placed(mesh, experiment.mesh.table):
            abstract = experiment.model.abstract(mesh)
    with ocp.StandardCheckpointer() as reader:
        return experiment, reader.restore(
            run_dir.resolve() / FOLDER / str(step) / "params", abstract
        )


def save_run(path: str | Path, experiment: Experiment, params: Tree) -> None:
    """Writes a run of no steps from parameters; `load_run` reads it and training goes on from it.

    Raises ValueError when there is something already.
    """
    run_dir = Path(path)
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise ValueError(f"run: {str(path)!r} exists; need a new or empty folder")
    run_dir.mkdir(parents=True, exist_ok=True)
    saver = Saver(run_dir, experiment.checkpoints)
    saver.save_params(params)
    saver.close()
    save_experiment(experiment, run_dir / EXPERIMENT)


def saved_steps(run_dir: Path) -> list[int]:
    """Steps that have a checkpoint, rising."""
    return sorted(int(p.name) for p in (run_dir / FOLDER).glob("*") if p.name.isdecimal())


def _items(state: State) -> tuple[Tree, dict[str, Any]]:
    rest = {name: state[name] for name in _REST}
    leaves = jax.tree.leaves(rest)
    return merge(state["params"], state["frozen"]), dict(zip(_names(state), leaves, strict=True))


def _names(state: State) -> list[str]:
    paths = jax.tree_util.tree_leaves_with_path({name: state[name] for name in _REST})
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def _loss(run_dir: Path, step: int) -> float | None:
    try:
        run = json.loads((run_dir / FOLDER / str(step) / "run" / "metadata").read_text())
        return run["validation_loss"]
    except (OSError, ValueError, KeyError, TypeError):  # damaged, or made by save_run
        return None


def _newest_sound(run_dir: Path) -> tuple[int, dict[int, str]]:
    """The step of the newest sound checkpoint, and what is wrong with those after it.

    The step is -1 when there are no checkpoints, `_ALL_DAMAGED` when none is sound.
    """
    damaged: dict[int, str] = {}
    for step in reversed(saved_steps(run_dir)):
        reason = _damage(run_dir / FOLDER / str(step))
        if reason is None:
            return step, damaged
        damaged[step] = reason
    return _ALL_DAMAGED if damaged else -1, damaged


def _damage(folder: Path) -> str | None:
    try:
        expected = json.loads((folder / _SUMS).read_text())
        found = _sums(folder)
        for name in sorted(expected):
            if name not in found:
                return f"{name} is missing"
            if found[name] != expected[name]:
                return f"{name} has changed"
    except (OSError, ValueError, TypeError):
        return f"{_SUMS} cannot be read"
    return None


def _set_aside(folder: Path) -> Path:
    names = itertools.chain(["damaged"], (f"damaged-{i}" for i in itertools.count(2)))
    aside = next(p for n in names if not (p := folder.with_name(f"{folder.name}.{n}")).exists())
    return folder.rename(aside)


def _sums(folder: Path) -> dict[str, int]:
    # of the items: orbax still changes the files beside them
    files = sorted(p for p in folder.glob("*/**/*") if p.is_file())
    with ThreadPoolExecutor() as pool:
        sums = pool.map(_crc, files)
        return {p.relative_to(folder).as_posix(): s for p, s in zip(files, sums, strict=True)}


def _crc(file: Path) -> int:
    total = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            total = zlib.crc32(block, total)
    return total
