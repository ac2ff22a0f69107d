"""ProAct: progressive training of the bounds of clipped activations (arXiv 2406.06313)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bestiary.eval.clipping import Forward, accuracy, bound_paths, plain, with_bound
from bestiary.layers.base import Array, Layer, Tree, flatten

Rows = tuple[Array, Array]
"""Inputs [rows, ...] and labels, int [rows]."""


@dataclass(frozen=True, kw_only=True)
class ProAct:
    """How the bounds are trained; the length of the warm-up could not be confirmed."""

    decays: tuple[float, ...] = tuple(4 * 10.0**-k for k in range(5, 16))
    """Weight decays, tried in turn: they are what shrinks the bounds."""
    epochs: int = 105
    """At most, for one weight decay."""
    warmup: int = 5
    """Epochs in which the learning rate rises; then it falls to 0 as a cosine."""
    layer_rate: float = 1e-2
    """Learning rate of a bound for a whole layer."""
    neuron_rate: float = 1e-3
    """Learning rate of a bound for each neuron."""
    batch_size: int = 128
    tolerance: float = 0.2
    """Points of accuracy that the bounds may cost."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; need at least 1")
        if not 0 <= self.warmup <= self.epochs:
            raise ValueError(f"warmup: {self.warmup}; need 0 to epochs {self.epochs}")
        if self.tolerance < 0:
            raise ValueError(f"tolerance: {self.tolerance}; need 0 or more")

    def rate(self, epoch: int) -> float:
        """Share of the learning rate in an epoch, from 0."""
        if epoch < self.warmup:
            return (epoch + 1) / self.warmup
        left = self.epochs - self.warmup
        return 0.5 + 0.5 * float(np.cos(np.pi * (epoch - self.warmup) / left))


def train_bounds(
    model: Layer,
    params: Tree,
    original: Layer,
    train: Rows,
    validation: Rows,
    key: Array,
    options: ProAct = ProAct(),
    *,
    forward: Forward = plain,
    say: Callable[[str], None] = lambda line: None,
) -> Tree:
    """`params` with trained bounds; nothing else of them changes.

    From the last activation to the first, for every weight decay in turn, Adam trains the bound on
    the cross-entropy with the labels plus that with the original model's softmax. After every epoch
    the bound is kept if the validation accuracy is within `tolerance` of the original's; else the
    last one that was kept returns, and the next weight decay follows.

    Args:
      model: with `Clipped` activations, of kind "smooth" so that bounds have gradients.
      params: its parameters, bounds profiled.
      original: the model before it was clipped; it ignores the bounds.
      train: see `Rows`; the last batch of an epoch is left out where it is not full.
      validation: see `Rows`.
      key: of the order of the rows.

    Raises:
      ValueError: fewer training rows than a batch.
    """
    x, labels = train
    if len(x) < options.batch_size:
        raise ValueError(f"train: {len(x)} rows; need at least the batch_size {options.batch_size}")
    teacher = jax.nn.softmax(jax.jit(partial(forward, original))(params, x))
    wanted = float(accuracy(original, params, *validation, forward=forward))
    learn = partial(_epoch, model, rows=(x, labels, teacher), forward=forward)
    steps = len(x) // options.batch_size

    for path in reversed(bound_paths(model)):
        start = kept = dict(flatten(params))[path]
        peak = options.neuron_rate if start.ndim else options.layer_rate
        for decay in options.decays:
            bound, state = kept, optax.scale_by_adam().init(kept)
            for i in range(options.epochs):
                key, own = jax.random.split(key)
                order = jax.random.permutation(own, len(x))[: steps * options.batch_size]
                batches, rate = order.reshape(steps, -1), peak * options.rate(i)
                bound, state = learn(path, params, bound, state, batches, rate, decay)
                tried = with_bound(params, path, bound)
                now = float(accuracy(model, tried, *validation, forward=forward))
                if abs(now - wanted) > options.tolerance:
                    break
                kept = bound
        say(f"{path}: mean {float(start.mean()):.3f} to {float(kept.mean()):.3f}")
        params = with_bound(params, path, kept)
    return params


@partial(jax.jit, static_argnames=("model", "path", "forward"))
def _epoch(
    model: Layer,
    path: str,
    params: Tree,
    bound: Array,
    state: Any,
    batches: Array,
    rate: Array,
    decay: Array,
    *,
    rows: tuple[Array, Array, Array],
    forward: Forward,
) -> tuple[Array, Any]:
    """One bound and Adam's state of it after a step on each batch of row numbers [steps, size]."""
    x, labels, teacher = rows

    def loss(bound: Array, chosen: Array) -> Array:
        logits = forward(model, with_bound(params, path, bound), x[chosen])
        logp = jax.nn.log_softmax(logits)
        hard = jnp.take_along_axis(logp, labels[chosen, None], -1)[:, 0]
        return -(hard + (teacher[chosen] * logp).sum(-1)).mean()

    def step(carry: tuple[Array, Any], chosen: Array) -> tuple[tuple[Array, Any], None]:
        bound, state = carry
        gradient: Any = jax.grad(loss)(bound, chosen) + decay * bound
        direction: Any
        direction, state = optax.scale_by_adam().update(gradient, state)
        return (bound - rate * direction, state), None

    return jax.lax.scan(step, (bound, state), batches)[0]
