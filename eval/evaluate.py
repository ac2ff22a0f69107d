"""Evaluation: how well a model predicts text, and how many activations it uses to do so."""

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from numpy.typing import ArrayLike

from bestiary.layers.base import Array, Tree, flatten
from bestiary.train.data import load, validation_batches
from bestiary.train.objective import Batch, context, head_losses
from bestiary.train.tokenizer import Tokenizer
from bestiary.zoo.decoder import Decoder

SPARSITY_BATCHES = 16


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` measured."""

    nats_per_token: float
    bits_per_byte: float
    """Comparable between tokenisers; nan when the targets stand for no bytes."""
    perplexity: float
    accuracy: float
    """Share of the targets that are the likeliest token."""
    tokens: int
    bytes: int
    nonzero: dict[str, list[float]]
    """Share of non-zero activations by path in the model, with a value per repeated layer."""


def evaluate(
    model: Decoder, params: Tree, batches: Iterable[Batch], token_bytes: ArrayLike
) -> Evaluation:
    """Measures `model` on batches of equal shape, in one compiled program.

    The host reads the sums of a batch while the device computes the next. Activation shares are
    means over all the positions of a batch, averaged over batches by their weight.

    Args:
      batches: dicts of [batch, T] arrays: int32 inputs, targets, positions, segment_ids; float32
        weights, 0 where a target does not count.
      token_bytes: [vocab], how many bytes of text each token stands for (see `count_bytes`).

    Raises:
      ValueError: when no target counts.
    """
    token_bytes = jnp.asarray(token_bytes, jnp.int32)
    nats = weight = num_bytes = hits = 0.0
    shares: dict[str, np.ndarray] = {}

    def add(sums: Tree) -> None:
        nonlocal nats, weight, num_bytes, hits
        sums = jax.device_get(sums)
        nats, weight = nats + float(sums["nats"]), weight + float(sums["weight"])
        num_bytes, hits = num_bytes + float(sums["bytes"]), hits + float(sums["hits"])
        for path, share in sums["nonzero"].items():
            shares[path] = shares.get(path, 0.0) + np.float64(sums["weight"]) * share

    running = None
    for batch in batches:
        following = batch_sums(model, params, batch, token_bytes)
        if running is not None:
            add(running)
        running = following
    if running is not None:
        add(running)
    if not weight:
        raise ValueError("batches: no target has a weight above 0; need at least one")
    loss = nats / weight
    return Evaluation(
        nats_per_token=loss,
        bits_per_byte=nats / math.log(2) / (num_bytes or math.nan),
        perplexity=float(np.exp(loss)),
        accuracy=hits / weight,
        tokens=round(weight),
        bytes=round(num_bytes),
        nonzero={path: np.ravel(share / weight).tolist() for path, share in shares.items()},
    )


@jax.jit
def batch_sums(model: Decoder, params: Tree, batch: Batch, token_bytes: Array) -> Tree:
    """Weighted sums over a batch: "nats", "hits", "weight", "bytes", and its "nonzero" shares by
    path."""
    x, _, aux = model.hidden(params, batch["inputs"], context(batch))
    targets, weights = batch["targets"], batch["weights"]
    nll, _ = head_losses(model, params, x, targets, 1)
    return {
        "nats": (weights * nll).sum(),
        "hits": (weights * (model.logits(params, x).argmax(-1) == targets)).sum(),
        "weight": weights.sum(),
        "bytes": (weights * token_bytes[targets]).sum(),
        "nonzero": {p: v for p, v in flatten(aux.metrics) if p.endswith("nonzero")},
    }


def count_bytes(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """How many bytes of UTF-8 each token of the model stands for: int32 [vocab_size]; 0 for those
    without text."""
    return np.pad(tokenizer.num_bytes(), (0, vocab_size - tokenizer.vocab_size))


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a trained model on held-out text."""

    run_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""
    data_path: Annotated[str | None, tyro.conf.arg(name="data.path")] = None
    """Other text, all of it, in any form that training takes; the run's validation split when
    absent."""
    steps: int | None = None
    """How many batches, from the start; when absent all, and 16 of them for --sparsity."""
    sparsity: bool = False
    """Also measure how many activations the model needs (Sparsing Law), beside FAT and top-k."""
    ppl_increase: float = 0.01
    """What leaving out activations may add to the perplexity, as a share of it."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: {self.steps}; need at least 1")
        if not self.ppl_increase > 0:
            raise ValueError(f"ppl_increase: {self.ppl_increase}; need more than 0")


def run(command: Evaluate) -> None:
    """`bestiary eval`. Raises ValueError for a directory that holds no readable run, or text that
    cannot be read."""
    from bestiary.eval.sparsity import show_sparsity, sparsity
    from bestiary.train.checkpoint import load_run

    experiment, params = load_run(command.run_dir)
    data = experiment.data
    if command.data_path is not None:
        data = dataclasses.replace(data, path=command.data_path, validation_fraction=1.0)
    tokenizer, _, validation = load(data)
    model, token_bytes = experiment.model, count_bytes(tokenizer, experiment.model.vocab_size)
    batches = validation_batches(validation, data)
    result = evaluate(model, params, islice(batches, command.steps), token_bytes)
    thinned = None
    if command.sparsity:
        some = list(islice(batches, command.steps or SPARSITY_BATCHES))
        thinned = sparsity(model, params, some, token_bytes, command.ppl_increase)
    if command.json:
        found = dataclasses.asdict(result)
        if thinned is not None:
            found["sparsity"] = dataclasses.asdict(thinned)
        print(json.dumps(found))
        return
    show(result)
    if thinned is not None:
        show_sparsity(thinned)


def show(result: Evaluation) -> None:
    """Prints tables for a person."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    summary = Table("measure", "value", title="Prediction")
    for name, value in dataclasses.asdict(result).items():
        if name != "nonzero":
            text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            summary.add_row(name.replace("_", " "), text)
    console.print(summary)
    if result.nonzero:
        layers = Table("layers", "first to last", title="Share of non-zero activations")
        for path, shares in result.nonzero.items():
            layers.add_row(path.removesuffix("/nonzero"), " ".join(f"{s:.1%}" for s in shares))
        console.print(layers)
