"""Decoders whose feed-forwards are mixtures of gated experts: OLMoE, Mixtral, Switch and GLaM."""

from dataclasses import replace

from bestiary.layers.activations import GeluTanh, Relu
from bestiary.layers.attention import Attention
from bestiary.layers.base import Layer
from bestiary.layers.feedforward import MLP
from bestiary.layers.linear import Embedding
from bestiary.layers.moe import MoE
from bestiary.layers.norms import RMSNorm
from bestiary.layers.repeat import Chain, Repeat
from bestiary.layers.rope import Rope
from bestiary.layers.router import Router
from bestiary.zoo.decoder import Block, Decoder
from bestiary.zoo.llama import byte_llama, llama, swiglu


def dense_then_mixtures(
    block: Block, dense: Layer, mixture: Layer, num_dense: int, num_layers: int
) -> Layer:
    """The blocks of a decoder: `num_dense` like `block` with the feed-forward `dense`, then those
    with `mixture`, `num_layers` in all."""
    mixtures = Repeat(block=replace(block, ffn=mixture), n=num_layers - num_dense)
    if not num_dense:
        return mixtures
    return Chain(layers=(Repeat(block=replace(block, ffn=dense), n=num_dense), mixtures))


def olmoe_ffn(dim: int, num_experts: int, top_k: int, expert: Layer) -> MoE:
    """Softmax over all experts, weights as they come, load-balancing and z-loss (OLMoE)."""
    router = Router(
        dim=dim, num_experts=num_experts, top_k=top_k, balance=0.01, z_loss=0.001, std=0.02
    )
    return MoE(router=router, expert=expert)


def olmoe(
    num_layers: int, dim: int, num_heads: int, ffn: Layer, vocab_size: int = 50304
) -> Decoder:
    """Queries and keys are normed over all heads together."""
    head_dim = dim // num_heads
    attention = Attention(
        dim=dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        query_norm=RMSNorm(dim=dim, eps=1e-5),
        key_norm=RMSNorm(dim=dim, eps=1e-5),
    )
    model = llama(vocab_size=vocab_size, num_layers=num_layers, attention=attention, ffn=ffn)
    return replace(model, std=0.02)


def olmoe_1b7b() -> Decoder:
    """OLMoE-1B-7B (Muennighoff et al. 2024): 64 experts of width 1024, 8 per token."""
    return olmoe(16, 2048, 16, olmoe_ffn(2048, 64, 8, swiglu(2048, 1024)))


def olmoe_227m() -> Decoder:
    """The mixture that UltraMemV2 (arXiv 2508.18756) is measured against: 1.18B, 227M active.

    64 experts of width 384, 8 per token, are ours: what comes nearest to the published sizes.
    """
    model = olmoe(20, 768, 12, olmoe_ffn(768, 64, 8, swiglu(768, 384)))
    return replace(model, head=None)


def olmoe_tiny() -> Decoder:
    """`llama_tiny` with 16 experts, of which the 4 of a token are as wide as its feed-forward."""
    return byte_llama(4, 128, olmoe_ffn(128, 16, 4, swiglu(128, 80)))


def mixtral_8x7b() -> Decoder:
    """Mixtral 8x7B (Jiang et al. 2024): softmax over the 2 chosen of 8 experts."""
    attention = Attention(
        dim=4096, num_heads=32, num_kv_heads=8, head_dim=128, rope=Rope(theta=1e6)
    )
    router = Router(dim=4096, num_experts=8, top_k=2, score="topk_softmax", balance=0.02)
    ffn = MoE(router=router, expert=swiglu(4096, 14336))
    return llama(vocab_size=32000, num_layers=32, attention=attention, ffn=ffn)


def switch_ffn(dim: int, hidden: int, num_experts: int) -> MoE:
    """Switch Transformer (Fedus et al. 2021): one expert per token, capacity factor 1.25."""
    router = Router(dim=dim, num_experts=num_experts, top_k=1, balance=0.01)
    expert = MLP(dim=dim, hidden=hidden, activation=Relu())
    return MoE(router=router, expert=expert, capacity_factor=1.25)


def switch_tiny() -> Decoder:
    """`llama_tiny` with 8 experts of Switch Transformer's form."""
    return byte_llama(4, 128, switch_ffn(128, 480, 8))


def glam(
    vocab_size: int, num_layers: int, dim: int, num_heads: int, hidden: int, num_experts: int
) -> Decoder:
    """GLaM (Du et al. 2021): every other feed-forward is a mixture, 2 experts per token.

    With rotary positions and RMSNorm, where the paper has relative positions and layer norms.
    """
    norm = RMSNorm(dim=dim)
    router = Router(dim=dim, num_experts=num_experts, top_k=2, normalize=True, balance=0.01)
    dense = MLP(dim=dim, hidden=hidden, activation=GeluTanh())
    mixture = MoE(router=router, expert=dense)
    attention = Attention(dim=dim, num_heads=num_heads, num_kv_heads=num_heads, head_dim=128)
    pair = tuple(Block(mixer=attention, ffn=ffn, norm=norm) for ffn in (dense, mixture))
    return Decoder(
        embedding=Embedding(vocab_size=vocab_size, dim=dim),
        blocks=Repeat(block=Chain(layers=pair), n=num_layers // 2),
        norm=norm,
    )


def glam_64b_64e() -> Decoder:
    """GLaM 64B/64E, 1.2T parameters; sizes from memory of the paper's table 4."""
    return glam(256000, 64, 8192, 128, 32768, 64)
