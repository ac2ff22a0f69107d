"""An experiment: one frozen dataclass tree that says all about a training run."""

import importlib
import inspect
import json
import pkgutil
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import jax

from bestiary.layers.base import Layer, Param, Tree, is_param, params_of
from bestiary.train import tree_json
from bestiary.train.data import Data
from bestiary.train.dataset import Dataset
from bestiary.train.files import put_json
from bestiary.train.mesh import Mesh
from bestiary.train.objective import NextToken, Objective
from bestiary.train.optimizer import Optimizer, Schedule
from bestiary.zoo.decoder import Decoder

NonFinite = Literal["stop", "skip"]


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When the state is saved and which saved states are kept."""

    every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """How many of the newest stay."""
    keep_best: int = 1
    """How many of the best by validation loss stay beside them."""

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("keep", 2), ("keep_best", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"checkpoints.{name}: {getattr(self, name)}; need at least {least}"
                )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """When the validation loss is measured, and on how much."""

    every: int = 250
    """Steps between evaluations; 0: only after the last step."""
    batches: int = 100
    """Batches of the validation split, from its start; 0: all of it."""

    def __post_init__(self) -> None:
        for name in ("every", "batches"):
            if getattr(self, name) < 0:
                raise ValueError(f"evaluation.{name}: {getattr(self, name)}; need 0 or more")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A training run, from the model to the last checkpoint."""

    model: Layer
    data: Dataset = Data()
    objective: Objective = NextToken()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    mesh: Mesh = field(default_factory=Mesh)
    checkpoints: Checkpoints = Checkpoints()
    evaluation: Evaluation = Evaluation()
    steps: int | None = None
    """Length of the run in optimiser steps."""
    minutes: float | None = None
    """Length of the run in wall-clock minutes from the start of the program, compilation and
    evaluation included; the schedule is fitted to the steps that this allows."""
    accumulate: int = 1
    """Micro-batches that one step adds up."""
    nonfinite: NonFinite = "stop"
    """What happens when a loss or gradient is not finite: stop the run, or leave that step out."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    seed: int = 0
    """Of the initial parameters and of the order of the data."""
    initial: str | None = None
    """A run to begin from: its newest parameters, where path and shape are this model's; the rest
    is drawn. So a mixer, or a stage of its training, changes in the middle."""
    only: str | None = None
    """A regular expression that the paths of the parameters to train contain, such as "indexer";
    all others stay as they are, whatever the loss. None: all are trained."""
    run_dir: str | None = None
    """Where the run is kept; runs/NAME when absent. An interrupted run there is continued."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(
                f"steps: {self.steps} with minutes {self.minutes}; need exactly one of the two"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: {self.steps}; need at least 1")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes: {self.minutes}; need more than 0")
        if self.nonfinite not in get_args(NonFinite):
            raise ValueError(f"nonfinite: {self.nonfinite!r}; need one of {get_args(NonFinite)}")
        if self.log_every < 1:
            raise ValueError(f"log_every: {self.log_every}; need at least 1")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed}; need 0 or more")
        if self.only is not None and not any(p.trainable for p in params_of(self.declare())):
            raise ValueError(f"only: {self.only!r} is in the path of no trained parameter")
        if self.accumulate < 1 or self.data.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: {self.accumulate}; need a divisor of "
                f"data.batch_size {self.data.batch_size}"
            )
        self.objective.check(self.data)

    def declare(self) -> Tree:
        """The model's parameters; those that `only` leaves out are not trained.

        Raises ValueError when `only` is no regular expression.
        """
        if self.only is None:
            return self.model.declare()
        try:
            wanted = re.compile(self.only)
        except re.error as error:
            raise ValueError(f"only: {self.only!r} is no regular expression: {error}") from None

        def one(path: tuple, p: Param) -> Param:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return p if wanted.search(name) else replace(p, trainable=False)

        return jax.tree_util.tree_map_with_path(one, self.model.declare(), is_leaf=is_param)


def language_model(experiment: Experiment) -> tuple[Decoder, Data]:
    """The model and its text. Raises ValueError where the experiment is about something else."""
    model, data = experiment.model, experiment.data
    if not isinstance(model, Decoder) or not isinstance(data, Data):
        raise ValueError(f"model: {type(model).__name__}; need a language model for this")
    return model, data


def experiments() -> dict[str, str]:
    """Name of every experiment in `configs`, and the first line of its docstring."""
    return {name: (inspect.getdoc(_module(name)) or "").split("\n")[0] for name in _names()}


def load_experiment(name: str) -> Experiment:
    """What `configs/NAME.py` builds. Raises ValueError for an unknown name."""
    if name not in _names():
        raise ValueError(f"experiment: unknown {name!r}; known: {', '.join(_names())}")
    return _module(name).experiment()


def _names() -> list[str]:
    configs = importlib.import_module("bestiary.configs")
    return sorted(module.name for module in pkgutil.iter_modules(configs.__path__))


def _module(name: str) -> Any:
    return importlib.import_module(f"bestiary.configs.{name}")


def save_experiment(experiment: Experiment, path: Path) -> None:
    """Writes what `read_experiment` reads; the file appears whole."""
    put_json(path, tree_json.to_json(experiment))


def read_experiment(path: Path) -> Experiment:
    """Raises ValueError naming the file when it is missing, malformed or of another version."""
    try:
        experiment = tree_json.from_json(json.loads(path.read_text()))
    except OSError as error:
        raise ValueError(f"{path}: not a run's experiment ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(experiment, Experiment):
        raise ValueError(f"{path}: holds no experiment")
    return experiment
