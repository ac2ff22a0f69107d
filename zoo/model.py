"""What whole models have in common, whatever they read: stacks of blocks, and stored numbers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Self

import jax.numpy as jnp

from bestiary.layers.base import Array, Cost, Layer, Param, Precision, Tree, map_params, normal
from bestiary.layers.linear import Linear
from bestiary.layers.norms import LayerNorm
from bestiary.layers.repeat import Chain, Repeat


class Model(Layer):
    """The base of model families, whose fields include these.

    blocks: one stack of like blocks, or a chain of stacks and of what stands between them.
    std: of every matrix at the start; None: as the layers say.
    precision: how parameters are stored, and activations computed.
    """

    blocks: Layer
    std: float | None
    precision: Precision

    @property
    def parts(self) -> tuple[Layer, ...]:
        """Of the blocks, first to last: stacks, and what stands between them."""
        return self.blocks.layers if isinstance(self.blocks, Chain) else (self.blocks,)

    @property
    def stacks(self) -> tuple[Repeat, ...]:
        """The stacks of like blocks, first to last."""
        return tuple(part for part in self.parts if isinstance(part, Repeat))

    def map_stacks(self, f: Callable[[Repeat], Repeat]) -> Self:
        """The same model with `f` of every stack in its place."""

        def one(part: Layer) -> Layer:
            return f(part) if isinstance(part, Repeat) else part

        parts = tuple(map(one, self.parts))
        blocks = Chain(layers=parts) if isinstance(self.blocks, Chain) else parts[0]
        return replace(self, blocks=blocks)  # type: ignore[type-var, return-value]

    def unrolled(self) -> Self:
        """The same model without loops over its layers: faster on CPUs, longer to compile."""
        return self.map_stacks(lambda stack: replace(stack, unroll=stack.n))

    def declare(self) -> Tree:
        """As declared by the parts, stored in `precision.params`; non-trained state stays as it
        is."""

        def stored(p: Param) -> Param:
            if not p.trainable:
                return p
            if self.std is not None and p.inputs is not None:
                p = replace(p, init=normal(self.std))
            return replace(p, dtype=jnp.dtype(self.precision.params))

        return map_params(stored, super().declare())

    def stored(self, cost: Cost) -> Cost:
        """`cost` of the parts, which declare float32, with the bytes of what is stored."""
        share = jnp.dtype(self.precision.params).itemsize / 4
        return replace(cost, bytes=cost.bytes * share, active_bytes=cost.active_bytes * share)


class ImageModel(Model):
    """The base of those that classify images [batch, height, width, channels] by a head behind
    `norm`."""

    unit = "image"

    height: int
    width: int
    channels: int
    classes: int
    norm: LayerNorm

    @property
    def head(self) -> Linear:
        return Linear(
            inputs=self.norm.dim, outputs=self.classes, axes=("embed", "vocab"), bias=True
        )

    def checked(self, images: Array) -> Array:
        """The images in the compute type. Raises ValueError for another size."""
        need = (self.height, self.width, self.channels)
        if images.shape[1:] != need:
            raise ValueError(f"images: of shape {images.shape[1:]}; need {need}")
        return images.astype(self.precision.compute)


def per_image(cost: Cost, tokens: int) -> Cost:
    """`cost` of one token for the `tokens` of an image, which read the parameters once."""
    return replace(cost, flops=tokens * cost.flops, active_flops=tokens * cost.active_flops)
