"""Ling 2.0 (Ling Team 2025, arXiv 2510.22115): sigmoid routing without a balancing loss."""

from bestiary.layers.attention import Attention
from bestiary.layers.moe import MoE
from bestiary.layers.norms import RMSNorm
from bestiary.layers.rope import Rope
from bestiary.layers.router import Router
from bestiary.zoo.decoder import Block, Decoder, plain_decoder
from bestiary.zoo.llama import swiglu
from bestiary.zoo.mixtures import dense_then_mixtures


def ling_ffn(
    dim: int,
    hidden: int,
    *,
    num_experts: int = 256,
    top_k: int = 8,
    num_shared: int = 1,
    num_groups: int = 8,
    top_groups: int = 4,
) -> MoE:
    """Experts by biased sigmoid scores within the best groups, weights that sum to 2.5, and shared
    experts; the bias follows the load with its mean kept, beside a small z-loss."""
    router = Router(
        dim=dim,
        num_experts=num_experts,
        top_k=top_k,
        score="sigmoid",
        normalize=True,
        scale=2.5,
        num_groups=num_groups,
        top_groups=top_groups,
        bias="centered",
        z_loss=3.5e-6,
    )
    return MoE(router=router, expert=swiglu(dim, hidden), shared=swiglu(dim, hidden * num_shared))


def ling(
    *,
    vocab_size: int,
    num_layers: int,
    num_dense: int,
    dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dense_hidden: int,
    ffn: MoE,
    rope: Rope = Rope(fraction=0.5),
    eps: float = 1e-6,
    tied: bool = False,
    std: float | None = 0.006,
) -> Decoder:
    """`num_dense` blocks with a dense feed-forward, then blocks with `ffn`; queries and keys are
    normed head by head and half of their channels rotated."""
    norm, head_norm = RMSNorm(dim=dim, eps=eps), RMSNorm(dim=head_dim, eps=eps)
    attention = Attention(
        dim=dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        query_norm=head_norm,
        key_norm=head_norm,
        rope=rope,
    )
    block = Block(mixer=attention, ffn=ffn, norm=norm)
    return plain_decoder(
        vocab_size=vocab_size,
        blocks=dense_then_mixtures(block, swiglu(dim, dense_hidden), ffn, num_dense, num_layers),
        norm=norm,
        tied=tied,
        std=std,
    )


def ling_tiny() -> Decoder:
    """On bytes, for experiments: a dense block and 3 of 16 experts, 3 per token and one shared."""
    return ling(
        vocab_size=256,
        num_layers=4,
        num_dense=1,
        dim=128,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        dense_hidden=320,
        ffn=ling_ffn(128, 80, num_experts=16, top_k=3, num_groups=1, top_groups=1),
        tied=True,
        std=None,
    )


def ling_mini_2() -> Decoder:
    """Ling-mini-2.0: 16B parameters, 1.4B active."""
    return ling(
        vocab_size=157184,
        num_layers=20,
        num_dense=1,
        dim=2048,
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        dense_hidden=5120,
        ffn=ling_ffn(2048, 512),
    )


def ling_flash_2() -> Decoder:
    """Ling-flash-2.0: 103B parameters, 6.1B active."""
    return ling(
        vocab_size=157184,
        num_layers=32,
        num_dense=1,
        dim=4096,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        dense_hidden=9216,
        ffn=ling_ffn(4096, 1024),
    )


def ling_1t() -> Decoder:
    """Ling-1T: 1T parameters, 51B active; the number of key-value heads is from memory."""
    return ling(
        vocab_size=157184,
        num_layers=80,
        num_dense=4,
        dim=8192,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        dense_hidden=18432,
        ffn=ling_ffn(8192, 2048),
    )
