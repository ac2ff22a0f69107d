"""The dense layer of a Kolmogorov-Arnold network (Liu et al. 2024, arXiv 2404.19756)."""

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from bestiary.layers.activations import Silu
from bestiary.layers.base import Array, Layer, Param, Tree, constant, layer, ones, positive, uniform
from bestiary.layers.kan_basis import Basis, EdgeAxes
from bestiary.layers.sharding import dot

Scale = Literal["none", "constant", "uniform"]


@layer
class KAN(Layer):
    """y_o = sum_i m_io (b_io act(x_i) + s_io sum_s w_sio f_s(x_i)) + c_o:
    [..., inputs] -> [..., outputs] in the type of x.

    Every edge has a function of its own, in the `basis` f and with the activation of the `base`;
    nodes only add. All edges together are one product of the basis with the weight [size, inputs,
    outputs]; backward computes the basis again instead of keeping it.

    Raises ValueError for a width below 1 or an unknown scale.
    """

    inputs: int
    outputs: int
    basis: Basis
    base: Layer | None = Silu()
    """The activation of a branch with weights b, which sees x as it is; None: no such branch."""
    base_gain: float = 1.0
    """b starts uniform in +- base_gain / sqrt(inputs)."""
    scale: Scale = "none"
    """Trained factors s of the curves, at first all 1 / sqrt(inputs) (pykan) or uniform in +- 1 /
    sqrt(inputs) (efficient-kan)."""
    mask: bool = False
    """A mask m that no optimiser touches: 1, or 0 for an edge that is pruned."""
    bias: bool = False
    axes: EdgeAxes = ("embed", "mlp")
    """Logical names of the inputs and of the outputs."""

    def __post_init__(self) -> None:
        positive(inputs=self.inputs, outputs=self.outputs)
        if self.scale not in get_args(Scale):
            raise ValueError(f"scale: {self.scale!r}; need one of {', '.join(get_args(Scale))}")

    def spec(self) -> Tree:
        edges, bound = (self.inputs, self.outputs), 1 / math.sqrt(self.inputs)
        spec: Tree = {
            "basis": self.basis.spec(*edges, self.axes),
            "weight": Param(
                (self.basis.size, *edges), (None, *self.axes), self.basis.initial(*edges), inputs=2
            ),
        }
        if self.base is not None:
            base = Param(edges, self.axes, uniform(self.base_gain * bound), inputs=1)
            spec |= {"activation": self.base, "base": base}
        if self.scale != "none":
            start = constant(bound) if self.scale == "constant" else uniform(bound)
            spec["scale"] = Param(edges, self.axes, start)
        if self.mask:
            spec["mask"] = Param(edges, self.axes, ones, trainable=False)
        if self.bias:
            spec["bias"] = Param((self.outputs,), self.axes[1:])
        return spec

    def weights(self, params: Tree) -> tuple[Any, Any]:
        """Of curves [size, inputs, outputs] and base [inputs, outputs], with scale and mask."""
        weight, base = params["weight"], params.get("base")
        if self.scale != "none":
            weight = weight * params["scale"]
        if self.mask:
            weight = weight * params["mask"]
            base = None if base is None else base * params["mask"]
        return weight, base

    def outside_grid(self, params: Tree, x: Array) -> Array:
        """Which inputs the curves were not made for, whatever becomes of them: bool [..., inputs];
        its mean is the share to watch."""
        return self.basis.outside_grid(params["basis"], x)

    def apply(self, params: Tree, x: Array) -> Array:
        def curves(params: Tree, x: Array) -> Array:
            return self.basis.contract(params["basis"], x, self.weights(params)[0])

        y = jax.checkpoint(curves)(params, x)
        if self.base is not None:
            act = self.base.apply(params["activation"], x)
            y += dot("...i,io->...o", act, self.weights(params)[1])
        return y + params["bias"].astype(y.dtype) if self.bias else y


def edges(kan: KAN, params: Tree, x: Array) -> Array:
    """The function of every edge: [..., inputs] -> [..., outputs, inputs], summed over the inputs
    (and with the bias) the layer's output."""
    weight, base = kan.weights(params)
    y = kan.basis.edges(params["basis"], x, weight)
    if kan.base is None:
        return y
    act = kan.base.apply(params["activation"], x)
    return y + act[..., None, :] * jnp.asarray(base, x.dtype).T
