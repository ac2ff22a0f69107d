"""AF-KAN (Ta & Tran 2025, arXiv 2503.06112, and the released layer): ReLU-KAN's pairs of shifted
activations for any activation, reduced to one number per input."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from bestiary.layers.activations import Silu
from bestiary.layers.base import (
    Array,
    Aux,
    Context,
    Initializer,
    Layer,
    Param,
    Tree,
    constant,
    layer,
    positive,
    uniform,
    update,
)
from bestiary.layers.batch_norm import run
from bestiary.layers.feedforward import check_back
from bestiary.layers.sharding import dot

Function = Literal["quad1", "quad2", "sum", "prod", "sum_prod", "cubic1", "cubic2"]
Method = Literal["global_attn", "spatial_attn", "multistep"]
Combination = Literal["sum", "product", "sum_product", "quadratic"]
Scope = Literal["none", "sample", "batch"]

FUNCTIONS: dict[Function, Callable[[Array, Array], Array]] = {
    "quad1": lambda a, b: (a * b) ** 2,
    "quad2": lambda a, b: a * b + a**2 + b**2,
    "sum": lambda a, b: a + b,
    "prod": lambda a, b: a * b,
    "sum_prod": lambda a, b: a + b + a * b,
    "cubic1": lambda a, b: (a + b) * (a**2 + b**2),
    "cubic2": lambda a, b: (a * b) ** 3,
}


@layer
class AFKAN(Layer):
    """y = act(norm(h)) W, h_i a reduction of z_is = f(act(x_i - low_s), act(high_s - x_i)):
    [..., inputs] -> [..., outputs].

    Phases low and high, s = 1..grid + order, are trained and the same for all inputs. The reduction
    over s is one of
      global_attn: h_i = softmax_i((z_i . w + b) / t) sum_s z_is,
      spatial_attn: h_i = sum_s z_is softmax_s(conv_s(z)_i / t), of 3 inputs by a filter for each s,
      multistep: h_i = z_i . w + b,
    with a temperature t of at least 1. Several methods share all parameters, and their outputs y_m
    are combined. (The released network runs global_attn whatever it is told; its layer does not.)
    Of a norm with moving statistics `apply` takes those, `train` the batch's.

    Raises ValueError for a width below 1 and for an unknown name.
    """

    inputs: int
    outputs: int
    norm: Layer | None
    """Of h; published: LayerNorm(dim=inputs)."""
    activation: Layer = Silu()
    function: Function = "quad1"
    methods: tuple[Method, ...] = ("global_attn",)
    combination: Combination = "sum"
    """sum, product, sum + product, or sum + product + sum of squares, over the methods."""
    scope: Scope = "none"
    """What z is scaled to [0, 1] by: nothing, its extremes in the sample, or in the whole batch, as
    released: an output then depends on the other samples."""
    grid: int = 3
    order: int = 3
    axes: tuple[str | None, str | None] = ("embed", "mlp")

    def __post_init__(self) -> None:
        positive(
            inputs=self.inputs, outputs=self.outputs, grid=self.grid, methods=len(self.methods)
        )
        if self.order < 0:
            raise ValueError(f"order: {self.order}; need 0 or more")
        names = {"function": Function, "combination": Combination, "scope": Scope}
        chosen = [(name, getattr(self, name), kind) for name, kind in names.items()]
        for name, value, kind in [*chosen, *(("methods", m, Method) for m in self.methods)]:
            if value not in get_args(kind):
                raise ValueError(f"{name}: {value!r}; need one of {', '.join(get_args(kind))}")

    @property
    def size(self) -> int:
        """How many functions an input has."""
        return self.grid + self.order

    def spec(self) -> Tree:
        phases, spread = (self.size,), (self.order + 1) / self.grid
        edges, bound = (self.inputs, self.outputs), 1 / math.sqrt(self.inputs)
        spec: Tree = {
            "low": Param(phases, (None,), _phases(self.grid, self.order, 0)),
            "high": Param(phases, (None,), _phases(self.grid, self.order, spread)),
            "activation": self.activation,
            "weight": Param(edges, self.axes, uniform(bound), inputs=1),
        }
        if self.norm is not None:
            spec["norm"] = self.norm
        if {"global_attn", "spatial_attn"} & set(self.methods):
            spec["temperature"] = Param((), (), constant(math.sqrt(self.inputs)))
        if {"global_attn", "multistep"} & set(self.methods):
            draw = uniform(1 / math.sqrt(self.size))
            spec["score"] = {"weight": Param(phases, (None,), draw), "bias": Param((), (), draw)}
        if "spatial_attn" in self.methods:
            draw = uniform(1 / math.sqrt(3))
            spec["conv"] = {
                "weight": Param((3, *phases), (None, None), draw),
                "bias": Param(phases, (None,), draw),
            }
        return spec

    def apply(self, params: Tree, x: Array) -> Array:
        return self.run(params, x, training=False)[0]

    def train(self, params: Tree, x: Array, where: Array | None = None) -> tuple[Array, Aux]:
        """`where`, bool [..., 1]: which rows the statistics of the norm count."""
        return self.run(params, x, training=True, where=where)

    def run(
        self, params: Tree, x: Array, training: bool, where: Array | None = None
    ) -> tuple[Array, Aux]:
        outputs, aux = [], Aux()
        for method in self.methods:
            y, aux = self.by_method(method, params, x, training, where)
            params = update(params, aux.state)
            outputs.append(y)
        return self.combine(outputs), aux

    def by_method(
        self, method: Method, params: Tree, x: Array, training: bool, where: Array | None = None
    ) -> tuple[Array, Aux]:
        """What one method gives: [..., inputs] -> [..., outputs]."""

        def reduced(params: Tree, x: Array) -> Array:
            z = self.features(params, x.astype(jnp.float32))
            return self.reduce(method, params, z).astype(x.dtype)

        h, aux = jax.checkpoint(reduced)(params, x), Aux()
        if self.norm is not None:
            h, own = run(self.norm, params["norm"], h, training, where)
            aux = Aux.join(norm=own)
        h = self.activation.apply(params["activation"], h)
        return dot("...i,io->...o", h, params["weight"]), aux

    def features(self, params: Tree, x: Array) -> Array:
        """z: float32 [..., inputs] -> [..., inputs, size]."""
        act = params["activation"]
        a = self.activation.apply(act, x[..., None] - params["low"])
        b = self.activation.apply(act, params["high"] - x[..., None])
        z = FUNCTIONS[self.function](a, b)
        if self.scope == "none":
            return z
        # the published division by the Euclidean norm before this cancels
        over = (-2, -1) if self.scope == "sample" else None
        low, high = (f(z, over, keepdims=True) for f in (jnp.min, jnp.max))
        return (z - low) / jnp.maximum(high - low, 1e-12)

    def reduce(self, method: Method, params: Tree, z: Array) -> Array:
        """h: [..., inputs, size] -> [..., inputs]."""
        if method == "spatial_attn":
            filters, length = params["conv"]["weight"], z.shape[-2]
            pad = jnp.pad(z, [(0, 0)] * (z.ndim - 2) + [(1, 1), (0, 0)])
            scores = sum(f * pad[..., k : k + length, :] for k, f in enumerate(filters))
            scores = (scores + params["conv"]["bias"]) / jnp.maximum(params["temperature"], 1)
            return (z * jax.nn.softmax(scores, -1)).sum(-1)
        s = (z * params["score"]["weight"]).sum(-1) + params["score"]["bias"]
        if method == "multistep":
            return s
        return jax.nn.softmax(s / jnp.maximum(params["temperature"], 1), -1) * z.sum(-1)

    def combine(self, outputs: list[Array]) -> Array:
        if len(outputs) == 1:
            return outputs[0]
        y = jnp.stack(outputs)
        if self.combination == "product":
            return y.prod(0)
        total = y.sum(0)
        if self.combination != "sum":
            total += y.prod(0)
        return total + (y**2).sum(0) if self.combination == "quadratic" else total


def _phases(grid: int, order: int, shift: float) -> Initializer:
    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        del key
        steps = (jnp.arange(-order, grid) / grid + shift).astype(dtype)
        return jnp.broadcast_to(steps, shape)

    return init


@layer
class AFKANFFN(Layer):
    """Two AF-KAN layers as a feed-forward: [batch, seq, dim] -> the same.

    Several methods go through both layers on their own and are combined behind the second, as in
    the released network.

    Raises ValueError unless the layers fit together and have the same methods.
    """

    up: AFKAN
    down: AFKAN

    def __post_init__(self) -> None:
        up, down = self.up, self.down
        check_back(up, down)
        if up.methods != down.methods:
            raise ValueError(f"down.methods: {down.methods}; need those of up, {up.methods}")

    @property
    def dim(self) -> int:
        return self.up.inputs

    def spec(self) -> Tree:
        return {"up": self.up, "down": self.down}

    def apply(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        def through(method: Method) -> Array:
            h, _ = self.up.by_method(method, params["up"], x, training=False)
            return self.down.by_method(method, params["down"], h, training=False)[0]

        return self.down.combine([through(method) for method in self.down.methods]), Aux()
