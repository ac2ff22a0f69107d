"""Clipped activations put into a model: their bounds profiled, and searched as FT-ClipAct does."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np

from bestiary.eval.faults import Format, flip
from bestiary.layers.activations import Relu
from bestiary.layers.base import Array, Layer, Tree, flatten, layer, map_layers, update
from bestiary.layers.clipped import Clipped, Kind

L = TypeVar("L", bound=Layer)
Per = Literal["layer", "neuron", "hybrid"]
Forward = Callable[[Layer, Tree, Array], Array]  # (model, params, x) -> logits [rows, classes]

RATES = (1e-7, 1e-6, 3e-6, 1e-5, 3e-5)


def plain(model: Layer, params: Tree, x: Array) -> Array:
    """Logits of a model that returns nothing else."""
    return model.apply(params, x)


def clip(
    model: L,
    params: Tree,
    x: Array,
    *,
    kind: Kind = "zero",
    per: Per = "layer",
    forward: Forward = plain,
) -> tuple[L, Tree]:
    """A model with `Clipped` in the place of every ReLU, and its parameters, bounds profiled.

    Args:
      model: layers whose activations are `Relu` or `Clipped`.
      params: its parameters.
      x: the calibration inputs, [rows, ...].
      kind: of the clipping.
      per: one bound a layer; one for each entry of the last axis; or hybrid (ProAct), the latter in
        the activation that is computed last and the former elsewhere.

    Raises:
      ValueError: unknown `per`, or a model without such activations.
    """
    if per not in get_args(Per):
        raise ValueError(f"per: {per!r}; need one of {', '.join(get_args(Per))}")
    neurons: dict[int, int] = {}

    def place(make: Callable[[int], Layer]) -> L:
        number = itertools.count()
        return map_layers(
            lambda x: make(next(number)) if isinstance(x, Relu | Clipped) else x, model
        )

    watched = place(lambda i: _Watched(number=i, see=neurons.__setitem__))
    jax.eval_shape(partial(forward, watched), params, x)
    if not neurons:
        raise ValueError("model: has no activation Relu or Clipped to clip")
    last = list(neurons)[-1]

    def clipped(i: int) -> Clipped:
        own = per == "neuron" or (per == "hybrid" and i == last)
        return Clipped(kind=kind, neurons=neurons.get(i) if own else None)

    new = place(clipped)
    started = update(new.init(jax.random.key(0)), _without_bounds(params))
    return new, profile(new, started, [x], forward=forward)


def profile(
    model: Layer, params: Tree, batches: Iterable[Array], *, forward: Forward = plain
) -> Tree:
    """`params` with every bound at its largest activation over `batches` of inputs (Ranger).

    An activation that is computed several times with one bound gets the sum of their maxima, which
    is no less than each.
    """
    measuring = map_layers(lambda x: _Measured(**vars(x)) if isinstance(x, Clipped) else x, model)

    @jax.jit
    def maxima(params: Tree, x: Array) -> dict[str, Array]:
        gradient = jax.grad(lambda p: forward(measuring, p, x).sum())(params)
        leaves = dict(flatten(gradient))
        return {path: leaves[path] for path in bound_paths(model)}

    most: dict[str, Array] = {}
    for x in batches:
        new = maxima(params, x)
        most = jax.tree.map(jnp.maximum, most, new) if most else new
    for path, value in most.items():
        params = with_bound(params, path, value)
    return params


def bound_paths(model: Layer) -> list[str]:
    """Where the parameters hold the bounds, in the order of declaration."""
    return [path for path, _ in flatten(model.declare()) if path.split("/")[-1] == "bound"]


def with_bound(params: Tree, path: str, value: Array) -> Tree:
    tree: Tree = value
    for name in reversed(path.split("/")):
        tree = {name: tree}
    return update(params, tree)


@partial(jax.jit, static_argnames=("model", "forward"))
def accuracy(
    model: Layer, params: Tree, x: Array, labels: Array, *, forward: Forward = plain
) -> Array:
    """Percent of the rows whose largest logit is that of the label; NaN counts as the least."""
    logits = forward(model, params, x)
    best = jnp.where(jnp.isnan(logits), -jnp.inf, logits).argmax(-1)
    return 100 * (best == labels).sum(dtype=jnp.float32) / len(labels)


@partial(jax.jit, static_argnames=("model", "draws", "format", "forward"))
def faulty_accuracy(
    model: Layer,
    params: Tree,
    x: Array,
    labels: Array,
    key: Array,
    rate: Array | float,
    *,
    draws: int,
    format: Format | None = None,
    forward: Forward = plain,
) -> Array:
    """`accuracy` under each of `draws` fault patterns of all parameters: float32 [draws]."""

    def one(key: Array) -> Array:
        faulty = flip(params, key, rate, format)
        return accuracy(model, faulty, x, labels, forward=forward)

    return jax.lax.map(one, jax.random.split(key, draws))


def search_bounds(
    model: Layer,
    params: Tree,
    x: Array,
    labels: Array,
    key: Array,
    *,
    rates: Sequence[float] = RATES,
    draws: int = 5,
    format: Format | None = None,
    points: int = 4,
    rounds: int = 4,
    least_rounds: int = 3,
    tolerance: float = 0.2,
    forward: Forward = plain,
) -> Tree:
    """`params` with the bounds of FT-ClipAct (Hoang et al. 2020), searched layer by layer.

    From the front to the back, the interval [0, bound] is cut by `points` equally spaced bounds, of
    which the best is kept, and then the two intervals beside it, until `rounds` are over, or at
    least `least_rounds` and the measure moves by at most `tolerance` between neighbours. The
    measure of a bound is the area under the accuracy (percent) over the fault rates, spaced equally
    from 0.2 to 1. All bounds meet the same faults.

    Raises:
      ValueError: a bound is not one number for its layer.
    """
    spacing = np.linspace(0.2, 1, len(rates))

    def area(params: Tree) -> float:
        means = [
            faulty_accuracy(
                model, params, x, labels, key, rate, draws=draws, format=format, forward=forward
            ).mean()
            for rate in rates
        ]
        return float(np.trapezoid(np.asarray(means), spacing))

    leaves = dict(flatten(params))
    for path in bound_paths(model):
        if leaves[path].shape:
            raise ValueError(f"{path}: {leaves[path].shape}; the search needs one bound a layer")
        low, high = 0.0, float(leaves[path])
        best, measure = high, -np.inf
        for done in range(1, rounds + 1):
            tried = np.linspace(low, high, points + 1)[1:]
            areas = [area(with_bound(params, path, jnp.float32(t))) for t in tried]
            i = int(np.argmax(areas))
            if areas[i] >= measure:
                best, measure = float(tried[i]), areas[i]
            step = (high - low) / points
            low, high = tried[i] - step, min(tried[i] + step, high)
            if done >= least_rounds and np.abs(np.diff(areas)).max(initial=0) <= tolerance:
                break
        params = with_bound(params, path, jnp.float32(best))
    return params


@layer
class _Watched(Relu):
    """Tells `see` the size of its last axis while it is traced."""

    number: int
    see: Callable[[int, int], None]

    def apply(self, params: Tree, x: Array) -> Array:
        self.see(self.number, x.shape[-1])
        return super().apply(params, x)


@layer
class _Measured(Clipped):
    """A ReLU that gives its largest value as the gradient of its bound: so a maximum finds its way
    out of loops and recomputed blocks, whatever the model returns."""

    def apply(self, params: Tree, x: Array) -> Array:
        return _measure(params["bound"], x)


@jax.custom_vjp
def _measure(bound: Array, x: Array) -> Array:
    del bound
    return jax.nn.relu(x)


def _measure_forward(bound: Array, x: Array) -> tuple[Array, tuple[Array, Array]]:
    axes = tuple(range(x.ndim - bound.ndim))
    return _measure(bound, x), (jax.nn.relu(x).max(axes).astype(bound.dtype), x)


def _measure_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    most, x = residuals
    return most, jnp.where(x > 0, g, 0)


_measure.defvjp(_measure_forward, _measure_backward)


def _without_bounds(params: Tree) -> Tree:
    """`params` of which clipped activations get new bounds."""
    return {
        name: _without_bounds(child) if isinstance(child, dict) else child
        for name, child in params.items()
        if name != "bound"
    }
