"""Convolutional networks of residual blocks on images, before whose products norm and activation
stand (He et al. 2016, arXiv 1603.05027); norms see one place at a time, so that no statistics of a
batch are kept."""

from typing import Any

import jax.numpy as jnp

from bestiary.layers.activations import Relu
from bestiary.layers.base import (
    Array,
    Aux,
    Context,
    Cost,
    Layer,
    Precision,
    Tree,
    layer,
    positive,
    weight,
)
from bestiary.layers.norms import LayerNorm
from bestiary.layers.repeat import Chain, Repeat
from bestiary.layers.sharding import dot
from bestiary.zoo.model import ImageModel, per_image

PLACES = ("batch", None, None, "embed")


@layer
class Conv(Layer):
    """Convolution with zeros around: [batch, height, width, inputs] -> [batch, height / stride,
    width / stride, outputs], rounded up."""

    inputs: int
    outputs: int
    kernel: int = 3
    stride: int = 1
    gain: float = 1.0
    """The weight starts with std gain / sqrt(kernel^2 inputs)."""

    def __post_init__(self) -> None:
        positive(inputs=self.inputs, outputs=self.outputs, kernel=self.kernel, stride=self.stride)

    def spec(self) -> Tree:
        shape = (self.kernel, self.kernel, self.inputs, self.outputs)
        return {"weight": weight(shape, (None, None, "embed", "mlp"), inputs=3, gain=self.gain)}

    def apply(self, params: Tree, x: Array) -> Array:
        """One product of what every place sees, which CPUs compute faster than a convolution."""
        places = [-(-size // self.stride) for size in x.shape[1:3]]
        around = []
        for size, out in zip(x.shape[1:3], places, strict=True):
            zeros = max((out - 1) * self.stride + self.kernel - size, 0)
            around.append((zeros // 2, zeros - zeros // 2))
        x = jnp.pad(x, ((0, 0), *around, (0, 0)))

        def seen(i: int, j: int) -> Array:
            """What stands at (i, j) of every place's window."""
            ends = [at + (n - 1) * self.stride + 1 for at, n in zip((i, j), places, strict=True)]
            return x[:, i : ends[0] : self.stride, j : ends[1] : self.stride]

        side = range(self.kernel)
        windows = jnp.stack([jnp.stack([seen(i, j) for j in side], 3) for i in side], 3)
        return dot("bhwijc,ijco->bhwo", windows, params["weight"], out=PLACES)


@layer
class Residual(Layer):
    """x + conv(act(norm(conv(act(norm(x)))))): [batch, height, width, dim] -> the same.

    Has the token-mixer role, so that it repeats. Reports the share of activations that are not 0.
    """

    dim: int
    activation: Layer
    norm: Layer

    def spec(self) -> Tree:
        conv = Conv(inputs=self.dim, outputs=self.dim, gain=2**0.5)
        parts = {"norm": self.norm, "activation": self.activation, "conv": conv}
        return {"first": parts, "second": parts}

    def apply(
        self, params: Tree, x: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        del ctx
        y, aux = x, {}
        for name, parts in self.spec().items():
            y = parts["norm"].apply(params[name]["norm"], y)
            y = parts["activation"].apply(params[name]["activation"], y)
            aux[name] = Aux(metrics={"nonzero": (y != 0).mean(dtype=jnp.float32)})
            y = parts["conv"].apply(params[name]["conv"], y)
        return x + y, cache, Aux.join(**aux)


@layer
class Down(Layer):
    """A convolution with a norm and stride 2, in the role of a block: half the places a side."""

    norm: LayerNorm
    outputs: int

    def spec(self) -> Tree:
        conv = Conv(inputs=self.norm.dim, outputs=self.outputs, stride=2)
        return {"norm": self.norm, "conv": conv}

    def apply(
        self, params: Tree, x: Array, ctx: Context = Context(), cache: Tree = None
    ) -> tuple[Array, Tree, Aux]:
        del ctx
        x = self.norm.apply(params["norm"], x)
        return self.spec()["conv"].apply(params["conv"], x), cache, Aux()


@layer
class ConvNet(ImageModel):
    """Images [batch, height, width, channels] -> (logits float32 [batch, classes], Aux): a
    convolution, stages of blocks, each of half the places a side, a norm, the mean over all places,
    and the head."""

    height: int
    width: int
    channels: int
    classes: int
    blocks: Layer
    """A chain of stages, a `Repeat` of `Residual` each, with a `Down` between two."""
    norm: LayerNorm
    """Of the last stage."""
    std: float | None = None
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        positive(height=self.height, width=self.width)
        positive(channels=self.channels, classes=self.classes)

    @property
    def stem(self) -> Conv:
        first: Any = self.stacks[0].block
        return Conv(inputs=self.channels, outputs=first.dim)

    def spec(self) -> Tree:
        parts = {"stem": self.stem, "blocks": self.blocks, "norm": self.norm}
        return parts | {"head": self.head}

    def cost(self, length: int = 1) -> Cost:
        """Of an image, whatever the length."""
        del length
        height, width = self.height, self.width
        total = per_image(self.stem.cost(1), height * width) + self.head.cost(1)
        for part in self.parts:
            if isinstance(part, Down):
                height, width = -(-height // 2), -(-width // 2)
            total += per_image(part.cost(1), height * width)
        return self.stored(total)

    def apply(self, params: Tree, images: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        x = self.stem.apply(params["stem"], self.checked(images))
        x, _, aux = self.blocks.apply(params["blocks"], x, ctx)
        x = self.norm.apply(params["norm"], x).mean((1, 2))
        return self.head.apply(params["head"], x, jnp.float32), Aux.join(blocks=aux)


def convnet(
    size: int, channels: int, widths: tuple[int, ...], blocks: int, activation: Layer
) -> ConvNet:
    """Stages of these `widths` with so many `blocks` each, for 10 classes of square images."""
    norms = [LayerNorm(dim=width) for width in widths]
    parts: list[Layer] = []
    for i, (norm, width) in enumerate(zip(norms, widths, strict=True)):
        if i:
            parts.append(Down(norm=norms[i - 1], outputs=width))
        parts.append(Repeat(block=Residual(dim=width, activation=activation, norm=norm), n=blocks))
    return ConvNet(
        height=size,
        width=size,
        channels=channels,
        classes=10,
        blocks=Chain(layers=tuple(parts)),
        norm=norms[-1],
    )


def convnet_digits() -> ConvNet:
    """Two stages of one block, 16 and 32 wide, for 8 x 8 digits."""
    return convnet(8, 1, (16, 32), 1, Relu())


def convnet_mnist() -> ConvNet:
    """Three stages of one block, 8, 16 and 32 wide, for 28 x 28 digits."""
    return convnet(28, 1, (8, 16, 32), 1, Relu())


def resnet20() -> ConvNet:
    """The shape of ResNet-20 (He et al. 2015) for 32 x 32 in colours, with layer norms."""
    return convnet(32, 3, (16, 32, 64), 3, Relu())
