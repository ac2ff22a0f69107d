"""Mamba (Gu & Dao 2023, arXiv 2312.00752) and Mamba-2 (Dao & Gu 2024, arXiv 2405.21060).

Pre-norm blocks of a mixer and nothing else, a tied head, the vocabulary padded to a multiple of 8
(Mamba-2: 16). The published programs keep the residual stream in float32 beside narrower weights;
here it has the type of `precision.compute`.
"""

import math

from bestiary.layers.base import Layer
from bestiary.layers.mamba import Mamba
from bestiary.layers.mamba2 import Mamba2
from bestiary.layers.norms import RMSNorm
from bestiary.layers.repeat import Repeat
from bestiary.zoo.decoder import Block, Decoder, plain_decoder

GPT_NEOX_VOCABULARY = 50277


def mixers_only(
    *,
    vocab_size: int,
    num_layers: int,
    mixer: Layer,
    dim: int,
    eps: float = 1e-5,
    tied: bool = True,
) -> Decoder:
    """`num_layers` pre-norm blocks of `mixer`, whose width is `dim`."""
    norm = RMSNorm(dim=dim, eps=eps)
    return plain_decoder(
        vocab_size=vocab_size,
        blocks=Repeat(block=Block(mixer=mixer, ffn=None, norm=norm), n=num_layers),
        norm=norm,
        tied=tied,
    )


def mamba(num_layers: int, dim: int, vocab_size: int = GPT_NEOX_VOCABULARY) -> Decoder:
    """A Mamba of the published proportions."""
    mixer = Mamba(dim=dim, inner=2 * dim, dt_rank=math.ceil(dim / 16), out_gain=num_layers**-0.5)
    return mixers_only(
        vocab_size=padded(vocab_size, 8), num_layers=num_layers, mixer=mixer, dim=dim
    )


def mamba2(num_layers: int, dim: int, vocab_size: int = GPT_NEOX_VOCABULARY) -> Decoder:
    """A Mamba-2 of the published proportions: heads of 64 channels, 128 states, one group."""
    mixer = Mamba2(dim=dim, num_heads=2 * dim // 64, out_gain=num_layers**-0.5)
    return mixers_only(
        vocab_size=padded(vocab_size, 16), num_layers=num_layers, mixer=mixer, dim=dim
    )


def padded(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def mamba_tiny() -> Decoder:
    """4 Mamba layers of width 128 on bytes, for experiments."""
    return mamba(4, 128, vocab_size=256)


def mamba2_tiny() -> Decoder:
    """4 Mamba-2 layers of width 128 on bytes, for experiments."""
    return mamba2(4, 128, vocab_size=256)


def mamba_130m() -> Decoder:
    """Mamba 130M."""
    return mamba(24, 768)


def mamba_370m() -> Decoder:
    """Mamba 370M."""
    return mamba(48, 1024)


def mamba_790m() -> Decoder:
    """Mamba 790M."""
    return mamba(48, 1536)


def mamba_1_4b() -> Decoder:
    """Mamba 1.4B."""
    return mamba(48, 2048)


def mamba_2_8b() -> Decoder:
    """Mamba 2.8B."""
    return mamba(64, 2560)


def mamba2_130m() -> Decoder:
    """Mamba-2 130M."""
    return mamba2(24, 768)


def mamba2_370m() -> Decoder:
    """Mamba-2 370M."""
    return mamba2(48, 1024)


def mamba2_780m() -> Decoder:
    """Mamba-2 780M."""
    return mamba2(48, 1536)


def mamba2_1_3b() -> Decoder:
    """Mamba-2 1.3B."""
    return mamba2(48, 2048)


def mamba2_2_7b() -> Decoder:
    """Mamba-2 2.7B."""
    return mamba2(64, 2560)


def mamba2_8b() -> Decoder:
    """Mamba-2 8B of NVIDIA (Waleffe et al. 2024, arXiv 2406.07887): 8 groups, untied."""
    dim, num_layers = 4096, 56
    mixer = Mamba2(dim=dim, num_heads=128, groups=8, out_gain=num_layers**-0.5)
    return mixers_only(vocab_size=256000, num_layers=num_layers, mixer=mixer, dim=dim, tied=False)
