"""Routers that are pushed off balance: what does an uneven load do to a mixture of experts?"""

import dataclasses
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array, Layer, Tree, layer, map_layers
from bestiary.layers.router import Router

Routing = Literal["balanced", "zipf", "adversarial"]

T = TypeVar("T", bound=Layer)


@layer
class SkewedRouter(Router):
    """A router whose choice, and only it, is made as if a fixed bias were added to the logits.

    "zipf": -log(e) for expert e = 1, 2, ..., so that equal logits choose by Zipf's law;
    "adversarial": so much for the first `top_k` experts that every token takes them. Weights,
    losses and what follows the load (an aux-free bias) work as ever, and may fight it.
    """

    skew: Literal["zipf", "adversarial"]

    def select(self, scores: Array, params: Tree) -> Array:
        expert = jnp.arange(self.num_experts)
        bias = -jnp.log1p(expert) if self.skew == "zipf" else 1e3 * (expert < self.top_k)
        if self.score == "topk_softmax":  # these are logits already
            scores = scores + bias
        elif self.score == "sigmoid":
            scores = jax.nn.sigmoid(jax.scipy.special.logit(scores) + bias)
        else:
            scores = jax.nn.softmax(jnp.log(scores) + bias)
        return super().select(scores, params)


def skewed(model: T, routing: Routing) -> T:
    """A model, or any layer, with routers of this kind; with "balanced", or without routers, as it
    is."""
    if routing == "balanced":
        return model

    def changed(x: Layer) -> Layer:
        if not isinstance(x, Router):
            return x
        fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        return SkewedRouter(**fields, skew=routing)

    return map_layers(changed, model)
