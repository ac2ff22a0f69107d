"""The members of a comparison: byte-level decoders that differ in their feed-forwards or in their
token mixers, each with one width of feed-forward that is solved for to meet the dense member's
budget."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from bestiary.eval.accounting import account
from bestiary.eval.compare_mixers import MIXERS, mixing
from bestiary.layers.activations import PolyNorm
from bestiary.layers.base import Layer
from bestiary.layers.feedforward import MLP, Parallel
from bestiary.layers.memory import PEER, PKM, MemoryPlus
from bestiary.layers.mohd import MoHDFFN
from bestiary.layers.spark import GaussianGLU, SparkFFN
from bestiary.zoo.blockffn import block_ffn
from bestiary.zoo.decoder import Decoder
from bestiary.zoo.ling import ling, ling_ffn
from bestiary.zoo.llama import byte_llama, swiglu
from bestiary.zoo.mixtures import olmoe_ffn, switch_ffn
from bestiary.zoo.mohd import residual, sub_dimensions
from bestiary.zoo.mole import latent_experts
from bestiary.zoo.ultramem import memory, with_memory

Match = Literal["active_params", "total_params", "train_flops"]
Build = Callable[[int, int, int], Decoder]
"""(dim, num_layers, width): larger in each."""

_LARGEST = 1 << 20  # width
_TOO_MUCH = 1.05  # times the budget: a member that cannot be smaller is refused


@dataclass(frozen=True, kw_only=True)
class Member:
    """A model of the comparison, sized."""

    name: str
    width: int
    model: Decoder
    budget: float
    """Of the dense member, in what is matched."""
    achieved: float

    @property
    def off(self) -> float:
        """How far from the budget, as a share of it."""
        return self.achieved / self.budget - 1


def _replacing(ffn: Callable[[int, int, int], Layer]) -> Build:
    """`llama_tiny` with `ffn(dim, num_layers, width)` in every block."""
    return lambda dim, n, width: byte_llama(n, dim, ffn(dim, n, width))


def _ling(dim: int, num_layers: int, width: int) -> Decoder:
    ffn = ling_ffn(dim, width, num_experts=16, top_k=3, num_groups=1, top_groups=1)
    num_dense = min(1, num_layers - 1)
    return ling(
        vocab_size=256,
        num_layers=num_layers,
        num_dense=num_dense,
        dim=dim,
        num_heads=dim // 32,
        num_kv_heads=dim // 32,
        head_dim=32,
        dense_hidden=4 * width,
        ffn=ffn,
        tied=True,
    )


def _beside(kind: type[PKM], num_keys: int, ffn_width: int, top_k: int, dim: int) -> Layer:
    """A memory with a table of its own beside a gated feed-forward."""
    table = kind(dim=dim, num_heads=1, num_keys=num_keys, key_dim=dim // 2, top_k=top_k)
    return Parallel(layers=(swiglu(dim, ffn_width), table))


def _ultramemv2(dim: int, num_layers: int, ffn_width: int, knum: int, top_k: int) -> Decoder:
    return with_memory(
        byte_llama(num_layers, dim, swiglu(dim, ffn_width)),
        memory(
            num_layers=num_layers,
            dim=dim,
            knum=knum,
            key_dim=dim // 2,
            top_k=top_k,
            value_dim=3 * dim // 4,
            pre_dim=dim // 4,
        ),
    )


MEMBERS: dict[str, Build] = {
    "dense": _replacing(lambda d, n, w: swiglu(d, w)),
    "polycom": _replacing(lambda d, n, w: MLP(dim=d, hidden=w, activation=PolyNorm())),
    # 8 % of the units, as published
    "spark": _replacing(
        lambda d, n, w: SparkFFN(
            dim=d, hidden=w, predictor_dim=d // 2, top_k=max(1, round(0.08 * w))
        )
    ),
    "gaussian": _replacing(lambda d, n, w: GaussianGLU(dim=d, hidden=w)),
    "moe": _replacing(lambda d, n, w: olmoe_ffn(d, 16, 4, swiglu(d, w))),
    "switch": _replacing(lambda d, n, w: switch_ffn(d, w, 8)),
    "ling": _ling,
    "mole": _replacing(lambda d, n, w: latent_experts(olmoe_ffn(d, 16, 4, swiglu(d, w)), 4, w, w)),
    "blockffn": _replacing(lambda d, n, w: block_ffn(d, n, w, 16, density=0.25)),
    "mohd": _replacing(lambda d, n, w: MoHDFFN(gate=sub_dimensions(d), hidden=16 * w)),
    "mohd_residual": lambda d, n, w: residual(byte_llama(n, d, swiglu(d, w))),
    "pkm": _replacing(lambda d, n, w: _beside(PKM, 64, w, 8, d)),
    "memoryplus": _replacing(lambda d, n, w: _beside(MemoryPlus, 64, w, 8, d)),
    "peer": _replacing(lambda d, n, w: _beside(PEER, 64, w, 8, d)),
    "ultramemv2": lambda d, n, w: _ultramemv2(d, n, w, 64, 8),
}
"""What a name of the command line builds. The width is that of the feed-forward or of an expert, in
BlockFFN the number of experts of 16 units, in MoHD that of the 16 parts."""

NAMES = (*MEMBERS, *(name for name in MIXERS if name != "full"))  # dense has full attention

# a table of fixed size leaves no room in a total of parameters: here it grows instead, beside half
# of the dense feed-forward
_TABLES: dict[str, Build] = {
    "pkm": _replacing(lambda d, n, w: _beside(PKM, 8 + w, _hidden(d) // 2, 4, d)),
    "memoryplus": _replacing(lambda d, n, w: _beside(MemoryPlus, 8 + w, _hidden(d) // 2, 4, d)),
    "peer": _replacing(lambda d, n, w: _beside(PEER, 8 + w, _hidden(d) // 2, 4, d)),
    "ultramemv2": lambda d, n, w: _ultramemv2(d, n, _hidden(d) // 2, 8 + w, 4),
}


def _build(name: str, match: Match, span: int) -> Build:
    if name in MIXERS:
        return lambda d, n, w: mixing(name, d, n, swiglu(d, w), span)
    return _TABLES.get(name, MEMBERS[name]) if match == "total_params" else MEMBERS[name]


def _hidden(dim: int) -> int:
    """Of the dense member: that of `byte_llama`."""
    return round(dim * 8 / 3 / 64) * 64


def sized(
    names: list[str], *, dim: int, num_layers: int, length: int, match: Match, span: int
) -> list[Member]:
    """The members called `names`, dense first, each as near to the dense one's budget as its width
    allows.

    Args:
      dim: width of all members, a multiple of 32.
      length: tokens in a row, on which FLOPs depend.
      match: "active_params" and "total_params" count parameters (`Decoder.count`), "train_flops"
        those of a training step per token (`account`).
      span: keys that mixers see or choose, as `compare_mixers` says.

    Raises:
      ValueError: unknown or repeated names, no dense member, sizes out of range, a member that
        exceeds the budget at its smallest.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"members: unknown {unknown[0]!r}; known: {', '.join(NAMES)}")
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"members: {twice[0]!r} is there twice; need each once")
    if "dense" not in names:
        raise ValueError("members: no 'dense', which all others are compared with; add it")
    if match not in get_args(Match):
        raise ValueError(f"match: {match!r}; need one of {', '.join(get_args(Match))}")
    if dim < 32 or dim % 32:
        raise ValueError(f"dim: {dim}; need a multiple of 32, the width of a head")
    if num_layers < 1:
        raise ValueError(f"num_layers: {num_layers}; need at least 1")

    def measure(model: Decoder) -> float:
        if match == "train_flops":
            return account(model, length).training_flops_total
        count = model.count()
        return count.active if match == "active_params" else count.total

    dense = MEMBERS["dense"](dim, num_layers, _hidden(dim))
    budget = measure(dense)
    members = [
        Member(name="dense", width=_hidden(dim), model=dense, budget=budget, achieved=budget)
    ]
    for name in names:
        if name != "dense":
            build = _build(name, match, span)

            def of(width: int, build: Build = build) -> float:
                return measure(build(dim, num_layers, width))

            if (least := of(1)) > _TOO_MUCH * budget:
                raise ValueError(
                    f"match: the smallest {name} has {least:,.0f} {match}, the dense member "
                    f"{budget:,.0f}; leave {name} out, raise dim, or match something else"
                )
            width = _nearest(of, budget, name)
            model = build(dim, num_layers, width)
            members.append(
                Member(name=name, width=width, model=model, budget=budget, achieved=measure(model))
            )
    return members


def _nearest(of: Callable[[int], float], budget: float, name: str) -> int:
    """The width whose rising measure is nearest to the budget."""
    high = 1
    while of(high) < budget:
        high *= 2
        if high > _LARGEST:
            raise ValueError(f"match: {name} does not reach the budget of {budget:,.0f}")
    low = high // 2  # below the budget, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if of(middle) < budget else (low, middle)
    return min((w for w in (low, high) if w), key=lambda w: abs(of(w) - budget))
