"""Pangu Ultra MoE (2025, arXiv 2505.04519): latent attention, mixtures of 256 experts, and norms on
both sides of every sub-layer that start small in deep models.

Sizes are those of the released configuration. The gains of the norms, the initial deviation and the
balancing loss's coefficient could not be confirmed: they are arguments.
"""

import math

from bestiary.layers.mla import MLA
from bestiary.layers.moe import MoE
from bestiary.layers.norms import RMSNorm
from bestiary.layers.rope import Rope
from bestiary.layers.router import Router
from bestiary.zoo.decoder import Block, Decoder, plain_decoder
from bestiary.zoo.llama import swiglu
from bestiary.zoo.mixtures import dense_then_mixtures


def pangu_ffn(
    dim: int,
    hidden: int,
    *,
    num_experts: int,
    top_k: int,
    balance: float = 0.001,
    balance_groups: int = 1,
) -> MoE:
    """Sigmoid scores, weights that sum to 2.5, one shared expert, and a balancing loss over each of
    the `balance_groups` parts of the batch that an expert-parallel group holds."""
    router = Router(
        dim=dim,
        num_experts=num_experts,
        top_k=top_k,
        score="sigmoid",
        normalize=True,
        scale=2.5,
        balance=balance,
        balance_over="group",
        balance_groups=balance_groups,
    )
    return MoE(router=router, expert=swiglu(dim, hidden), shared=swiglu(dim, hidden))


def pangu(
    *,
    vocab_size: int,
    num_layers: int,
    num_dense: int,
    attention: MLA,
    dense_hidden: int,
    ffn: MoE,
    attention_gain: float = 0.283,
    ffn_gain: float = 0.432,
    eps: float = 1e-5,
    tied: bool = False,
) -> Decoder:
    """Depth-scaled sandwich norms: gains start at `attention_gain` and `ffn_gain` / sqrt(layers).
    TinyInit: every matrix starts with deviation sqrt(1 / (2 dim layers))."""
    dim = attention.dim
    norm, depth = RMSNorm(dim=dim, eps=eps), math.sqrt(num_layers)

    block = Block(
        mixer=attention,
        ffn=ffn,
        norm=norm,
        placement="sandwich",
        post_starts=(attention_gain / depth, ffn_gain / depth),
    )
    return plain_decoder(
        vocab_size=vocab_size,
        blocks=dense_then_mixtures(block, swiglu(dim, dense_hidden), ffn, num_dense, num_layers),
        norm=norm,
        tied=tied,
        std=math.sqrt(1 / (2 * dim * num_layers)),
    )


def pangu_tiny() -> Decoder:
    """On bytes, for experiments: a dense block and three mixtures, 3 of 16 experts per token."""
    attention = MLA(
        dim=128, num_heads=4, kv_rank=48, q_rank=64, nope_dim=24, rope_dim=8, value_dim=32
    )
    return pangu(
        vocab_size=256,
        num_layers=4,
        num_dense=1,
        attention=attention,
        dense_hidden=320,
        ffn=pangu_ffn(128, 80, num_experts=16, top_k=3),
        tied=True,
    )


def pangu_ultra_moe() -> Decoder:
    """Pangu Ultra MoE: 718B parameters, 39B active; `.with_mtp()` adds the released MTP layer."""
    attention = MLA(
        dim=7680,
        num_heads=128,
        kv_rank=512,
        q_rank=1536,
        nope_dim=128,
        rope_dim=64,
        value_dim=128,
        rope=Rope(theta=2.56e7, interleaved=True),
        norm_eps=1e-5,
    )
    return pangu(
        vocab_size=153600,
        num_layers=61,
        num_dense=3,
        attention=attention,
        dense_hidden=18432,
        ffn=pangu_ffn(7680, 2048, num_experts=256, top_k=8),
    )
