"""Hybrids of state spaces and attention: some layers carry a state, few look anything up.

One attention layer in four to eight keeps the recall of full attention at little of its cache
(Jamba, Lieber et al. 2024, arXiv 2403.19887; Waleffe et al. 2024, arXiv 2406.07887).
"""

from bestiary.layers.base import Layer
from bestiary.layers.mamba2 import Mamba2
from bestiary.layers.norms import RMSNorm
from bestiary.layers.repeat import Chain, Repeat
from bestiary.zoo.decoder import Block, Decoder, plain_decoder
from bestiary.zoo.llama import multi_head, swiglu

SSD_3_TO_1 = "sssa"


def hybrid(
    *,
    vocab_size: int,
    num_layers: int,
    dim: int,
    mixers: dict[str, Layer],
    pattern: str,
    ffn: Layer,
    eps: float = 1e-5,
    tied: bool = False,
) -> Decoder:
    """`num_layers` pre-norm blocks; their mixers, of any kind, follow `pattern` over and over.

    A pattern is one letter per layer, and `mixers` says what it stands for: "sssa" is three layers
    of mixers["s"] and one of mixers["a"]. Raises ValueError for an unknown letter, and where the
    pattern's length does not divide num_layers.
    """
    if unknown := set(pattern) - set(mixers):
        raise ValueError(f"pattern: {min(unknown)!r} in {pattern!r}; known: {', '.join(mixers)}")
    if not pattern or num_layers % len(pattern):
        raise ValueError(f"pattern: {pattern!r} does not divide num_layers {num_layers}")
    norm = RMSNorm(dim=dim, eps=eps)
    blocks = tuple(Block(mixer=mixers[letter], ffn=ffn, norm=norm) for letter in pattern)
    return plain_decoder(
        vocab_size=vocab_size,
        blocks=Repeat(block=Chain(layers=blocks), n=num_layers // len(pattern)),
        norm=norm,
        tied=tied,
    )


def byte_hybrid(num_layers: int, dim: int, pattern: str = SSD_3_TO_1) -> Decoder:
    """A small decoder on bytes of Mamba-2 layers "s" and attention layers "a": "a" is attention
    only, "s" Mamba-2 only."""
    mixers: dict[str, Layer] = {
        "s": Mamba2(dim=dim, num_heads=2 * dim // 32, head_dim=32, state=64),
        "a": multi_head(dim, dim // 32),
    }
    return hybrid(
        vocab_size=256,
        num_layers=num_layers,
        dim=dim,
        mixers=mixers,
        pattern=pattern,
        ffn=swiglu(dim, round(dim * 8 / 3 / 64) * 64),
        eps=1e-6,
        tied=True,
    )


def hybrid_tiny() -> Decoder:
    """4 layers of width 128 on bytes, three of Mamba-2 and one of attention, for experiments."""
    return byte_hybrid(4, 128)


def hybrid_mini() -> Decoder:
    """8 layers of width 256 on bytes, three of Mamba-2 to one of attention, for experiments."""
    return byte_hybrid(8, 256)
