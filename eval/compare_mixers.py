"""Token mixers by name, at the width of a model, for comparisons and measurements."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from bestiary.kernels.attention.masks import (
    CAUSAL,
    alternating,
    causal_big_bird,
    longformer,
    streaming,
)
from bestiary.layers.attention import Attention
from bestiary.layers.base import Layer
from bestiary.layers.delta_rule import GatedDeltaNet
from bestiary.layers.dsa import DSA
from bestiary.layers.linear_attention import GatedLinearAttention
from bestiary.layers.mamba import Mamba
from bestiary.layers.mamba2 import Mamba2
from bestiary.layers.mla import MLA
from bestiary.layers.moba import MoBA
from bestiary.layers.nsa import NSA
from bestiary.layers.performer import Performer
from bestiary.layers.repeat import Chain, Repeat
from bestiary.layers.spark import SparkAttention
from bestiary.zoo.decoder import Block, Decoder
from bestiary.zoo.llama import byte_llama, multi_head


@dataclass(frozen=True, kw_only=True)
class Size:
    """What the mixers of a comparison have in common."""

    dim: int
    span: int
    """Keys near a query that are seen where only near ones are, an even number; blocks are half as
    long, and where keys are chosen it is 2 `span`."""
    head: int = 32
    """Width of a head, which divides `dim`."""

    def __post_init__(self) -> None:
        if self.span < 2 or self.span % 2:
            raise ValueError(f"span: {self.span}; need an even number, at least 2")
        if self.head < 1 or self.dim % self.head:
            raise ValueError(f"head: {self.head} does not divide dim {self.dim}")

    @property
    def heads(self) -> int:
        return self.dim // self.head

    @property
    def block(self) -> int:
        return self.span // 2


Mixer = Callable[[Size, int], Layer]
"""Of a size, and the number of the layer from 0."""


def _attention(size: Size, **fields: Any) -> Attention:
    return replace(multi_head(size.dim, size.heads), **fields)


def _choosing(kind: Callable[..., Layer], size: Size, **fields: Any) -> Layer:
    """A kind of attention that has fields of its own."""
    heads = {"num_heads": size.heads, "num_kv_heads": size.heads, "head_dim": size.head}
    return kind(dim=size.dim, **heads, **fields)


def _latent(kind: Callable[..., Layer], size: Size, **fields: Any) -> Layer:
    half, rank = size.head // 2, size.dim // 2
    head = {"nope_dim": half, "rope_dim": half, "value_dim": size.head}
    return kind(dim=size.dim, num_heads=size.heads, kv_rank=rank, q_rank=rank, **head, **fields)


def _nsa(size: Size) -> Layer:
    return _choosing(NSA, size, block_size=size.block, num_selected=4, local_window=size.span)


def _spark(size: Size) -> Layer:
    return _choosing(SparkAttention, size, predictor_dim=size.head // 2, top_k=2 * size.span)


def _dsa(size: Size) -> Layer:
    return _latent(DSA, size, top_k=2 * size.span, index_heads=2, index_dim=size.head // 2)


def _performer(size: Size) -> Layer:
    return Performer(
        dim=size.dim, num_heads=size.heads, head_dim=size.head, num_features=4 * size.head
    )


def _gla(size: Size) -> Layer:
    return GatedLinearAttention(
        dim=size.dim, num_heads=size.heads, key_dim=size.head // 2, value_dim=size.head
    )


def _gated_delta(size: Size) -> Layer:
    return GatedDeltaNet(
        dim=size.dim,
        num_heads=size.heads,
        num_key_heads=size.heads,
        key_dim=size.head,
        value_dim=size.head,
    )


def _mamba2(size: Size) -> Layer:
    return Mamba2(dim=size.dim, num_heads=2 * size.heads, head_dim=size.head, state=2 * size.head)


MIXERS: dict[str, Mixer] = {
    "full": lambda z, i: _attention(z),
    "window": lambda z, i: _attention(z, window=z.span),
    "alternating": lambda z, i: _attention(z, mask=alternating(i, z.span)),
    "streaming": lambda z, i: _attention(z, mask=streaming(z.span)),
    "longformer": lambda z, i: _attention(z, mask=CAUSAL & longformer(2 * z.span)),
    "bigbird": lambda z, i: _attention(z, mask=causal_big_bird(z.block)),
    "nsa": lambda z, i: _nsa(z),
    "moba": lambda z, i: _choosing(MoBA, z, block_size=z.block, top_k=4),
    "spark_attention": lambda z, i: _spark(z),
    "mla": lambda z, i: _latent(MLA, z),
    "dsa": lambda z, i: _dsa(z),
    "performer": lambda z, i: _performer(z),
    "gla": lambda z, i: _gla(z),
    "gated_delta": lambda z, i: _gated_delta(z),
    "mamba": lambda z, i: Mamba(dim=z.dim, inner=2 * z.dim, dt_rank=-(-z.dim // 16)),
    "mamba2": lambda z, i: _mamba2(z),
    "hybrid": lambda z, i: _attention(z) if i % 4 == 1 else _mamba2(z),
}
"""Full attention is that of the dense member. Of the hybrid every fourth layer is attention, the
second first; the others are Mamba-2."""


def mixing(name: str, dim: int, num_layers: int, ffn: Layer, span: int) -> Decoder:
    """`byte_llama` with another mixer in its layers. Raises ValueError as `Size` does."""
    size = Size(dim=dim, span=span)
    model = byte_llama(1, dim, ffn)
    (block,) = (stack.block for stack in model.stacks)
    assert isinstance(block, Block)
    mixers = groupby(MIXERS[name](size, i) for i in range(num_layers))
    stacks = [
        Repeat(block=replace(block, mixer=mixer), n=len(list(like))) for mixer, like in mixers
    ]
    return replace(model, blocks=stacks[0] if len(stacks) == 1 else Chain(layers=tuple(stacks)))
