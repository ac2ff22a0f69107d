"""Deep Interest Network: a user's behaviours pooled by how they bear on a candidate.

Zhou et al. 2018, arXiv 1706.06978. The role of a pooling: (params, query [batch, dim], keys
[batch, seq, dim], mask bool [batch, seq], training) -> ([batch, dim], Aux).
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array, Aux, Cost, Layer, Param, Tree, layer, positive, weight
from bestiary.layers.batch_norm import run
from bestiary.layers.perceptron import Perceptron
from bestiary.layers.sharding import dot

Normalize = Literal["none", "softmax", "scaled_softmax"]


@layer
class SumPooling(Layer):
    """The sum of the real keys, whatever the candidate: what DIN is compared with."""

    def apply(
        self, params: Tree, query: Array, keys: Array, mask: Array, training: bool = False
    ) -> tuple[Array, Aux]:
        del params, query, training
        return jnp.where(mask[..., None], keys, 0).sum(1), Aux()


@layer
class LocalActivationUnit(Layer):
    """sum_t w_t k_t, w_t made of the score s_t = perceptron([q, k_t, q - k_t, q * k_t]).

    normalize "none" (the paper): w = s, which keeps the intensity of interest. "softmax": over the
    real positions; "scaled_softmax" (the released demo): of s / sqrt(dim). Without any real
    position the result is 0.

    The first product, [4 dim, widths[0]], is computed by its four blocks of rows as
    (W1 + W3) q + (W2 - W3) k + W4 (q * k): half the products, and no [batch, seq, 4 dim].
    """

    dim: int
    widths: tuple[int, ...] = (80, 40)
    """Of the hidden layers."""
    activations: tuple[Layer, ...]
    """One for each width: sigmoids, or `Dice`."""
    normalize: Normalize = "none"

    def __post_init__(self) -> None:
        positive(dim=self.dim)
        if not self.widths or len(self.activations) != len(self.widths):
            raise ValueError(
                f"activations: {len(self.activations)} for widths {self.widths}; need at least one "
                "width, and one activation for each"
            )
        if self.normalize not in get_args(Normalize):
            known = ", ".join(get_args(Normalize))
            raise ValueError(f"normalize: {self.normalize!r}; need one of {known}")
        self.rest  # noqa: B018  refuses what it cannot be

    @property
    def rest(self) -> Perceptron:
        """What follows the first activation."""
        return Perceptron(widths=(*self.widths, 1), activations=self.activations[1:], gain=1.0)

    def spec(self) -> Tree:
        first = self.widths[0]
        return {
            "first": weight((4 * self.dim, first), ("embed", "mlp")),
            "first_bias": Param((first,), ("mlp",)),
            "activation": self.activations[0],
            "rest": self.rest,
        }

    def cost(self, length: int) -> Cost:
        """Of a behaviour: the products with k and q * k; that with q is made once a row."""
        whole = super().cost(length)
        saved = 2 * 2 * self.dim * self.widths[0]
        pooled = 2 * self.dim
        return Cost(
            whole.flops - saved + pooled,
            whole.active_flops - saved + pooled,
            whole.bytes,
            whole.active_bytes,
        )

    def apply(
        self, params: Tree, query: Array, keys: Array, mask: Array, training: bool = False
    ) -> tuple[Array, Aux]:
        scores, aux = self.scores(params, query, keys, mask, training)
        scale = self.dim**-0.5 if self.normalize == "scaled_softmax" else 1.0
        if self.normalize != "none":
            seen = jnp.where(mask, scale * scores.astype(jnp.float32), -jnp.inf)
            most = jnp.max(seen, -1, keepdims=True, initial=jnp.finfo(jnp.float32).min)
            e = jnp.exp(seen - jax.lax.stop_gradient(most))
            total = e.sum(-1, keepdims=True)
            scores = (e / jnp.where(total > 0, total, 1)).astype(keys.dtype)
        weights = jnp.where(mask, scores, 0)
        return jnp.einsum("bt,btd->bd", weights, keys), aux

    def scores(
        self, params: Tree, query: Array, keys: Array, mask: Array, training: bool = False
    ) -> tuple[Array, Aux]:
        """[batch, seq], of padding as well; statistics of a batch count its real positions."""
        w1, w2, w3, w4 = jnp.split(params["first"], 4)
        x = dot("btd,df->btf", keys, w2 - w3) + dot("btd,df->btf", query[:, None] * keys, w4)
        by_query = dot("bd,df->bf", query, w1 + w3) + params["first_bias"].astype(x.dtype)
        where = mask[..., None]
        x, first = run(
            self.activations[0], params["activation"], x + by_query[:, None], training, where
        )
        x, rest = self.rest.run(params["rest"], x, training, where)
        return x[..., 0], Aux.join(activation=first, rest=rest)
