"""Gemma-2 (Gemma Team 2024): sandwich norms, GeGLU, alternating windows, soft-caps, tied head."""

from dataclasses import replace

from bestiary.layers.activations import GeluTanh
from bestiary.layers.attention import Attention
from bestiary.layers.base import Layer
from bestiary.layers.feedforward import GLU
from bestiary.layers.linear import Embedding
from bestiary.layers.norms import RMSNorm
from bestiary.layers.repeat import Chain, Repeat
from bestiary.zoo.decoder import Block, Decoder


def gemma2(
    *,
    vocab_size: int,
    num_layers: int,
    attention: Attention,
    ffn: Layer,
    window: int = 4096,
    softcap: float | None = 30.0,
    eps: float = 1e-6,
) -> Decoder:
    """Blocks of `attention` and `ffn`; even layers see a `window`, odd ones all keys.

    Raises ValueError for an odd number of layers.
    """
    if num_layers % 2:
        raise ValueError(f"num_layers: {num_layers}; windows alternate, need an even number")
    dim = attention.dim
    norm = RMSNorm(dim=dim, eps=eps, gain="offset")
    pair = (
        Block(mixer=mixer, ffn=ffn, norm=norm, placement="sandwich")
        for mixer in (replace(attention, window=window), attention)
    )
    return Decoder(
        embedding=Embedding(vocab_size=vocab_size, dim=dim, scale=dim**0.5),
        blocks=Repeat(block=Chain(layers=tuple(pair)), n=num_layers // 2),
        norm=norm,
        softcap=softcap,
    )


def geglu(dim: int, hidden: int) -> GLU:
    return GLU(dim=dim, hidden=hidden, activation=GeluTanh())


def grouped(dim: int, num_heads: int, head_dim: int) -> Attention:
    """Two query heads for each key-value head, logits bounded by 50."""
    return Attention(
        dim=dim,
        num_heads=num_heads,
        num_kv_heads=num_heads // 2,
        head_dim=head_dim,
        softcap=50.0,
    )


def gemma2_tiny() -> Decoder:
    """4 layers of width 128 on bytes, for experiments."""
    return gemma2(
        vocab_size=256,
        num_layers=4,
        attention=grouped(128, 4, 32),
        ffn=geglu(128, 384),
        window=64,
    )


def gemma2_2b() -> Decoder:
    """Gemma-2 2B."""
    return gemma2(
        vocab_size=256000,
        num_layers=26,
        attention=grouped(2304, 8, 256),
        ffn=geglu(2304, 9216),
    )


def gemma2_9b() -> Decoder:
    """Gemma-2 9B."""
    return gemma2(
        vocab_size=256000,
        num_layers=42,
        attention=grouped(3584, 16, 256),
        ffn=geglu(3584, 14336),
    )
