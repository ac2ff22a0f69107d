"""Classification: one class of several for every row."""

import math
from collections.abc import Callable
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
    mixup: float = 0.0
    """Above 0, every training row is blended with another, the share being drawn from Beta(mixup,
    mixup) anew for each batch (Zhang et al. 2018; DeiT and KAT: 0.8)."""
    cutmix: float = 0.0
    """Above 0, a rectangle of another image takes the place of an image's own, its share being
    drawn from Beta(cutmix, cutmix) (Yun et al. 2019; DeiT and KAT: 1). With `mixup` as well, each
    batch has one of the two at even odds."""

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"objective.smoothing: {self.smoothing}; need 0 or more, below 1")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"objective.{name}: {getattr(self, name)}; need 0 or more")

    def check(self, data: Dataset) -> None:
        declared = data.declare()
        targets = declared.get("targets")
        if targets is None or targets.axes != ("batch",):
            raise ValueError(f"objective: Classification of {type(data).__name__}; need classes")
        if self.cutmix and len(declared["inputs"].shape) != 4:
            raise ValueError(f"objective.cutmix: {self.cutmix}; need 0 for what are no images")

    def __call__(
        self, model: Layer, params: Tree, batch: Batch, key: Array | None = None
    ) -> tuple[Array, Report, Tree]:
        share = None
        if key is not None and (self.mixup or self.cutmix):
            mixing, key = jax.random.split(key)
            inputs, share = self.mixed(batch["inputs"], mixing)
            batch = batch | {"inputs": inputs}
        sums, log_p, aux = _sums(model, params, batch, key, share)
        even = (batch["weights"] * -log_p.mean(-1)).sum()
        loss = (1 - self.smoothing) * sums["loss"] + self.smoothing * even
        return finished(loss, sums, aux)

    def measure(self, model: Layer, params: Tree, batch: Batch) -> dict[str, Array]:
        return _sums(model, params, batch, None)[0]

    def mixed(self, x: Array, key: Array) -> tuple[Array, Array]:
        """Rows [batch, ...] mixed with those of the reversed batch, and the share of the own."""
        which, beta, place = jax.random.split(key, 3)
        odds = 0.5 if self.mixup and self.cutmix else float(self.cutmix > 0)
        cut = jax.random.bernoulli(which, odds)
        alpha = jnp.where(cut, self.cutmix, self.mixup)
        share = jax.random.beta(beta, alpha, alpha)
        other = x[::-1]
        blended = (share * x + (1 - share) * other).astype(x.dtype)
        if not self.cutmix:
            return blended, share
        size = jnp.array(x.shape[1:3])
        half = (size * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
        centre = jax.random.randint(place, (2,), 0, size)
        rows, columns = (jnp.arange(n) - c for n, c in zip(x.shape[1:3], centre, strict=True))
        inside = ((rows >= -half[0]) & (rows < half[0]))[:, None, None]
        inside &= ((columns >= -half[1]) & (columns < half[1]))[:, None]
        pasted = jnp.where(inside, other, x)
        return jnp.where(cut, pasted, blended), jnp.where(cut, 1 - inside.mean(), share)


def _sums(
    model: Layer, params: Tree, batch: Batch, key: Array | None, share: Array | None = None
) -> tuple[dict[str, Array], Array, Aux]:
    """Sums over the weighted rows, whose targets have `share` where they are mixed with those of
    the reversed batch; log-probabilities [batch, classes], and Aux."""
    logits, aux = model.apply(params, batch["inputs"], Context(key=key))
    log_p, weights, targets = jax.nn.log_softmax(logits), batch["weights"], batch["targets"]

    def total(score: Callable[[Array], Array]) -> Array:
        own = score(targets)
        if share is not None:
            own = share * own + (1 - share) * score(targets[::-1])
        return (weights * own).sum()

    def nll(classes: Array) -> Array:
        hit = jnp.arange(logits.shape[-1]) == classes[:, None]
        return -jnp.where(hit, log_p, 0).sum(-1)

    sums = {
        "loss": total(nll),
        "tokens": weights.sum(),
        "accuracy": total(lambda classes: logits.argmax(-1) == classes),
    }
    return sums, log_p, aux
