"""Optimisers and learning-rate schedules, built from a model's declaration."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from bestiary.layers.base import Array, Param, Tree, map_params

Name = Literal["adamw", "adafactor", "lion", "muon"]
Moments = Literal["full", "rows"]
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
    table_rate: float = 1.0
    """Memory tables start at this multiple of the learning rate (UltraMem: 4), which falls linearly
    to 1 over the first `table_rate_until` of the run."""
    table_rate_until: float = 1.0
    table_moments: Moments = "full"
    """AdamW only: "rows" keeps for memory tables a bfloat16 first moment and one second moment per
    row, 2 bytes per entry and not 8."""

    def __post_init__(self) -> None:
        if self.name not in get_args(Name):
            raise ValueError(f"optimizer.name: {self.name!r}; need one of {get_args(Name)}")
        if self.table_moments not in get_args(Moments):
            raise ValueError(
                f"optimizer.table_moments: {self.table_moments!r}; need one of {get_args(Moments)}"
            )
        if self.table_moments == "rows" and self.name != "adamw":
            raise ValueError(f"optimizer.table_moments: 'rows' with {self.name}; only adamw has it")
        for name in ("learning_rate", "eps", "table_rate", "table_rate_until"):
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
        decay = map_params(lambda p: p.decay and len(p.shape) - p.batch_ndim >= 2, declared)
        wd = self.weight_decay
        if self.name == "adamw":
            tx = optax.adamw(1.0, self.b1, self.b2, self.eps, weight_decay=wd, mask=decay)
            if self.table_moments == "rows":
                rows = optax.chain(
                    scale_by_row_adam(self.b1, self.b2, self.eps),
                    optax.add_decayed_weights(wd),
                    optax.scale(-1.0),
                )
                kinds = map_params(lambda p: "table" if p.table else "other", declared)
                tx = optax.partition({"table": rows, "other": tx}, kinds)
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

    def table_scale(self, step: Array, total: Array) -> Array:
        """What multiplies the learning rate of memory tables (UltraMem, arXiv 2411.12364)."""
        left = jnp.maximum(0, 1 - step / (total * self.table_rate_until))
        return 1 + (self.table_rate - 1) * left


def scale_by_row_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam for tables [..., rows, slices, width]: the second moment is the mean over a row, the
    first is stored in bfloat16."""

    def init(params: Tree) -> optax.ScaleByAdamState:
        mu = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.bfloat16), params)
        nu = jax.tree.map(lambda p: jnp.zeros((*p.shape[:-2], 1, 1)), params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates: Tree, state: Any, params: Any = None) -> tuple[Tree, Any]:
        del params
        count = optax.safe_increment(state.count)

        def first(m: Array, g: Array) -> Array:
            return b1 * m.astype(jnp.float32) + (1 - b1) * g

        def second(v: Array, g: Array) -> Array:
            square = jnp.square(g.astype(jnp.float32)).mean((-2, -1), keepdims=True)
            return b2 * v + (1 - b2) * square

        mu = jax.tree.map(first, state.mu, updates)
        nu = jax.tree.map(second, state.nu, updates)

        def scaled(m: Array, v: Array) -> Array:
            return m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps)

        stored = jax.tree.map(lambda m: m.astype(jnp.bfloat16), mu)
        return jax.tree.map(scaled, mu, nu), optax.ScaleByAdamState(count, stored, nu)

    return optax.GradientTransformation(init, update)


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
