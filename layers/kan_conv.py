"""Convolutions whose taps are functions: convolutional KAN (Yang et al. 2024, arXiv 2408.08338)."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from bestiary.layers.activations import Silu
from bestiary.layers.base import Array, Cost, Layer, Param, Tree, layer, positive, uniform
from bestiary.layers.kan import KAN, Scale
from bestiary.layers.kan_basis import Basis

AXES = (None, None, "embed", "mlp")
LAYOUT = ("NHWC", "HWIO", "NHWC")


@layer
class KANConv(Layer):
    """A KAN over the kernel x kernel places around each place: [..., height, width, inputs] ->
    [..., height', width', outputs].

    Functions are computed once for the image and then convolved, so that the parameters of the
    basis belong to channels. The image is padded by zeros before the functions, which count there
    with their values at 0. Raises ValueError for a size below 1 or padding below 0.
    """

    inputs: int
    outputs: int
    basis: Basis
    base: Layer | None = Silu()
    kernel: int = 3
    stride: int = 1
    padding: int = 0
    bias: bool = False

    def __post_init__(self) -> None:
        positive(inputs=self.inputs, outputs=self.outputs, kernel=self.kernel, stride=self.stride)
        if self.padding < 0:
            raise ValueError(f"padding: {self.padding}; need at least 0")

    def spec(self) -> Tree:
        window = (self.kernel, self.kernel)
        fan_in = math.prod(window) * self.inputs
        size = self.basis.size

        def start(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            drawn = self.basis.initial(fan_in, self.outputs)
            flat = drawn(key, (size, fan_in, self.outputs), dtype)
            return jnp.moveaxis(flat.reshape(size, *window, *shape[-2:]), 0, 2)

        weight = Param((*window, size, self.inputs, self.outputs), (None, *AXES), start, inputs=4)
        spec: Tree = {"basis": self.basis.spec(self.inputs, self.outputs), "weight": weight}
        if self.base is not None:
            shape = (*window, self.inputs, self.outputs)
            base = Param(shape, AXES, uniform(1 / math.sqrt(fan_in)), inputs=3)
            spec |= {"activation": self.base, "base": base}
        if self.bias:
            spec["bias"] = Param((self.outputs,), ("mlp",))
        return spec

    def apply(self, params: Tree, x: Array) -> Array:
        leading, x = x.shape[:-3], pad(x, self.padding)

        def convolve(x: Array, w: Array) -> Array:
            """Over the axes behind height and width, w [kernel, kernel, ..., outputs]."""
            x = x.reshape(*x.shape[:3], -1)
            w = w.reshape(*w.shape[:2], -1, w.shape[-1]).astype(x.dtype)
            strides = (self.stride, self.stride)
            return jax.lax.conv_general_dilated(x, w, strides, "VALID", dimension_numbers=LAYOUT)

        @jax.checkpoint
        def curves(params: Tree, x: Array) -> Array:
            return convolve(self.basis.expand(params["basis"], x), params["weight"])

        y = curves(params, x)
        if self.base is not None:
            y += convolve(self.base.apply(params["activation"], x), params["base"])
        y = y.reshape(*leading, *y.shape[1:])
        return y + params["bias"].astype(y.dtype) if self.bias else y


@layer
class KANPatches(Layer):
    """The same in the form of the released program: a KAN layer on every patch, unfolded to inputs
    x kernel x kernel numbers (channels first).

    All that belongs to an input of the layer, such as a layer norm, knots or phases, belongs to a
    place of the patch here. It computes every function kernel^2 times.
    """

    inputs: int
    outputs: int
    basis: Basis
    base: Layer | None = Silu()
    kernel: int = 3
    stride: int = 1
    padding: int = 0
    scale: Scale = "none"
    bias: bool = False

    @property
    def kan(self) -> KAN:
        return KAN(
            inputs=self.inputs * self.kernel**2,
            outputs=self.outputs,
            basis=self.basis,
            base=self.base,
            scale=self.scale,
            bias=self.bias,
        )

    def spec(self) -> Tree:
        return self.kan.spec()

    def cost(self, length: int) -> Cost:
        """With the unfolding, which is a product by ones and zeros."""
        places = self.kernel**2
        return self.kan.cost(length) + Cost(flops=2 * places**2 * self.inputs)

    def apply(self, params: Tree, x: Array) -> Array:
        window, strides = (self.kernel, self.kernel), (self.stride, self.stride)
        patches = jax.lax.conv_general_dilated_patches(
            pad(x, self.padding), window, strides, "VALID", dimension_numbers=LAYOUT
        )
        return self.kan.apply(params, patches.reshape(*x.shape[:-3], *patches.shape[1:]))


def pad(x: Array, by: int) -> Array:
    """Zeros around images [..., height, width, channels]: [batch, height', width', channels]."""
    return jnp.pad(x.reshape(-1, *x.shape[-3:]), ((0, 0), (by, by), (by, by), (0, 0)))
