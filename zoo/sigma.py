"""Sigma-MoE-Tiny (2025, arXiv 2512.16248): 96 experts in every layer, one per token.

Training starts with more experts per token in the first layers, and ends with one everywhere; both
phases have the same parameters.
"""

from dataclasses import replace

from bestiary.layers.attention import Attention
from bestiary.layers.moe import MoE
from bestiary.layers.norms import RMSNorm
from bestiary.layers.router import Router
from bestiary.zoo.decoder import Decoder
from bestiary.zoo.llama import llama, swiglu

START = (8, 8, 6, 6, 4, 4, 2, 2)
"""Experts per token of the first layers in the first phase; from memory, unconfirmed."""


def sigma_moe(
    *,
    vocab_size: int,
    num_layers: int,
    attention: Attention,
    hidden: int,
    num_experts: int,
    start: tuple[int, ...] = (),
    tied: bool = True,
) -> Decoder:
    """`start` gives the first layers' experts per token; the others use one."""
    norm = RMSNorm(dim=attention.head_dim)
    router = Router(
        dim=attention.dim,
        num_experts=num_experts,
        top_k=max(start, default=1),
        balance=0.01,
        balance_over="step",
    )
    model = llama(
        vocab_size=vocab_size,
        num_layers=num_layers,
        attention=replace(attention, query_norm=norm, key_norm=norm),
        ffn=MoE(router=router, expert=swiglu(attention.dim, hidden)),
        eps=1e-6,
        tied=tied,
    )
    if not start:
        return model
    numbers = tuple(map(float, start)) + (1.0,) * (num_layers - len(start))
    return model.map_stacks(lambda stack: replace(stack, constants=(("top_k", numbers),)))


def _tiny(start: tuple[int, ...]) -> Decoder:
    # head size, vocabulary and coefficients of losses were not published where we could read them
    attention = Attention(dim=1536, num_heads=16, num_kv_heads=4, head_dim=96)
    return sigma_moe(
        vocab_size=151936,
        num_layers=56,
        attention=attention,
        hidden=768,
        num_experts=96,
        start=start,
    )


def sigma_moe_tiny() -> Decoder:
    """20B parameters, 0.5B active: one expert per token in every layer."""
    return _tiny(())


def sigma_moe_tiny_start() -> Decoder:
    """The first phase of `sigma_moe_tiny`: up to 8 experts per token in the first 8 layers."""
    return _tiny(START)
