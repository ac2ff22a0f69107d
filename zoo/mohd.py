"""MoHD (Chen et al. 2024, arXiv 2412.05644): decoders of the Llama type that use a part of their
hidden dimensions per token.

The paper gives total sizes, compressions of 50 % and 75 %, and expansions of 2 to 4 times; 16 parts
with three quarters of the active ones shared were best. Its depths and widths are not known: those
here give the totals.
"""

from dataclasses import replace

from bestiary.layers.mohd import MoHDFFN, MoHDResidual, SubDimensions
from bestiary.layers.repeat import Repeat
from bestiary.zoo.decoder import Block, Decoder
from bestiary.zoo.llama import byte_llama, llama, multi_head, swiglu


def sub_dimensions(dim: int, share: float = 0.5) -> SubDimensions:
    """The paper's best gate over 16 parts at `share` active: three quarters of these are shared."""
    num = 16
    active = round(share * num)
    num_shared = round(0.75 * active)
    return SubDimensions(dim=dim, num=num, num_shared=num_shared, top_k=active - num_shared)


def residual(model: Decoder, share: float = 0.5) -> Decoder:
    """`model` whose sub-layers read `share` of the residual stream and write all of it."""
    gate = sub_dimensions(model.embedding.dim, share)

    def wrapped(stack: Repeat) -> Repeat:
        block = stack.block
        if not isinstance(block, Block) or block.ffn is None:
            raise ValueError(f"blocks: {type(block).__name__}; need blocks of mixer and ffn")
        mixer = MoHDResidual(gate=gate, inner=block.mixer)
        ffn = MoHDResidual(gate=gate, inner=block.ffn)
        return replace(stack, block=replace(block, mixer=mixer, ffn=ffn))

    return model.map_stacks(wrapped)


def mohd_tiny() -> Decoder:
    """`llama_tiny` with feed-forwards of equal parameters, half of whose parts are used."""
    gate = sub_dimensions(128)
    return byte_llama(4, 128, MoHDFFN(gate=gate, hidden=432))


def mohd_residual_tiny() -> Decoder:
    """`llama_tiny` with sub-layers that read half of the residual stream."""
    return residual(byte_llama(4, 128))


def mohd_355m() -> Decoder:
    """355M parameters, half of the stream read (depth and widths unconfirmed)."""
    return _mohd(1024, 24, 16, 2560)


def mohd_495m() -> Decoder:
    """495M parameters, half of the stream read (depth and widths unconfirmed)."""
    return _mohd(1280, 22, 20, 3200)


def mohd_1b() -> Decoder:
    """1.13B parameters, half of the stream read (depth and widths unconfirmed)."""
    return _mohd(2048, 20, 16, 5376)


def _mohd(dim: int, num_layers: int, num_heads: int, hidden: int) -> Decoder:
    return residual(
        llama(
            vocab_size=32000,
            num_layers=num_layers,
            attention=multi_head(dim, num_heads),
            ffn=swiglu(dim, hidden),
        )
    )
