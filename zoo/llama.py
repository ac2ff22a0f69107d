"""Llama (Touvron et al. 2023): pre-norm, grouped queries, rotary positions, SwiGLU, no biases.

Published sizes follow the released configurations; the small family is for experiments.
"""

from bestiary.layers.activations import Silu
from bestiary.layers.attention import Attention
from bestiary.layers.base import Layer
from bestiary.layers.feedforward import GLU
from bestiary.layers.norms import RMSNorm
from bestiary.layers.repeat import Repeat
from bestiary.layers.rope import Llama3, Rope
from bestiary.zoo.decoder import Block, Decoder, plain_decoder

_LLAMA3_2_ROPE = Rope(theta=500000.0, scaling=Llama3(factor=32.0, original_length=8192))


def llama(
    *,
    vocab_size: int,
    num_layers: int,
    attention: Attention,
    ffn: Layer,
    eps: float = 1e-5,
    tied: bool = False,
) -> Decoder:
    """`num_layers` pre-norm blocks of `attention` and `ffn`, whose width is that of the model."""
    dim = attention.dim
    norm = RMSNorm(dim=dim, eps=eps)
    return plain_decoder(
        vocab_size=vocab_size,
        blocks=Repeat(block=Block(mixer=attention, ffn=ffn, norm=norm), n=num_layers),
        norm=norm,
        tied=tied,
    )


def swiglu(dim: int, hidden: int) -> GLU:
    return GLU(dim=dim, hidden=hidden, activation=Silu())


def multi_head(dim: int, num_heads: int) -> Attention:
    """As many key-value heads as query heads, together as wide as the model."""
    return Attention(
        dim=dim, num_heads=num_heads, num_kv_heads=num_heads, head_dim=dim // num_heads
    )


def llama_tiny() -> Decoder:
    """4 layers of width 128 on bytes, for experiments."""
    return byte_llama(num_layers=4, dim=128)


def llama_mini() -> Decoder:
    """6 layers of width 256 on bytes, for experiments."""
    return byte_llama(num_layers=6, dim=256)


def llama_small() -> Decoder:
    """8 layers of width 512 on bytes, for experiments."""
    return byte_llama(num_layers=8, dim=512)


def llama_1b_24x2048() -> Decoder:
    """24 layers of width 2048: the dense reference of the PolyCom paper (arXiv 2411.03884)."""
    return llama(
        vocab_size=32000, num_layers=24, attention=multi_head(2048, 16), ffn=swiglu(2048, 5504)
    )


def llama3_2_1b() -> Decoder:
    """Llama 3.2 1B."""
    attention = Attention(dim=2048, num_heads=32, num_kv_heads=8, head_dim=64, rope=_LLAMA3_2_ROPE)
    return llama(
        vocab_size=128256, num_layers=16, attention=attention, ffn=swiglu(2048, 8192), tied=True
    )


def llama3_2_3b() -> Decoder:
    """Llama 3.2 3B."""
    attention = Attention(dim=3072, num_heads=24, num_kv_heads=8, head_dim=128, rope=_LLAMA3_2_ROPE)
    return llama(
        vocab_size=128256, num_layers=28, attention=attention, ffn=swiglu(3072, 8192), tied=True
    )


def llama2_7b() -> Decoder:
    """Llama 2 7B."""
    return llama(
        vocab_size=32000, num_layers=32, attention=multi_head(4096, 32), ffn=swiglu(4096, 11008)
    )


def llama3_8b() -> Decoder:
    """Llama 3 8B."""
    attention = Attention(
        dim=4096, num_heads=32, num_kv_heads=8, head_dim=128, rope=Rope(theta=500000.0)
    )
    return llama(vocab_size=128256, num_layers=32, attention=attention, ffn=swiglu(4096, 14336))


def byte_llama(num_layers: int, dim: int, ffn: Layer | None = None) -> Decoder:
    """A small decoder on bytes and the end of document; `ffn` replaces a SwiGLU of 8/3 dim, rounded
    to a multiple of 64."""
    return llama(
        vocab_size=256,
        num_layers=num_layers,
        attention=multi_head(dim, dim // 32),
        ffn=ffn or swiglu(dim, round(dim * 8 / 3 / 64) * 64),
        eps=1e-6,
        tied=True,
    )
