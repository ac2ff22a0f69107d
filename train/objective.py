"""The contract of objectives, and next-token prediction: the loss of every position, z-loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from bestiary.layers.base import Array, Aux, Context, Layer, Tree
from bestiary.train.data import Data
from bestiary.train.dataset import Dataset
from bestiary.zoo.decoder import Decoder

Batch = dict[str, Any]
"""As `Dataset.declare` says. Of text: inputs, targets, positions, segment_ids int32 [batch, seq];
weights float32 [batch, seq]."""

Report = dict[str, Any]
"""What a step reports: "sums" over the batch, by name, and "means", what the layers say."""


class Objective:
    """The base of objectives: frozen dataclasses that say what a model learns from a batch.

    Every sum over a batch that an objective returns has an entry "tokens", the weight of what it is
    summed over; sums of the parts of a batch add up to that of the whole.
    """

    unit: ClassVar[str] = "loss"
    """What the loss measures, for people."""

    def check(self, data: Dataset) -> None:
        """Raises ValueError for data that it cannot learn from."""

    def __call__(
        self, model: Layer, params: Tree, batch: Batch, key: Array | None = None
    ) -> tuple[Array, Report, Tree]:
        """The sum to be minimised, what to report (its sums have "loss"), next states of layers."""
        raise NotImplementedError

    def measure(self, model: Layer, params: Tree, batch: Batch) -> dict[str, Array]:
        """Of a batch of the validation split: "loss", "tokens" and further sums by name."""
        raise NotImplementedError

    def summary(self, measured: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
        """The means, by name, of what `measure` gave for several batches: "loss" and others."""
        names = sorted(measured[0], key=lambda name: name != "loss")
        sums = {name: sum(float(batch[name]) for batch in measured) for name in names}
        count = max(sums.pop("tokens"), 1)
        return {name: value / count for name, value in sums.items()}


def finished(loss: Array, sums: dict[str, Array], aux: Aux) -> tuple[Array, Report, Tree]:
    """What an objective returns: the layers' own losses, means themselves, count once per
    weighted target."""
    for name, value in aux.losses.items():
        loss += value * sums["tokens"]
        sums[name] = value * sums["tokens"]
    return loss, {"sums": sums, "means": aux.metrics}, aux.state


def context(batch: Batch, key: Array | None = None) -> Context:
    return Context(positions=batch["positions"], segment_ids=batch["segment_ids"], key=key)


def token_losses(
    model: Decoder, params: Tree, batch: Batch, *, key: Array | None = None, chunks: int = 1
) -> tuple[Array, Array, Aux]:
    """Negative log-likelihood (nats) and log Z of every target: float32 [batch, seq] each, and Aux.

    The logits exist for 1 / `chunks` of the positions at a time, forwards and backwards. Raises
    ValueError when the sequence does not divide into `chunks`.
    """
    x, _, aux = model.hidden(params, batch["inputs"], context(batch, key))
    return *head_losses(model, params, x, batch["targets"], chunks), aux


def head_losses(
    model: Decoder, params: Tree, x: Array, targets: Array, chunks: int
) -> tuple[Array, Array]:
    """As `token_losses`, from final hidden states [batch, seq, dim]."""

    def head(x: Array, targets: Array) -> tuple[Array, Array]:
        logits = model.logits(params, x)
        log_z = jax.nn.logsumexp(logits, -1)
        # a masked sum, not a gather: it fuses, and stays local when the vocabulary is sharded
        hit = jnp.arange(logits.shape[-1]) == targets[..., None]
        return log_z - jnp.where(hit, logits, 0).sum(-1), log_z

    if chunks == 1:
        return head(x, targets)
    batch_size, length, _ = x.shape
    if length % chunks:
        raise ValueError(f"chunks: {chunks} does not divide the sequence length {length}")

    def split(a: Array) -> Array:
        return a.reshape(batch_size, chunks, -1, *a.shape[2:]).swapaxes(0, 1)

    def one(xs: tuple[Array, Array]) -> tuple[Array, Array]:
        return jax.checkpoint(head)(*xs)

    nll, log_z = jax.lax.map(one, (split(x), split(targets)))
    shape = (batch_size, length)
    return nll.swapaxes(0, 1).reshape(shape), log_z.swapaxes(0, 1).reshape(shape)


def further_targets(batch: Batch) -> tuple[Array, Array]:
    """The token after the next of every position, and its weight: 0 where any of the three stands
    in another document or row."""
    targets, weights = batch["targets"], batch["weights"]
    following = jnp.roll(targets, -1, 1).at[:, -1].set(0)
    joined = (weights[:, :-1] > 0) & (batch["segment_ids"][:, :-1] == batch["segment_ids"][:, 1:])
    return following, jnp.pad(jnp.where(joined, weights[:, 1:], 0), ((0, 0), (0, 1)))


@dataclass(frozen=True, kw_only=True)
class NextToken(Objective):
    """Mean negative log-likelihood of the weighted targets, z-loss, and the layers' own losses."""

    unit: ClassVar[str] = "nats per token"

    z_loss: float = 0.0
    """Coefficient of mean (log Z)^2, which keeps the logits from drifting (PaLM uses 1e-4)."""
    mtp: float = 0.1
    """Weight of the loss of models that also predict the token after the next (Ling 2.0: 0.1)."""
    chunks: int = 1
    """Logits exist for 1/chunks of a row at a time: less memory for large vocabularies."""

    def __post_init__(self) -> None:
        if self.z_loss < 0:
            raise ValueError(f"objective.z_loss: {self.z_loss}; need 0 or more")
        if self.mtp < 0:
            raise ValueError(f"objective.mtp: {self.mtp}; need 0 or more")
        if self.chunks < 1:
            raise ValueError(f"objective.chunks: {self.chunks}; need at least 1")

    def check(self, data: Dataset) -> None:
        if not isinstance(data, Data):
            raise ValueError(f"objective: NextToken of {type(data).__name__}; need text, Data")
        if data.length % self.chunks:
            raise ValueError(
                f"objective.chunks: {self.chunks}; need a divisor of data.length {data.length}"
            )

    def __call__(
        self, model: Layer, params: Tree, batch: Batch, key: Array | None = None
    ) -> tuple[Array, Report, Tree]:
        assert isinstance(model, Decoder)
        ctx = context(batch, key)
        x, _, aux = model.hidden(params, batch["inputs"], ctx)
        nll, log_z = head_losses(model, params, x, batch["targets"], self.chunks)
        weights = batch["weights"]
        count = weights.sum()
        loss = (weights * nll).sum()
        report = {"loss": loss, "tokens": count}
        if self.z_loss:
            loss += self.z_loss * (weights * jnp.square(log_z)).sum()
        if model.mtp is not None and self.mtp:
            x, further = model.further(params, x, batch["targets"], ctx)
            targets, weights = further_targets(batch)
            nll, _ = head_losses(model, params, x, targets, self.chunks)
            report["mtp"] = (weights * nll).sum()
            loss += self.mtp * report["mtp"]
            aux |= further
        return finished(loss, report, aux)

    def measure(self, model: Layer, params: Tree, batch: Batch) -> dict[str, Array]:
        assert isinstance(model, Decoder)
        nll, _, _ = token_losses(model, params, batch, chunks=self.chunks)
        return {"loss": (batch["weights"] * nll).sum(), "tokens": batch["weights"].sum()}
