"""Optimisers and learning-rate schedules, built from a model's declaration."""

from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
import optax
from optax import contrib

from bestiary.layers.base import Array, Param, Tree, map_params

Name = Literal["adamw", "adafactor", "lion", "muon"]
Decay = Literal["cosine", "linear", "wsd"]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optax optimiser. Weight decay is decoupled and leaves gains and biases alone; with Muon it
    takes Muon's matrices only."""

    name: Name = "adamw"
    """Muon takes the declared matrices and Adam the rest."""
    learning_rate: float = 3e-4
    """Peak learning rate; with Muon that of the matrices."""
    adam_learning_rate: float | None = None
    """Muon only: peak learning rate of what is not a matrix (embeddings, gains); None: the same."""
    weight_decay: float = 0.1
    b1: float = 0.9
    """Decay of the first moment (Muon: of the momentum; Adafactor has none)."""
    b2: float = 0.95
    """Decay of the second moment (Lion: of the momentum; Adafactor's grows by itself)."""
    eps: float = 1e-8
    clip: float = 1.0
    """Largest global norm of the gradient; 0: no clipping."""

    def __post_init__(self) -> None:
        if self.name not in get_args(Name):
            raise ValueError(f"optimizer.name: {self.name!r}; need one of {get_args(Name)}")
        for name in ("learning_rate", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name}: {getattr(self, name)}; need more than 0")
        for name in ("weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optimizer.{name}: {getattr(self, name)}; need 0 or more")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}: {getattr(self, name)}; need 0 <= {name} < 1")
        if self.adam_learning_rate is not None:
            if self.name != "muon":
                raise ValueError(
                    f"optimizer.adam_learning_rate: {self.adam_learning_rate} with {self.name}; "
                    "only muon has a second learning rate"
                )
            if not self.adam_learning_rate > 0:
                raise ValueError(
                    f"optimizer.adam_learning_rate: {self.adam_learning_rate}; need more than 0"
                )

    def build(self, declared: Tree) -> optax.GradientTransformation:
        """The transformation at learning rate 1; the step multiplies its updates by the rate."""
        decay = map_params(lambda p: len(p.shape) - p.batch_ndim >= 2, declared)
        wd = self.weight_decay
        if self.name == "adamw":
            tx = optax.adamw(1.0, self.b1, self.b2, self.eps, weight_decay=wd, mask=decay)
        elif self.name == "lion":
            tx = optax.lion(1.0, self.b1, self.b2, weight_decay=wd, mask=decay)
        elif self.name == "adafactor":
            tx = optax.adafactor(
                1.0,
                multiply_by_parameter_scale=False,
                weight_decay_rate=wd or None,
                weight_decay_mask=decay,
            )
        else:
            tx = contrib.muon(
                1.0,
                beta=self.b1,
                eps=self.eps,
                weight_decay=wd,
                weight_decay_mask=decay,
                adam_b1=0.9,
                adam_b2=self.b2,
                adam_learning_rate=(self.adam_learning_rate or self.learning_rate)
                / self.learning_rate,
                muon_weight_dimension_numbers=map_params(_matrix, declared),
            )
        return optax.chain(optax.clip_by_global_norm(self.clip), tx) if self.clip else tx


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then decay; lengths are shares of the run, which may be fitted to a time."""

    decay: Decay = "cosine"
    """wsd: warm-up, stable, then linear decay over the last `cooldown` of the run."""
    warmup: float = 0.02
    cooldown: float = 0.2
    final: float = 0.1
    """Learning rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        if self.decay not in get_args(Decay):
            raise ValueError(f"schedule.decay: {self.decay!r}; need one of {get_args(Decay)}")
        for name in ("warmup", "cooldown", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"schedule.{name}: {getattr(self, name)}; need 0 <= {name} <= 1")
        if self.decay == "wsd" and self.warmup + self.cooldown > 1:
            raise ValueError(
                f"schedule.cooldown: {self.cooldown} with warmup {self.warmup}; "
                "need at most 1 together"
            )

    def __call__(self, step: Array, total: Array) -> Array:
        """Share of the peak learning rate for the update number `step` (from 0) of `total`."""
        done = (step + 1) / total
        rise = done / max(self.warmup, 1e-9)
        start = 1 - self.cooldown if self.decay == "wsd" else self.warmup
        left = jnp.clip((1 - done) / max(1 - start, 1e-9), 0, 1)
        if self.decay == "cosine":
            left = 0.5 - 0.5 * jnp.cos(jnp.pi * left)
        return jnp.minimum(rise, 1) * (self.final + (1 - self.final) * left)


def _matrix(p: Param) -> contrib.MuonDimensionNumbers | None:
    """Which axes a contraction sums over and which it yields; leading stacked axes stay apart."""
    if p.inputs is None:
        return None
    split, first = p.batch_ndim + p.inputs, p.batch_ndim
    return contrib.MuonDimensionNumbers(
        tuple(range(first, split)), tuple(range(split, len(p.shape)))
    )
