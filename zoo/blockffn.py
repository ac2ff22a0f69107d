"""BlockFFN (Song et al. 2025, arXiv 2507.08771): decoders whose feed-forwards are small experts
that a ReLU router switches on and off.

Sizes, losses and attention are those of the released configurations. Of their muP multipliers the
embedding's 12 is a field; 1.4 / sqrt(layers) of every residual branch and 256 / dim before the head
are in the initial matrices. Their learning rates by width (0.01 / (dim / 256) between embedding and
head) are left out: all parameters have the optimiser's. The densities are the measured shares of
active experts (1 - TLS).
"""

import math

from bestiary.layers.attention import Attention
from bestiary.layers.base import Layer
from bestiary.layers.blockffn import AdaptiveFactor, BlockFFN
from bestiary.layers.linear import Embedding, Linear
from bestiary.layers.mla import MLA
from bestiary.layers.norms import RMSNorm
from bestiary.layers.repeat import Repeat
from bestiary.layers.rope import Rope
from bestiary.zoo.decoder import Block, Decoder
from bestiary.zoo.llama import byte_llama


def block_ffn(
    dim: int,
    num_layers: int,
    num_experts: int,
    expert_dim: int,
    *,
    density: float,
    locality: float = 2e-3,
    sparsity: float = 5e-2,
    out_gain: float = 1.0,
) -> BlockFFN:
    """The layer of a model of `num_layers`, over which the paper averages the losses whose
    coefficients are `locality` and, at first, `sparsity`."""
    return BlockFFN(
        dim=dim,
        num_experts=num_experts,
        expert_dim=expert_dim,
        locality=locality / num_layers,
        sparsity=AdaptiveFactor(start=sparsity / num_layers),
        density=density,
        out_gain=out_gain,
    )


def blockffn(attention: Layer, ffn: BlockFFN, num_layers: int) -> Decoder:
    """`num_layers` pre-norm blocks on MiniCPM's vocabulary, with a head of its own."""
    dim, vocab_size = ffn.dim, 122753
    norm = RMSNorm(dim=dim, eps=1e-5)
    return Decoder(
        embedding=Embedding(vocab_size=vocab_size, dim=dim, scale=12.0, std=0.1),
        blocks=Repeat(block=Block(mixer=attention, ffn=ffn, norm=norm), n=num_layers),
        norm=norm,
        head=Linear(
            inputs=dim, outputs=vocab_size, axes=("embed", "vocab"), gain=25.6 / math.sqrt(dim)
        ),
    )


def latent(
    dim: int,
    num_layers: int,
    num_experts: int,
    expert_dim: int,
    *,
    density: float,
    locality: float = 2e-3,
) -> Decoder:
    """The released sizes with latent attention, one head per 128 channels."""
    out_gain = 1.4 / math.sqrt(num_layers)
    attention = MLA(
        dim=dim,
        num_heads=dim // 128,
        kv_rank=256,
        q_rank=768,
        nope_dim=128,
        rope_dim=64,
        value_dim=128,
        rope=Rope(),
        norm_eps=1e-5,
        out_gain=out_gain,
    )
    ffn = block_ffn(
        dim,
        num_layers,
        num_experts,
        expert_dim,
        density=density,
        locality=locality,
        out_gain=out_gain,
    )
    return blockffn(attention, ffn, num_layers)


def blockffn_tiny() -> Decoder:
    """`llama_tiny` with BlockFFN feed-forwards of equal parameters."""
    return byte_llama(4, 128, block_ffn(128, 4, 26, 18, density=0.2))


def blockffn_0_1b() -> Decoder:
    """0.119B parameters beside the vocabulary's; 10000 steps of 1.57M tokens."""
    return latent(768, 16, 48, 64, density=0.195)


def blockffn_0_5b() -> Decoder:
    """0.495B parameters beside the vocabulary's; 20000 steps of 3.15M tokens."""
    return latent(1280, 27, 40, 128, density=0.157)


def blockffn_0_8b() -> Decoder:
    """0.817B parameters beside the vocabulary's; 30000 steps of 2.36M tokens."""
    return latent(1536, 32, 48, 128, density=0.159, locality=1e-3)


def blockffn_1_2b() -> Decoder:
    """1.19B parameters beside the vocabulary's; 40000 steps of 3.15M tokens."""
    return latent(1792, 35, 56, 128, density=0.182)


def blockffn_2_8b() -> Decoder:
    """2.80B parameters beside the vocabulary's; 25000 steps of 3.15M tokens.

    The paper says grouped-query attention and no more; 16 heads and 4 key-value heads of 128 give
    its number of parameters. Its density was not published.
    """
    dim, num_layers = 2048, 36
    out_gain = 1.4 / math.sqrt(num_layers)
    attention = Attention(dim=dim, num_heads=16, num_kv_heads=4, head_dim=128, out_gain=out_gain)
    ffn = block_ffn(dim, num_layers, 128, 128, density=0.18, sparsity=1e-1, out_gain=out_gain)
    return blockffn(attention, ffn, num_layers)
