"""Sparsing Law (arXiv 2411.02335): how many hidden activations a model needs for its perplexity.

FFN(x) = sum_i n_i with n_i = a_i w_i: a the hidden activations, w_i row i of the last matrix. For a
threshold t, CETT(t) is the mean over tokens of ||sum of the n_i with ||n_i|| <= t|| / ||FFN(x)||.
Every layer leaves out what the largest t with CETT(t) <= target allows; PPL-p% is the activation
ratio at the target that costs p % of perplexity.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from bestiary.eval.evaluate import evaluate
from bestiary.eval.probes import (
    CANDIDATES,
    Cett,
    Curve,
    Fat,
    Keep,
    Survey,
    TopK,
    feedforwards,
    with_probes,
)
from bestiary.layers.base import Context, Tree, flatten
from bestiary.train.objective import Batch
from bestiary.zoo.decoder import Decoder

QUANTILE = 0.99
"""Candidates for thresholds lie between the smallest contribution and this quantile of them."""
TOLERANCE = 1e-6
"""Of the search for the CETT."""


def candidate_range(
    surveys: Sequence[Mapping[str, np.ndarray]], quantile: float = QUANTILE
) -> tuple[np.ndarray, np.ndarray]:
    """The smallest contribution and the `quantile` of all, each [...], from surveys of batches."""
    least = np.min([report["least"] for report in surveys], 0)
    sizes = np.concatenate([report["sizes"] for report in surveys], -1)
    return least, np.nanquantile(sizes, quantile, -1).astype(np.float32)


def threshold(curve: np.ndarray, least: ArrayLike, most: ArrayLike, target: float) -> np.ndarray:
    """The candidate before the first with CETT > `target`: float32 [...], for `curve` [...,
    candidates].

    Found by bisection, as in the released program: CETT need not rise everywhere.
    """
    left = np.zeros(curve.shape[:-1], int)
    right = np.full_like(left, curve.shape[-1] - 1)
    while (left < right).any():
        middle = (left + right) // 2
        above = np.take_along_axis(curve, middle[..., None], -1)[..., 0] > target
        searching = left < right
        left = np.where(searching & ~above, middle + 1, left)
        right = np.where(searching & above, middle, right)
    step = (np.asarray(most) - least) / (curve.shape[-1] - 1)
    return np.asarray(least + step * np.maximum(left - 1, 0), np.float32)


@dataclass(frozen=True, kw_only=True)
class Thinned:
    """The model with some of its hidden activations left out."""

    setting: float
    """Of the rule: the CETT, eps, or share."""
    activation_ratio: float
    """Mean share of activations that are not zero, over layers and tokens."""
    perplexity: float
    layers: dict[str, list[float]]
    """The share by path in the model, with a value per repeated layer."""


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """What `sparsity` measured. FAT and top-k are set to the activation ratio of CETT."""

    zeros: Thinned
    """The model as it is: only exact zeros are left out."""
    cett: Thinned
    fat: Thinned
    topk: Thinned
    thresholds: dict[str, list[float]]
    """On |a_i| ||w_i||, by path, at this CETT."""


def sparsity(
    model: Decoder,
    params: Tree,
    batches: Sequence[Batch],
    token_bytes: ArrayLike,
    increase: float = 0.01,
) -> Sparsity:
    """PPL-p% activation ratio of `model` for a relative `increase` of its perplexity on `batches`.

    Covers the feed-forwards that end in `layers.feedforward.down`; those of a mixture's experts
    count as one, of which a token uses the units of its experts, their activations times the
    routing weights (the exact zeros of the others are not counted). Other arguments as in
    `evaluate`. Two passes over the batches find CETT(t) of every
    layer at every candidate, 20 more the target. Memory: the activations of one layer and batch.

    Raises ValueError when there is no such feed-forward.
    """
    tokens = sum(int((batch["segment_ids"] > 0).sum()) for batch in batches)
    layers = feedforwards(model.declare())
    surveys = {path: Survey(_stride(tokens, w.shape[-2])) for path, w in layers.items()}
    survey = _reports(model, params, batches, surveys)
    layers = {path: w for path, w in layers.items() if path in survey}
    if not layers:
        raise ValueError(
            "run: its model has no feed-forward that shows its hidden activations to a probe; "
            "need one that ends in `layers.feedforward.down`"
        )
    ranges = {path: candidate_range(survey[path]) for path in layers}
    reports = _reports(model, params, batches, {p: Curve(*r) for p, r in ranges.items()})
    curves = {
        path: np.cumsum(np.sum([r["cett"] for r in reports[path]], 0, np.float64), -1) / tokens
        for path in layers
    }

    def thinned(setting: float, probes: Mapping[str, Any]) -> Thinned:
        result = evaluate(model, with_probes(params, probes), batches, token_bytes)
        shares = {path: result.nonzero[f"{path}/nonzero"] for path in layers}
        ratio = float(np.mean(np.concatenate(list(shares.values()))))
        return Thinned(
            setting=setting, activation_ratio=ratio, perplexity=result.perplexity, layers=shares
        )

    def thresholds(target: float) -> dict[str, np.ndarray]:
        return {p: threshold(curve, *ranges[p], target) for p, curve in curves.items()}

    def at(target: float) -> Thinned:
        return thinned(target, {p: Cett(jnp.asarray(t)) for p, t in thresholds(target).items()})

    dense = thinned(0.0, dict.fromkeys(layers, Keep()))
    lower, upper = 0.0, 1.0
    while upper - lower > TOLERANCE:
        target = (lower + upper) / 2
        fits = at(target).perplexity < (1 + increase) * dense.perplexity
        lower, upper = (target, upper) if fits else (lower, target)
    cett = at(lower)
    share = cett.activation_ratio
    gates = np.concatenate([np.ravel(r["gates"]) for path in layers for r in survey[path]])
    eps = float(np.nanquantile(gates, 1 - share))
    return Sparsity(
        zeros=dense,
        cett=cett,
        fat=thinned(eps, {p: Fat(jnp.full_like(least, eps)) for p, (least, _) in ranges.items()}),
        topk=thinned(share, dict.fromkeys(layers, TopK(share))),
        thresholds={path: np.ravel(t).tolist() for path, t in thresholds(lower).items()},
    )


def _stride(tokens: int, hidden: int) -> int:
    """Leaves about as many samples as there are candidates; of every neuron, so no divisor."""
    least = max(1, tokens * hidden // CANDIDATES)
    return next(n for n in itertools.count(least) if math.gcd(n, hidden) == 1)


def show_sparsity(result: Sparsity) -> None:
    """Prints tables for a person."""
    from rich.console import Console
    from rich.table import Table

    console, dense = Console(), result.zeros.perplexity
    rules = Table("left out", "setting", "activation ratio", "perplexity", "increase")
    rules.title = "Activations that the perplexity needs"
    for name, thinned in (
        ("exact zeros", result.zeros),
        ("CETT", result.cett),
        ("FAT-eps", result.fat),
        ("top-k", result.topk),
    ):
        ratio, increase = f"{thinned.activation_ratio:.2%}", thinned.perplexity / dense - 1
        row = f"{thinned.setting:.6f}", ratio, f"{thinned.perplexity:.4f}", f"{increase:+.3%}"
        rules.add_row(name, *row)
    console.print(rules)
    layers = Table("layers", "first to last", title="Activation ratio by CETT")
    for path, shares in result.cett.layers.items():
        layers.add_row(path, " ".join(f"{share:.1%}" for share in shares))
    console.print(layers)


def _reports(
    model: Decoder, params: Tree, batches: Iterable[Batch], probes: Mapping[str, Any]
) -> dict[str, list[dict[str, np.ndarray]]]:
    """What the probes report of every batch, by the paths of those that their layer calls."""
    probed = with_probes(params, probes)
    found: dict[str, list[dict[str, np.ndarray]]] = {}
    for batch in batches:
        reports: dict[str, dict[str, np.ndarray]] = {}
        for name, value in jax.device_get(_metrics(model, probed, batch)).items():
            path, _, metric = name.rpartition("/")
            if path in probes and metric != "nonzero":
                reports.setdefault(path, {})[metric] = value
        for path, report in reports.items():
            found.setdefault(path, []).append(report)
    return found


@jax.jit
def _metrics(model: Decoder, params: Tree, batch: Batch) -> dict[str, jax.Array]:
    ctx = Context(positions=batch["positions"], segment_ids=batch["segment_ids"])
    return dict(flatten(model.hidden(params, batch["inputs"], ctx)[2].metrics))
