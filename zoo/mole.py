"""Mixtures of latent experts (Liu et al. 2025, arXiv 2503.23100): as models, and made of a trained
mixture of experts."""

from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp

from bestiary.layers import mole
from bestiary.layers.base import Layer, Tree
from bestiary.layers.moe import MoE
from bestiary.layers.mole import Factors, LatentExperts
from bestiary.layers.repeat import Chain, Repeat
from bestiary.zoo.decoder import MTP, Block, Decoder
from bestiary.zoo.llama import byte_llama, swiglu
from bestiary.zoo.mixtures import olmoe, olmoe_ffn

Report = dict[str, dict[str, Factors]]
"""The factors of "gate" and "up", by the place of their layer."""


def latent_experts(moe: MoE, group_size: int, latent: int, hidden: int) -> LatentExperts:
    """The form of `moe` with latent experts of width `hidden`."""
    return LatentExperts(
        router=moe.router, group_size=group_size, latent=latent, hidden=hidden, shared=moe.shared
    )


def mole_tiny() -> Decoder:
    """`olmoe_tiny` with latents of 48 for groups of 4 experts: about two thirds of its experts'
    parameters."""
    ffn = latent_experts(olmoe_ffn(128, 16, 4, swiglu(128, 80)), 4, 48, 80)
    return byte_llama(4, 128, ffn)


def latent_olmoe_small() -> Decoder:
    """The layout of `olmoe_227m` with groups of 8 experts and latents as wide as an expert.

    The paper's configurations are not known; this one is the library's.
    """
    dim, hidden = 768, 384
    ffn = latent_experts(olmoe_ffn(dim, 64, 8, swiglu(dim, hidden)), 8, hidden, hidden)
    return replace(olmoe(20, dim, 12, ffn), head=None)


def convert(
    model: Decoder,
    params: Tree,
    group_size: int,
    latent: int,
    *,
    expert_rank: int | None = None,
) -> tuple[Decoder, Tree, Report]:
    """`model` with latent experts for its mixtures, the nearest parameters, and what they lose.

    Factors every layer by `mole.convert`, whose arguments and errors it shares. Raises ValueError
    for a model without mixtures.
    """
    report: Report = {}

    def converted(layer: Layer, params: Tree, place: str) -> tuple[Layer, Tree]:
        if isinstance(layer, MoE):
            new, params, report[place] = mole.convert(
                layer, params, group_size, latent, expert_rank=expert_rank
            )
            return new, params
        if isinstance(layer, MTP):
            block, own = converted(layer.block, params["block"], f"{place}/block")
            return replace(layer, block=block), params | {"block": own}
        if isinstance(layer, Block) and layer.ffn is not None:
            ffn, own = converted(layer.ffn, params["ffn"], place)
            return replace(layer, ffn=ffn), params | {"ffn": own}
        if isinstance(layer, Chain):
            members = [
                converted(member, params[str(i)], f"{place}/{i}")
                for i, member in enumerate(layer.layers)
            ]
            own = {str(i): params for i, (_, params) in enumerate(members)}
            return replace(layer, layers=tuple(member for member, _ in members)), own
        if isinstance(layer, Repeat):
            repeats = [
                converted(layer.block, jax.tree.map(lambda w, n=n: w[n], params), f"{place}/{n}")
                for n in range(layer.n)
            ]
            own = jax.tree.map(lambda *w: jnp.stack(w), *(params for _, params in repeats))
            return replace(layer, block=repeats[0][0]), own
        return layer, params

    parts = {name: getattr(model, name) for name in ("blocks", "mtp")}
    for name, layer in parts.items():
        if layer is not None:
            parts[name], own = converted(layer, params[name], name)
            params = params | {name: own}
    if not report:
        raise ValueError("blocks: no mixture of experts; there is nothing to convert")
    return replace(model, **parts), params, report


def lines(report: Report) -> Iterator[str]:
    """What each layer loses, one line per matrix."""
    for place, factors in report.items():
        for name, f in factors.items():
            rank = f.own.shape[1]
            verdict = "exact" if f.exact.all() else f"ranks up to {f.ranks.max()}, kept {rank}"
            yield f"{place} {name}: {f.error.sum() / f.energy.sum():.2%} lost ({verdict})"
