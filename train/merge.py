"""`bestiary merge`: the checkpoints of one run, or runs of one architecture, become one model."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro

from bestiary.layers.base import Array, Layer, Precision, Tree
from bestiary.train.checkpoint import EXPERIMENT, load_run, save_run, saved_steps
from bestiary.train.experiment import Experiment, read_experiment
from bestiary.train.merge_tensors import (
    Decay,
    Sign,
    agree,
    checkpoint_weights,
    drop,
    merge_trees,
    slerp,
    trim,
    update_weights,
    weighted_sum,
)
from bestiary.train.tree_json import difference, to_json
from bestiary.zoo.model import Model


@dataclass(frozen=True, kw_only=True)
class Wsm:
    """Average checkpoints of one run, in place of a decay of its learning rate (WSM).

    Meant for a run at a constant rate (schedule.final 1) that keeps enough checkpoints
    (checkpoints.keep).
    """

    run: Annotated[str, tyro.conf.Positional]
    """The run directory."""
    out: str
    """The run directory to make."""
    decay: Decay = "mean"
    """The decay that the average stands for; inverse_sqrt: 1 - sqrt(x), exponential: 0.1 ** x."""
    weights: tuple[float, ...] = ()
    """Instead of a decay, the weight of every checkpoint; 1 together."""
    steps: tuple[int, ...] = ()
    """The checkpoints, by their steps; all of the run when absent."""
    last: int | None = None
    """How many of them, from the newest."""

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 2:
            raise ValueError(f"last: {self.last}; need at least 2")
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps: {self.steps}; need rising steps")
        if self.weights:
            if self.decay != "mean":
                raise ValueError(f"weights: {self.weights} with decay {self.decay}; need one")
            if not abs(sum(self.weights) - 1) < 1e-6 or not all(w >= 0 for w in self.weights):
                raise ValueError(
                    f"weights: {self.weights}; need 0 or more each and 1 together, "
                    f"not {sum(self.weights):g}"
                )

    def merged(self) -> tuple[Experiment, Tree]:
        run_dir = Path(self.run)
        experiment, saved = read_experiment(run_dir / EXPERIMENT), saved_steps(run_dir)
        has = f"{self.run} has checkpoints of {', '.join(map(str, saved)) or 'no step'}"
        if missing := sorted(set(self.steps) - set(saved)):
            raise ValueError(f"steps: {missing[0]}; {has}")
        steps = (self.steps or saved)[-(self.last or 0) :]
        if len(steps) < (self.last or 2):
            raise ValueError(f"run: {has}; need {self.last or 2}, see checkpoints.keep")
        weights = self.weights or checkpoint_weights(update_weights(self.decay, steps))
        if len(weights) != len(steps):
            raise ValueError(f"weights: {weights}; need one for each of {len(steps)} checkpoints")
        for step, weight in zip(steps, weights, strict=True):
            print(f"checkpoint {step}: weight {weight:.6f}")
        return experiment, weighted_sum((load_run(self.run, s)[1] for s in steps), weights)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Average runs: sum w_i run_i / sum w_i (model soups, Wortsman et al. 2022)."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """The run directories; of each the newest checkpoint."""
    out: str
    """The run directory to make."""
    weights: tuple[float, ...] = ()
    """One for every run; alike when absent."""

    def __post_init__(self) -> None:
        _check_weights(self.runs, self.weights, least=2)
        if self.weights and not sum(self.weights) > 0:
            raise ValueError(f"weights: {self.weights}; need more than 0 together")

    def merged(self) -> tuple[Experiment, Tree]:
        weights = self.weights or (1.0,) * len(self.runs)
        experiment, trees = _load(self.runs)
        return experiment, weighted_sum(trees, [w / sum(weights) for w in weights])


@dataclass(frozen=True, kw_only=True)
class Slerp:
    """Interpolate two runs along the arc between them, tensor by tensor."""

    runs: Annotated[tuple[str, str], tyro.conf.Positional]
    """The two run directories; of each the newest checkpoint."""
    out: str
    """The run directory to make."""
    t: float = 0.5
    """0: the first run, 1: the second."""

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise ValueError(f"t: {self.t}; need 0 <= t <= 1")

    def merged(self) -> tuple[Experiment, Tree]:
        experiment, trees = _load(self.runs)
        declared = experiment.model.declare()
        return experiment, merge_trees(declared, trees, lambda ab, _: slerp(ab[0], ab[1], self.t))


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic:
    """Add to a base what runs learned since: base + sum w_i (run_i - base) (arXiv 2212.04089)."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """The run directories; of each the newest checkpoint."""
    base: str
    """The run that they started from."""
    out: str
    """The run directory to make."""
    weights: tuple[float, ...] = ()
    """One for every run; 1 each when absent."""

    def __post_init__(self) -> None:
        _check_weights(self.runs, self.weights, least=1)

    def learned(self, deltas: Array, weights: Array, key: Array) -> Array:
        """What the base gets of the differences [n, ...] of a tensor."""
        del key
        return jnp.tensordot(weights, deltas, 1)

    def merged(self) -> tuple[Experiment, Tree]:
        experiment, trees = _load((self.base, *self.runs))
        weights = jnp.asarray(self.weights or (1.0,) * len(self.runs), jnp.float32)

        def merge(models: list[Array], key: Array) -> Array:
            base, *others = models
            return base + self.learned(jnp.stack(others) - base, weights, key)

        return experiment, merge_trees(experiment.model.declare(), trees, merge)


@dataclass(frozen=True, kw_only=True)
class Ties(TaskArithmetic):
    """Add only the largest differences, where their signs agree (TIES, arXiv 2306.01708)."""

    density: float = 0.2
    """Share of the entries of each tensor that is kept, the largest by magnitude."""
    sign: Sign = "total"
    """Elected by the sum of the differences, or by their number."""
    sign_weighted: bool = False
    """Let the differences vote with their weights, as mergekit does; PEFT does not."""
    normalize: bool = False
    """Divide by the weights that agree, as mergekit does; PEFT divides by their number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_density(self.density)

    def learned(self, deltas: Array, weights: Array, key: Array) -> Array:
        del key
        trimmed = jnp.stack([trim(delta, self.density) for delta in deltas])
        options = {"sign_weighted": self.sign_weighted, "normalize": self.normalize}
        return agree(trimmed, weights, self.sign, **options)


@dataclass(frozen=True, kw_only=True)
class Dare(TaskArithmetic):
    """Drop differences at random and scale up the rest (DARE, arXiv 2311.03099)."""

    density: float = 0.5
    """Share of the entries that is kept: 1 less the paper's drop rate."""
    sign: Sign | None = None
    """Average what agrees with a sign elected as in TIES; a weighted sum when absent."""
    seed: int = 0
    """Of the choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_density(self.density)

    def learned(self, deltas: Array, weights: Array, key: Array) -> Array:
        keep = jax.random.bernoulli(jax.random.fold_in(key, self.seed), self.density, deltas.shape)
        dropped = drop(deltas, keep, self.density)
        if self.sign is None:
            return jnp.tensordot(weights, dropped, 1)
        return agree(dropped, weights, self.sign)


Merge = Wsm | Linear | Slerp | TaskArithmetic | Ties | Dare


def run(options: Merge) -> None:
    """`bestiary merge`. Raises ValueError when runs cannot be read or differ in their model, or
    `out` exists."""
    out = Path(options.out)
    if out.exists():
        raise ValueError(f"out: {out} exists already; need a new folder")
    experiment, params = options.merged()
    save_run(out, dataclasses.replace(experiment, run_dir=str(out)), params)
    (out / "merge.json").write_text(json.dumps(to_json(options), indent=2) + "\n")
    print(f"{out}: {experiment.model.count().total:,} parameters")


def _load(paths: Sequence[str]) -> tuple[Experiment, list[Tree]]:
    """The first run's experiment, and the newest parameters of all, whose models must be alike."""
    experiment, params = load_run(paths[0])
    trees = [params]
    for path in paths[1:]:
        other, params = load_run(path)
        unlike = difference(_architecture(experiment.model), _architecture(other.model))
        for name, (first, here) in unlike.items():
            raise ValueError(
                f"runs: {path} has model.{name} {here!r}, {paths[0]} has {first!r}; need one model"
            )
        trees.append(params)
    return experiment, trees


def _architecture(model: Layer) -> Layer:
    """`model` without what says how, and in which types, it is computed."""
    if not isinstance(model, Model):
        return model
    model = model.map_stacks(lambda stack: dataclasses.replace(stack, remat="none", unroll=1))
    return dataclasses.replace(model, precision=Precision())  # type: ignore[type-var]


def _check_weights(runs: Sequence[str], weights: Sequence[float], least: int) -> None:
    if len(runs) < least:
        raise ValueError(f"runs: {len(runs)}; need at least {least}")
    if weights and len(weights) != len(runs):
        raise ValueError(f"weights: {weights}; need one for each of {len(runs)} runs")


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density: {density}; need 0 < density <= 1")
