"""What `bestiary fit` may be told, and what it says at the end."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bestiary.eval.kan_symbolic import FUNCTIONS
from bestiary.layers.activations import Silu
from bestiary.train import fit as training
from bestiary.train.fit import BasisName, Network, Widths
from bestiary.train.minimise import Method


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Fit a KAN to a table, thin it out and read its formula; or solve an equation with one.

    SOURCE is a .csv file (its first line may name the columns), an .npz file with x and y, or one
    of: example, which is exp(sin(pi x) + y^2); poisson, burgers, which are solved. The folder OUT
    gets fit.json, params.npz and pictures; a fit that is finished is not run again.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")] = "example"
    layers: str | None = None
    """Widths, such as 2,5,1; 3+2 stands for 3 nodes that add and 2 that multiply. By default one
    hidden layer of 2 inputs + 1."""
    network: Literal["kan", "mlp"] = "kan"
    """mlp: a perceptron, with SiLU (for equations tanh), to compare with."""
    basis: BasisName = "spline"
    optimizer: Method = "lbfgs"
    learning_rate: float = 1e-2
    """Of Adam."""
    intervals: str | None = None
    """Grid intervals of splines, one stage of training after the other (by default 3,5,10); other
    bases take the first number, and as many functions as splines have. Equations have one stage (8
    by default)."""
    steps: int | None = None
    """Of each stage: by default 1000 of L-BFGS or 3000 of Adam (equations have their own)."""
    prune: bool = False
    """Leave out edges and nodes that matter little, after the first stage."""
    symbolic: bool = False
    """Put a named function on every edge that is left, and print the formula."""
    functions: str = ",".join(name for name in FUNCTIONS if name != "0")
    """Which functions those may be."""
    regularize: float | None = None
    """Weight of the penalty on edges in the first stage: by default 0.01 with --prune or
    --symbolic, else 0."""
    target: str | None = None
    """The column that is learned from the others: a name, or a number from 1. By default the
    last."""
    test_fraction: float = 0.2
    """Share of the rows that is only tested on."""
    viscosity: float | None = None
    """Of burgers: by default 0.01 / pi."""
    seed: int = 0
    out: str | None = None
    """By default runs/fit_SOURCE."""

    def __post_init__(self) -> None:
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"test-fraction: {self.test_fraction}; need 0 or more, below 1")
        if self.viscosity is not None and self.source != "burgers":
            raise ValueError(f"viscosity: {self.viscosity}; only burgers has one")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: {self.steps}; need at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning-rate: {self.learning_rate}; need more than 0")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed}; need 0 or more")
        if self.regularize is not None and not self.regularize >= 0:
            raise ValueError(f"regularize: {self.regularize}; need 0 or more")
        if self.network == "mlp" and (self.prune or self.symbolic):
            raise ValueError("network: mlp; need kan for --prune and --symbolic")
        unknown = [name for name in self.functions.split(",") if name not in FUNCTIONS]
        if unknown:
            raise ValueError(f"functions: {unknown[0]!r}; need some of {', '.join(FUNCTIONS)}")

    @property
    def grids(self) -> list[int]:
        """Raises ValueError where one is not finer than the one before."""
        grids = whole("intervals", self.intervals or "3,5,10")
        if grids != sorted(set(grids)):
            raise ValueError(f"intervals: {self.intervals!r}; need each larger than the one before")
        return grids

    @property
    def penalty_weight(self) -> float:
        if self.regularize is not None:
            return self.regularize
        return 1e-2 if self.prune or self.symbolic else 0.0

    def widths(self, inputs: int, default: str | None = None) -> Widths:
        """Raises ValueError for a first or last width that does not fit."""
        layers = self.layers or default or f"{inputs},{2 * inputs + 1},1"
        widths = []
        for entry in layers.split(","):
            parts = whole("layers", entry.replace("+", ","), least=0)
            if len(parts) > 2 or sum(parts) == 0:
                raise ValueError(f"layers: {entry!r}; need a width, or ADDING+MULTIPLYING")
            widths.append(parts[0] if len(parts) == 1 else (parts[0], parts[1]))
        if len(widths) < 2 or widths[0] != inputs or widths[-1] != 1:
            raise ValueError(f"layers: {layers}; need {inputs} inputs first and 1 output last")
        return tuple(widths)

    def build(self, widths: Widths) -> Network:
        if self.network == "mlp":
            return training.mlp(widths, Silu())
        return training.kan(widths, self.basis, self.grids[0])


def whole(name: str, text: str, least: int = 1) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise ValueError(f"{name}: {text!r}; need whole numbers from {least}, with commas between")
    return [int(part) for part in parts]


def report(out: Path, result: dict[str, Any]) -> None:
    for name, value in result.items():
        shown = f"{value:.3e}" if isinstance(value, float) else str(value)
        print(f"{name.replace('_', ' '):26} {shown}")
    print(f"{'files':26} {', '.join(sorted(f.name for f in out.iterdir()))} in {out}")
