"""Dense feed-forward layers: (params, x, ctx) -> (y, Aux)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from bestiary.layers.base import Array, Aux, Context, Layer, Param, Tree, layer, positive, weight
from bestiary.layers.linear import project

HIDDEN = ("batch", "seq", "mlp")


@layer
class MLP(Layer):
    """y = act(x W_up + b_up) W_down + b_down: [batch, seq, dim] -> the same."""

    dim: int
    hidden: int
    activation: Layer
    bias: bool = False
    """Every product has a bias, which starts at 0."""
    out_gain: float = 1.0
    """Scales the initial output projection; 0 starts the layer as the identity of the residual."""

    def __post_init__(self) -> None:
        positive(dim=self.dim, hidden=self.hidden)

    def spec(self) -> Tree:
        spec = {
            "up": weight((self.dim, self.hidden), ("embed", "mlp")),
            "activation": self.activation,
            "down": weight((self.hidden, self.dim), ("mlp", "embed"), gain=self.out_gain),
        }
        if self.bias:
            spec |= {"up_bias": Param((self.hidden,), ("mlp",))}
            spec |= {"down_bias": Param((self.dim,), (None,))}
        return spec

    def apply(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        u = project("bsd,df->bsf", x, params, "up", out=HIDDEN)
        h = self.activation.apply(params["activation"], u)
        return down(h, params, "down", ctx)


@layer
class GLU(Layer):
    """y = (act(x W_gate) * x W_up) W_down (Shazeer 2020): SwiGLU, GeGLU, ReGLU."""

    dim: int
    hidden: int
    activation: Layer
    bias: bool = False
    """Every product has a bias, which starts at 0."""
    out_gain: float = 1.0
    """Scales the initial output projection; 0 starts the layer as the identity of the residual."""

    def __post_init__(self) -> None:
        positive(dim=self.dim, hidden=self.hidden)

    def spec(self) -> Tree:
        spec = {
            "gate": weight((self.dim, self.hidden), ("embed", "mlp")),
            "up": weight((self.dim, self.hidden), ("embed", "mlp")),
            "activation": self.activation,
            "down": weight((self.hidden, self.dim), ("mlp", "embed"), gain=self.out_gain),
        }
        if self.bias:
            spec |= {f"{name}_bias": Param((self.hidden,), ("mlp",)) for name in ("gate", "up")}
            spec |= {"down_bias": Param((self.dim,), (None,))}
        return spec

    def apply(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        gate = project("bsd,df->bsf", x, params, "gate", out=HIDDEN)
        gate = self.activation.apply(params["activation"], gate)
        up = project("bsd,df->bsf", x, params, "up", out=HIDDEN)
        return down(gate * up, params, "down", ctx, lambda: gate)


def down(
    h: Array, params: Tree, name: str, ctx: Context, gate: Callable[[], Array] | None = None
) -> tuple[Array, Aux]:
    """The last product of a feed-forward, by params[name]: hidden activations [batch, seq, hidden]
    -> ([batch, seq, dim], what it reports of them).

    A probe that somebody has put beside the parameters comes first and may measure or thin out the
    activations: params["probe"](h, gate, params[name], ctx) -> (h, metrics). `gate` gives the
    activated gate, shaped as h (None: the layer has none, h stands for it).
    """
    metrics = {}
    if "probe" in params:
        h, metrics = params["probe"](h, h if gate is None else gate(), params[name], ctx)
    y = project("bsf,fd->bsd", h, params, name)
    return y, Aux(metrics=metrics | {"nonzero": nonzero(h, ctx)})


def nonzero(h: Array, ctx: Context) -> Array:
    """Share of the hidden activations [batch, seq, hidden] that are not exactly zero: float32."""
    return ctx.mean(h != 0).mean()


def check_back(up: Any, down: Any) -> None:
    """Raises ValueError unless the second of two layers with `inputs` and `outputs` leads back from
    where the first one does."""
    if (up.inputs, up.outputs) != (down.outputs, down.inputs):
        raise ValueError(
            f"down: {down.inputs} to {down.outputs}; need {up.outputs} to {up.inputs}, back from "
            "where up leads"
        )


@layer
class Parallel(Layer):
    """The sum of feed-forwards that read the same input: [batch, seq, dim] -> the same."""

    layers: tuple[Layer, ...]

    def spec(self) -> Tree:
        return {str(i): layer for i, layer in enumerate(self.layers)}

    def apply(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        parts, aux = [], {}
        for i, member in enumerate(self.layers):
            here = ctx if ctx.key is None else replace(ctx, key=jax.random.fold_in(ctx.key, i))
            part, aux[str(i)] = member.apply(params[str(i)], x, here)
            parts.append(part)
        return sum(parts[1:], parts[0]), Aux.join(**aux)
