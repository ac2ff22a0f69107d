"""Vision transformers (Dosovitskiy et al. 2021, arXiv 2010.11929): pre-norm blocks over patches.

DeiT (Touvron et al. 2021, arXiv 2012.12877) and, with rational feed-forwards, KAT (Yang & Wang
2024, arXiv 2409.10594) by their published shapes; registers are those of Darcet et al. 2023
(arXiv 2309.16588).
"""

from dataclasses import replace
from itertools import islice
from typing import Literal, get_args

import jax.numpy as jnp

from bestiary.kernels.attention.masks import Full
from bestiary.layers.activations import Gelu
from bestiary.layers.attention import Attention
from bestiary.layers.base import (
    Array,
    Aux,
    Context,
    Cost,
    Layer,
    Param,
    Precision,
    Tree,
    layer,
    normal,
    positive,
)
from bestiary.layers.feedforward import MLP
from bestiary.layers.grkan import GRKAN
from bestiary.layers.linear import Linear
from bestiary.layers.norms import LayerNorm
from bestiary.layers.repeat import Repeat
from bestiary.layers.sharding import shard
from bestiary.zoo.decoder import STREAM, Block
from bestiary.zoo.model import ImageModel, per_image

Pool = Literal["class", "mean"]
Positions = Literal["learned", "sincos"]


@layer
class ViT(ImageModel):
    """Images [batch, height, width, channels] -> (logits float32 [batch, classes], Aux).

    Tokens are the class token, the patches row by row, and the registers, which learn to hold what
    is global. Raises ValueError for sizes that patches do not fill, and for sin-cos positions of a
    width that is no multiple of 4.
    """

    height: int
    width: int
    channels: int
    patch: int
    """Side of the square that is one token."""
    classes: int
    blocks: Layer
    """A stack of blocks whose attention sees everything."""
    norm: LayerNorm
    """Before the head; its width is that of the tokens."""
    pool: Pool = "class"
    """What the head reads: a class token, or the mean of the patches."""
    registers: int = 0
    positions: Positions = "learned"
    """Added to patches and class token: learned, or fixed sines and cosines of row and column (Chen
    et al. 2021, MoCo v3), of which the class token has none."""
    drop_path: float = 0.0
    """Share of the rows that, in training, pass by a branch of the last block; from 0 at the first
    it grows in a straight line (stochastic depth)."""
    std: float | None = None
    """Of every matrix at the start; None: as the layers say, mostly 1 / sqrt(inputs)."""
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        positive(patch=self.patch, channels=self.channels, classes=self.classes)
        for name in ("height", "width"):
            size = getattr(self, name)
            if size < 1 or size % self.patch:
                raise ValueError(f"{name}: {size}; need a multiple of patch {self.patch}")
        for name, kinds in {"pool": Pool, "positions": Positions}.items():
            if getattr(self, name) not in get_args(kinds):
                known = get_args(kinds)
                raise ValueError(f"{name}: {getattr(self, name)!r}; need one of {known}")
        if self.registers < 0:
            raise ValueError(f"registers: {self.registers}; need 0 or more")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path: {self.drop_path}; need 0 or more, below 1")
        if self.positions == "sincos" and self.norm.dim % 4:
            raise ValueError(f"norm.dim: {self.norm.dim}; sincos positions need a multiple of 4")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches from top to bottom and from left to right."""
        return self.height // self.patch, self.width // self.patch

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] + (self.pool == "class") + self.registers

    @property
    def embedding(self) -> Linear:
        """Of a patch, its pixels row by row."""
        pixels = self.patch * self.patch * self.channels
        return Linear(inputs=pixels, outputs=self.norm.dim, axes=(None, "embed"), bias=True)

    def spec(self) -> Tree:
        dim, axes = self.norm.dim, (None, "embed")
        spec: Tree = {"patches": self.embedding, "blocks": self.blocks}
        spec |= {"norm": self.norm, "head": self.head}
        if self.pool == "class":
            spec["class"] = Param((1, dim), axes, normal(0.02))
        if self.registers:
            spec["registers"] = Param((self.registers, dim), axes, normal(0.02))
        if self.positions == "learned":
            placed = self.tokens - self.registers
            spec["positions"] = Param((placed, dim), axes, normal(0.02))
        return spec

    def cost(self, length: int = 1) -> Cost:
        """Of an image, whatever the length."""
        del length
        patches, tokens = self.grid[0] * self.grid[1], self.tokens
        parts = per_image(self.embedding.cost(1), patches) + self.head.cost(1)
        return self.stored(parts + per_image(self.blocks.cost(tokens), tokens))

    def apply(self, params: Tree, images: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        x = self.cut(images)
        x = self.embedding.apply(params["patches"], x)
        batch, patches, dim = x.shape

        def learned(name: str) -> Array:
            value = params[name].astype(x.dtype)
            return jnp.broadcast_to(value, (batch, *value.shape))

        if self.positions == "sincos":
            x = x + sincos(*self.grid, dim).astype(x.dtype)
        if self.pool == "class":
            x = jnp.concatenate((learned("class"), x), 1)
        if self.positions == "learned":
            x = x + params["positions"].astype(x.dtype)
        if self.registers:
            x = jnp.concatenate((x, learned("registers")), 1)
        blocks = self.dropping if self.drop_path and ctx.key is not None else self.blocks
        x, _, aux = blocks.apply(params["blocks"], shard(x, *STREAM), ctx)
        x = self.norm.apply(params["norm"], x)
        pooled = x[:, 0] if self.pool == "class" else x[:, :patches].mean(1)
        return self.head.apply(params["head"], pooled, jnp.float32), Aux.join(blocks=aux)

    @property
    def dropping(self) -> Layer:
        """The blocks, each of which knows its rate of stochastic depth."""
        depth = sum(stack.n for stack in self.stacks)
        rates = iter([self.drop_path * i / max(depth - 1, 1) for i in range(depth)])

        def one(stack: Repeat) -> Repeat:
            own = ("drop_path", tuple(islice(rates, stack.n)))
            return replace(stack, constants=(*stack.constants, own))

        return self.map_stacks(one).blocks

    def cut(self, images: Array) -> Array:
        """[batch, height, width, channels] -> [batch, patches, pixels] in the compute type."""
        (rows, columns), side = self.grid, self.patch
        x = self.checked(images)
        x = x.reshape(-1, rows, side, columns, side, self.channels).swapaxes(2, 3)
        return x.reshape(-1, rows * columns, side * side * self.channels)


def sincos(rows: int, columns: int, dim: int) -> Array:
    """Fixed positions float32 [rows * columns, dim]: sines and cosines of the row, then of the
    column, at the frequencies 10000^(-4 i / dim)."""
    frequencies = 10000.0 ** (-jnp.arange(dim // 4) / (dim // 4))
    row, column = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
    angles = [at.reshape(-1, 1) * frequencies for at in (row, column)]
    return jnp.concatenate([f(a) for a in angles for f in (jnp.sin, jnp.cos)], -1)


def vit_blocks(dim: int, num_heads: int, num_layers: int, ffn: Layer) -> Repeat:
    """Pre-norm blocks with biases, whose attention sees every token."""
    attention = Attention(
        dim=dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=dim // num_heads,
        bias=True,
        out_bias=True,
        rope=None,
        mask=Full(),
    )
    norm = LayerNorm(dim=dim, eps=1e-6)
    return Repeat(block=Block(mixer=attention, ffn=ffn, norm=norm), n=num_layers)


def gelu_mlp(dim: int) -> MLP:
    return MLP(dim=dim, hidden=4 * dim, activation=Gelu(), bias=True)


def _imagenet(dim: int, ffn: Layer, drop_path: float = 0.1) -> ViT:
    """12 layers with heads of 64 channels, on 196 patches of 16 x 16."""
    return ViT(
        height=224,
        width=224,
        channels=3,
        patch=16,
        classes=1000,
        blocks=vit_blocks(dim, dim // 64, 12, ffn),
        norm=LayerNorm(dim=dim, eps=1e-6),
        drop_path=drop_path,
        std=0.02,
    )


def small_vit(size: int, patch: int, dim: int, num_layers: int, ffn: Layer | None = None) -> ViT:
    """For grey images of `size` x `size` and 10 classes; `ffn` replaces an MLP of 4 dim, GELU."""
    return ViT(
        height=size,
        width=size,
        channels=1,
        patch=patch,
        classes=10,
        blocks=vit_blocks(dim, dim // 16, num_layers, ffn or gelu_mlp(dim)),
        norm=LayerNorm(dim=dim, eps=1e-6),
        pool="mean",
        positions="sincos",
    )


def vit_digits() -> ViT:
    """4 layers of width 64 on the 16 patches of 8 x 8 digits, for experiments."""
    return small_vit(8, 2, 64, 4)


def kat_digits() -> ViT:
    """vit_digits with GR-KAN feed-forwards."""
    return small_vit(8, 2, 64, 4, GRKAN(dim=64, hidden=256))


def vit_mnist() -> ViT:
    """4 layers of width 64 on the 49 patches of 28 x 28 digits, for experiments."""
    return small_vit(28, 4, 64, 4)


def deit_tiny() -> ViT:
    """DeiT-T: 5.7M parameters."""
    return _imagenet(192, gelu_mlp(192))


def deit_small() -> ViT:
    """DeiT-S: 22.1M parameters."""
    return _imagenet(384, gelu_mlp(384))


def deit_base() -> ViT:
    """DeiT-B, which is ViT-B/16: 86.6M parameters."""
    return _imagenet(768, gelu_mlp(768))


def kat_tiny() -> ViT:
    """KAT-T: DeiT-T with GR-KAN feed-forwards."""
    return _imagenet(192, GRKAN(dim=192, hidden=768))


def kat_small() -> ViT:
    """KAT-S: DeiT-S with GR-KAN feed-forwards."""
    return _imagenet(384, GRKAN(dim=384, hidden=1536))


def kat_base() -> ViT:
    """KAT-B: DeiT-B with GR-KAN feed-forwards."""
    return _imagenet(768, GRKAN(dim=768, hidden=3072), drop_path=0.4)
