"""Evaluation: how well a model predicts text, and how many activations it uses to do so.

Models of anything else are measured as their objective says.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from numpy.typing import ArrayLike

from bestiary.eval.accounting import account
from bestiary.eval.caching import Caching, with_cache
from bestiary.kernels.chunks import whole_chunks
from bestiary.layers.base import Array, Aux, Context, Tree, flatten
from bestiary.layers.cache import Full
from bestiary.train.data import Data, load, validation_batches
from bestiary.train.dataset import Dataset
from bestiary.train.experiment import Experiment, language_model
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
    exact_rows: float
    """Share of the rows all of whose targets are, of those that have any."""
    tokens: int
    bytes: int
    nonzero: dict[str, list[float]]
    """Share of non-zero activations by path in the model, with a value per repeated layer."""


@dataclass(frozen=True, kw_only=True)
class CacheUse:
    """What the cache of `bestiary eval --cache` takes."""

    policy: str
    chunk: int
    """Tokens read at a time."""
    length: int
    """Tokens of a sequence."""
    bytes_per_token: float
    """Of a whole sequence's cache, by its tokens."""
    full_bytes_per_token: float
    """The same of a cache that keeps everything as it is."""
    others: list[str]
    """Token mixers that the policy does not apply to; their bytes count in both."""


def evaluate(
    model: Decoder,
    params: Tree,
    batches: Iterable[Batch],
    token_bytes: ArrayLike,
    chunk: int | None = None,
) -> Evaluation:
    """Measures `model` on batches of equal shape, in one compiled program.

    The host reads the sums of a batch while the device computes the next. Activation shares are
    means over all the positions of a batch, averaged over batches by their weight.

    Args:
      batches: dicts of [batch, T] arrays: int32 inputs, targets, positions, segment_ids; float32
        weights, 0 where a target does not count.
      token_bytes: [vocab], how many bytes of text each token stands for (see `count_bytes`).
      chunk: None: sequences are read as wholes. Else that many tokens at a time by way of the
        cache, which evicts or rounds what its policy says behind every chunk; shares of
        activations are then means over chunks.

    Raises:
      ValueError: when no target counts, or for a chunk below 1.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: {chunk}; need at least 1")
    token_bytes = jnp.asarray(token_bytes, jnp.int32)
    nats = weight = num_bytes = hits = rows = exact = 0.0
    shares: dict[str, np.ndarray] = {}

    def add(sums: Tree) -> None:
        nonlocal nats, weight, num_bytes, hits, rows, exact
        sums = jax.device_get(sums)
        nats, weight = nats + float(sums["nats"]), weight + float(sums["weight"])
        num_bytes, hits = num_bytes + float(sums["bytes"]), hits + float(sums["hits"])
        rows, exact = rows + float(sums["rows"]), exact + float(sums["exact"])
        for path, share in sums["nonzero"].items():
            shares[path] = shares.get(path, 0.0) + np.float64(sums["weight"]) * share

    running = None
    for batch in batches:
        following = batch_sums(model, params, batch, token_bytes, chunk=chunk)
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
        exact_rows=exact / rows,
        tokens=round(weight),
        bytes=round(num_bytes),
        nonzero={path: np.ravel(share / weight).tolist() for path, share in shares.items()},
    )


@partial(jax.jit, static_argnames="chunk")
def batch_sums(
    model: Decoder, params: Tree, batch: Batch, token_bytes: Array, *, chunk: int | None = None
) -> Tree:
    """Sums over a batch, weighted: "nats", "hits", "weight", "bytes"; the number of its "rows" with
    targets, and of those "exact" in all of them; its "nonzero" shares by path."""
    if chunk is None:
        x, _, aux = model.hidden(params, batch["inputs"], context(batch))
    else:
        x, aux = streamed(model, params, batch, chunk)
    targets, weights = batch["targets"], batch["weights"]
    nll, _ = head_losses(model, params, x, targets, 1)
    right, counted = model.logits(params, x).argmax(-1) == targets, weights > 0
    return {
        "nats": (weights * nll).sum(),
        "hits": (weights * right).sum(),
        "weight": weights.sum(),
        "rows": counted.any(1).sum(),
        "exact": (counted.any(1) & (right | ~counted).all(1)).sum(),
        "bytes": (weights * token_bytes[targets]).sum(),
        "nonzero": {p: v for p, v in flatten(aux.metrics) if p.endswith("nonzero")},
    }


def streamed(model: Decoder, params: Tree, batch: Batch, chunk: int) -> tuple[Array, Aux]:
    """As `Decoder.hidden`, of rows read `chunk` tokens at a time into a cache; Aux is the mean."""
    rows, length = batch["inputs"].shape
    real = batch["segment_ids"] > 0
    parts = {
        "tokens": (batch["inputs"], 0),
        "positions": (jnp.where(real, batch["positions"], -1), -1),
        "segments": (batch["segment_ids"], 0),
    }

    def split(x: Array, fill: int) -> Array:
        return whole_chunks(x, chunk, fill).reshape(rows, -1, chunk).swapaxes(0, 1)

    def read(cache: Tree, part: Tree) -> tuple[Tree, tuple[Array, Aux]]:
        ctx = Context(positions=part["positions"], segment_ids=part["segments"])
        x, cache, aux = model.hidden(params, part["tokens"], ctx, cache)
        return cache, (x, aux)

    chunks = {name: split(x, fill) for name, (x, fill) in parts.items()}
    _, (x, aux) = jax.lax.scan(read, model.init_cache(rows, length), chunks)
    aux = jax.tree.map(lambda v: v.mean(0), aux)
    return x.swapaxes(0, 1).reshape(rows, -1, x.shape[-1])[:, :length], aux


def count_bytes(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """How many bytes of UTF-8 each token of the model stands for: int32 [vocab_size]; 0 for those
    without text."""
    return np.pad(tokenizer.num_bytes(), (0, vocab_size - tokenizer.vocab_size))


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a trained model on held-out data; what is said of text is for language models."""

    run_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""
    data_path: Annotated[str | None, tyro.conf.arg(name="data.path")] = None
    """Other data, all of it, in any form that training takes; the run's validation split when
    absent."""
    steps: int | None = None
    """How many batches, from the start; when absent all, and 16 of them for --sparsity."""
    sparsity: bool = False
    """Also measure how many activations the model needs (Sparsing Law), beside FAT and top-k."""
    ppl_increase: float = 0.01
    """What leaving out activations may add to the perplexity, as a share of it."""
    caching: tyro.conf.OmitArgPrefixes[Caching] = Caching()
    cache_chunk: int = 16
    """With --cache, tokens that are read at a time, as a prompt is; they see each other in full
    before the cache evicts. 1 is decoding token by token."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        if self.cache_chunk < 1:
            raise ValueError(f"cache_chunk: {self.cache_chunk}; need at least 1")
        cache = self.caching.cache
        if cache in ("snapkv", "pyramidkv") and self.cache_chunk == 1:
            raise ValueError(f"cache_chunk: 1; {cache} chooses by the tokens of a chunk, need more")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: {self.steps}; need at least 1")
        if not self.ppl_increase > 0:
            raise ValueError(f"ppl_increase: {self.ppl_increase}; need more than 0")


def run(command: Evaluate) -> None:
    """`bestiary eval`. Raises ValueError for a directory that holds no readable run, data that
    cannot be read, or options for text of a model of something else."""
    from bestiary.train.checkpoint import load_run

    experiment, params = load_run(command.run_dir)
    path = command.data_path
    if command.sparsity or command.caching.cache or isinstance(experiment.model, Decoder):
        model, text = language_model(experiment)
        text = text if path is None else text.elsewhere(path)
        return _run_text(command, model, text, params)
    data = experiment.data if path is None else experiment.data.elsewhere(path)
    found = measure(experiment, data, params, command.steps)
    if command.json:
        print(json.dumps(found))
    else:
        show_measures(found)


def measure(
    experiment: Experiment, data: Dataset, params: Tree, steps: int | None = None
) -> dict[str, float]:
    """What the objective measures on `steps` batches of the validation split of `data`, None: all.

    Raises ValueError for data that cannot be read, or not by this model, or without such a split.
    """
    loaded, program = data.load(), jax.jit(experiment.objective.measure, static_argnums=0)
    loaded.check(experiment.model)
    if not loaded.validation_batches:
        raise ValueError("data: nothing is kept for validation; need something to measure on")
    batches = islice(loaded.validation(), steps)
    found = [jax.device_get(program(experiment.model, params, batch)) for batch in batches]
    return experiment.objective.summary(found)


def _run_text(command: Evaluate, model: Decoder, data: Data, params: Tree) -> None:
    from bestiary.eval.sparsity import show_sparsity, sparsity

    tokenizer, _, validation = load(data)
    token_bytes = count_bytes(tokenizer, model.vocab_size)
    batches = validation_batches(validation, data)
    chunk = use = None
    if command.caching.cache is not None:
        chunk = command.cache_chunk
        full, _ = with_cache(model, Full())
        model, params, others = command.caching.apply(model, params, data.length)
        use = CacheUse(
            policy=command.caching.cache,
            chunk=chunk,
            length=data.length,
            bytes_per_token=account(model, data.length).cache_bytes_per_token,
            full_bytes_per_token=account(full, data.length).cache_bytes_per_token,
            others=others,
        )
    result = evaluate(model, params, islice(batches, command.steps), token_bytes, chunk)
    thinned = None
    if command.sparsity:
        some = list(islice(batches, command.steps or SPARSITY_BATCHES))
        thinned = sparsity(model, params, some, token_bytes, command.ppl_increase)
    if command.json:
        found = dataclasses.asdict(result)
        if thinned is not None:
            found["sparsity"] = dataclasses.asdict(thinned)
        if use is not None:
            found["cache"] = dataclasses.asdict(use)
        print(json.dumps(found))
        return
    show(result, use)
    if thinned is not None:
        show_sparsity(thinned)


def show_measures(found: dict[str, float | int]) -> None:
    """Prints a table for a person."""
    from rich.console import Console
    from rich.table import Table

    summary = Table("measure", "value", title="Prediction")
    for name, value in found.items():
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        summary.add_row(name.replace("_", " "), text)
    Console().print(summary)


def show(result: Evaluation, use: CacheUse | None = None) -> None:
    """Prints tables for a person."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    show_measures({n: v for n, v in dataclasses.asdict(result).items() if n != "nonzero"})
    if use is not None:
        cache = Table("measure", "value", title=f"Cache, read {use.chunk} tokens at a time")
        cache.add_row("policy", use.policy)
        cache.add_row(f"bytes per token at {use.length}", f"{use.bytes_per_token:,.1f}")
        cache.add_row("the same of a full cache", f"{use.full_bytes_per_token:,.1f}")
        for mixer in use.others:
            cache.add_row("as before", mixer)
        console.print(cache)
    if result.nonzero:
        layers = Table("layers", "first to last", title="Share of non-zero activations")
        for path, shares in result.nonzero.items():
            layers.add_row(path.removesuffix("/nonzero"), " ".join(f"{s:.1%}" for s in shares))
        console.print(layers)
