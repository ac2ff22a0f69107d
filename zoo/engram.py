"""Decoders with a memory of hashed n-grams (Cheng et al. 2026, arXiv 2601.07372)."""

from dataclasses import replace

from bestiary.layers.engram import Engram
from bestiary.layers.repeat import Chain, Repeat
from bestiary.zoo.decoder import Block, Decoder
from bestiary.zoo.llama import llama_tiny


def with_engram(
    model: Decoder, place: int, *, rows: int, max_n: int, num_heads: int, head_dim: int
) -> Decoder:
    """`model`, one stack of blocks, with a memory around the mixer of the block at `place`, not the
    last."""
    (stack,) = model.stacks
    block = stack.block
    assert isinstance(block, Block) and 0 < place < stack.n - 1
    memory = Engram(
        dim=model.embedding.dim,
        mixer=block.mixer,
        rows=rows,
        max_n=max_n,
        num_heads=num_heads,
        head_dim=head_dim,
    )
    parts = (
        replace(stack, n=place),
        Repeat(block=replace(block, mixer=memory), n=1),
        replace(stack, n=stack.n - place - 1),
    )
    return replace(model, blocks=Chain(layers=parts))


def engram_tiny() -> Decoder:
    """`llama_tiny` with as many parameters again in a table of the 2- to 4-grams of bytes, read in
    the second block (where the paper's first memory stands)."""
    return with_engram(llama_tiny(), 1, rows=4096, max_n=4, num_heads=2, head_dim=32)
