"""Classification: one class of several for every row."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array, Aux, Context, Layer, Tree
from bestiary.train.dataset import Dataset
from bestiary.train.objective import Batch, Objective, Report, finished


@dataclass(frozen=True, kw_only=True)
class Classification(Objective):
    """Mean cross-entropy of the classes, and the share of the rows that are classified rightly.

    The model is called as `apply(params, inputs, ctx)` and gives logits [batch, classes] and Aux.
    """

    unit: ClassVar[str] = "nats per row"

    smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes (Szegedy et al. 2016: 0.1). The
    loss that is reported is without it."""

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"objective.smoothing: {self.smoothing}; need 0 or more, below 1")

    def check(self, data: Dataset) -> None:
        targets = data.declare().get("targets")
        if targets is None or targets.axes != ("batch",):
            raise ValueError(f"objective: Classification of {type(data).__name__}; need classes")

    def __call__(
        self, model: Layer, params: Tree, batch: Batch, key: Array | None = None
    ) -> tuple[Array, Report, Tree]:
        sums, log_p, aux = _sums(model, params, batch, key)
        even = (batch["weights"] * -log_p.mean(-1)).sum()
        loss = (1 - self.smoothing) * sums["loss"] + self.smoothing * even
        return finished(loss, sums, aux)

    def measure(self, model: Layer, params: Tree, batch: Batch) -> dict[str, Array]:
        return _sums(model, params, batch, None)[0]


def _sums(
    model: Layer, params: Tree, batch: Batch, key: Array | None
) -> tuple[dict[str, Array], Array, Aux]:
    """Sums over the weighted rows, log-probabilities [batch, classes], and Aux."""
    logits, aux = model.apply(params, batch["inputs"], Context(key=key))
    log_p, weights = jax.nn.log_softmax(logits), batch["weights"]
    hit = jnp.arange(logits.shape[-1]) == batch["targets"][:, None]
    sums = {
        "loss": (weights * -jnp.where(hit, log_p, 0).sum(-1)).sum(),
        "tokens": weights.sum(),
        "accuracy": (weights * (logits.argmax(-1) == batch["targets"])).sum(),
    }
    return sums, log_p, aux
