"""Dense feed-forward layers: (params, x, ctx) -> (y, Aux)."""

import jax.numpy as jnp

from bestiary.layers.base import Array, Aux, Context, Layer, Tree, layer, positive, weight
from bestiary.layers.sharding import dot

HIDDEN = ("batch", "seq", "mlp")


@layer
class MLP(Layer):
    """y = act(x W_up) W_down, without biases: [batch, seq, dim] -> the same."""

    dim: int
    hidden: int
    activation: Layer
    out_gain: float = 1.0
    """Scales the initial output projection; 0 starts the layer as the identity of the residual."""

    def __post_init__(self) -> None:
        positive(dim=self.dim, hidden=self.hidden)

    def spec(self) -> Tree:
        return {
            "up": weight((self.dim, self.hidden), ("embed", "mlp")),
            "activation": self.activation,
            "down": weight((self.hidden, self.dim), ("mlp", "embed"), gain=self.out_gain),
        }

    def apply(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        u = dot("bsd,df->bsf", x, params["up"], out=HIDDEN)
        h = self.activation.apply(params["activation"], u)
        return dot("bsf,fd->bsd", h, params["down"]), Aux(metrics={"nonzero": nonzero(h, ctx)})


@layer
class GLU(Layer):
    """y = (act(x W_gate) * x W_up) W_down (Shazeer 2020), without biases: SwiGLU, GeGLU, ReGLU."""

    dim: int
    hidden: int
    activation: Layer
    out_gain: float = 1.0
    """Scales the initial output projection; 0 starts the layer as the identity of the residual."""

    def __post_init__(self) -> None:
        positive(dim=self.dim, hidden=self.hidden)

    def spec(self) -> Tree:
        return {
            "gate": weight((self.dim, self.hidden), ("embed", "mlp")),
            "up": weight((self.dim, self.hidden), ("embed", "mlp")),
            "activation": self.activation,
            "down": weight((self.hidden, self.dim), ("mlp", "embed"), gain=self.out_gain),
        }

    def apply(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        gate = dot("bsd,df->bsf", x, params["gate"], out=HIDDEN)
        up = dot("bsd,df->bsf", x, params["up"], out=HIDDEN)
        h = self.activation.apply(params["activation"], gate) * up
        return dot("bsf,fd->bsd", h, params["down"]), Aux(metrics={"nonzero": nonzero(h, ctx)})


def nonzero(h: Array, ctx: Context) -> Array:
    """Share of the hidden activations [batch, seq, hidden] that are not exactly zero: float32."""
    count = jnp.sum(h != 0, -1, dtype=jnp.int32)  # integers: CPUs add them in any order, faster
    return ctx.mean(count) / h.shape[-1]
