"""Decoders whose layers share keys and values: cross-layer attention (Brandon et al. 2024)."""

from dataclasses import fields

from bestiary.layers.attention import Attention
from bestiary.layers.base import Layer
from bestiary.layers.norms import RMSNorm
from bestiary.layers.repeat import Chain, Repeat
from bestiary.layers.shared_kv import SharedAttention, SharedKV
from bestiary.zoo.decoder import Block, Decoder, plain_decoder
from bestiary.zoo.llama import swiglu


def cross_layer(
    *,
    vocab_size: int,
    num_layers: int,
    attention: Attention,
    ffn: Layer,
    sharing: int = 2,
    eps: float = 1e-5,
    tied: bool = False,
) -> Decoder:
    """`num_layers` pre-norm blocks, of which every `sharing` in succession use one set of keys and
    values: the cache is so many times smaller.

    Raises ValueError when `sharing` does not divide num_layers.
    """
    if sharing < 1 or num_layers % sharing:
        raise ValueError(f"sharing: {sharing} does not divide num_layers {num_layers}")
    dim = attention.dim
    norm = RMSNorm(dim=dim, eps=eps)
    queries = SharedAttention(**{f.name: getattr(attention, f.name) for f in fields(attention)})
    block = Block(mixer=queries, ffn=ffn, norm=norm)
    group = SharedKV(source=attention, norm=norm, blocks=Chain(layers=(block,) * sharing))
    return plain_decoder(
        vocab_size=vocab_size,
        blocks=Repeat(block=group, n=num_layers // sharing),
        norm=norm,
        tied=tied,
    )


def cross_layer_tiny() -> Decoder:
    """4 layers of width 128 on bytes, of which two share keys and values, for experiments."""
    attention = Attention(dim=128, num_heads=4, num_kv_heads=4, head_dim=32)
    return cross_layer(vocab_size=256, num_layers=4, attention=attention, ffn=swiglu(128, 384))
