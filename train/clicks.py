"""Click-through rates: the binary cross-entropy of samples, and mini-batch aware regularisation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from bestiary.layers.base import Array, Aux, Layer, Tree
from bestiary.train.dataset import Dataset
from bestiary.train.interactions import Interactions
from bestiary.train.objective import Objective, Report, finished
from bestiary.zoo.din import DIN, minibatch_aware

Batch = dict[str, Any]
"""See `Interactions.declare`."""


def click_losses(
    model: DIN, params: Tree, batch: Batch, training: bool = False
) -> tuple[Array, Array, Aux]:
    """Cross-entropy (nats) of every sample, and its logit: float32 [batch] each, and Aux."""
    logits, aux = model.apply(params, batch, training)
    logits = logits.astype(jnp.float32)
    return jax.nn.softplus(logits) - batch["labels"] * logits, logits, aux


@dataclass(frozen=True, kw_only=True)
class Clicks(Objective):
    """Mean cross-entropy of the weighted samples, and the penalty of the embeddings they use."""

    unit: ClassVar[str] = "nats per sample"

    regularization: float = 0.01
    """Of mini-batch aware regularisation (Zhou et al. 2018); the paper's value is unconfirmed."""

    def __post_init__(self) -> None:
        if self.regularization < 0:
            raise ValueError(f"objective.regularization: {self.regularization}; need 0 or more")

    def check(self, data: Dataset) -> None:
        if not isinstance(data, Interactions):
            raise ValueError(f"objective: Clicks of {type(data).__name__}; need Interactions")

    def __call__(
        self, model: Layer, params: Tree, batch: Batch, key: Array | None = None
    ) -> tuple[Array, Report, Tree]:
        """A step trains, with or without a key: `Dice` and batch norms take the batch's
        statistics."""
        del key
        assert isinstance(model, DIN)
        nll, _, aux = click_losses(model, params, batch, training=True)
        count = batch["weights"].sum()
        loss = (batch["weights"] * nll).sum()
        sums = {"loss": loss, "tokens": count}
        if self.regularization:
            sums["penalty"] = self.regularization * self.penalty(model, params, batch) * count
            loss += sums["penalty"]
        return finished(loss, sums, aux)

    def measure(self, model: Layer, params: Tree, batch: Batch) -> dict[str, Array]:
        """The sums, and all that AUC and GAUC need."""
        assert isinstance(model, DIN)
        nll, logits, _ = click_losses(model, params, batch)
        weights = batch["weights"]
        rows = {name: batch[name] for name in ("user", "labels", "weights")}
        return {"loss": (weights * nll).sum(), "tokens": weights.sum(), "logits": logits} | rows

    def summary(self, measured: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
        """loss, auc and gauc of the samples with a weight; NaN where labels are all alike."""
        from bestiary.eval.ranking import auc, gauc

        names = ("user", "labels", "weights", "logits")
        rows = {n: np.concatenate([np.asarray(batch[n]) for batch in measured]) for n in names}
        user, labels, logits = (rows[n][rows["weights"] > 0] for n in ("user", "labels", "logits"))
        sums = [{n: batch[n] for n in ("loss", "tokens")} for batch in measured]
        ranked = {"auc": auc(labels, logits), "gauc": gauc(user, labels, logits)}
        return super().summary(sums) | ranked

    def penalty(self, model: DIN, params: Tree, batch: Batch) -> Array:
        """1/2 sum |w_j|^2 / n_j over the items and categories of the batch, without coefficient."""
        total = jnp.float32(0)
        tables = {"items": "item", "categories": "category"}
        if not model.num_categories:
            del tables["categories"]
        for table, name in tables.items():
            past = "history" if name == "item" else "history_category"
            ids, counts = (
                jnp.concatenate([batch[f"{name}{end}"], batch[f"{past}{end}"].reshape(-1)])
                for end in ("", "_count")
            )
            total += minibatch_aware(params[table]["table"], ids, counts)
        return total
