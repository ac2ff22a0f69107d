"""UltraMemV2 (Huang et al. 2025, arXiv 2508.18756) and the memory models it is compared with:
decoders some of whose blocks have a memory beside the feed-forward, on the same normed input.

Widths are those of the released scripts.
"""

from dataclasses import replace

from bestiary.layers.base import Layer
from bestiary.layers.feedforward import GLU, Parallel
from bestiary.layers.memory import MemoryPlus, MemoryTable
from bestiary.layers.repeat import Chain, Repeat
from bestiary.layers.ultramem import UltraMem, UltraMemV2, table_std
from bestiary.zoo.decoder import Block, Decoder
from bestiary.zoo.llama import byte_llama, swiglu
from bestiary.zoo.mixtures import olmoe


def with_memory(model: Decoder, memory: UltraMemV2) -> Decoder:
    """`model` with `memory` beside the feed-forward of every block, and its table shared by all."""
    (stack,) = model.stacks
    block = stack.block
    assert isinstance(block, Block) and block.ffn is not None
    ffn = Parallel(layers=(block.ffn, memory))
    place = ("memory_layer", tuple(map(float, range(stack.n))))
    blocks = replace(stack, block=replace(block, ffn=ffn), constants=(*stack.constants, place))
    return replace(model, blocks=blocks, shared=memory.table)


def with_paper_init(model: Decoder, score_std: float) -> Decoder:
    """`model`, from `with_memory`, with the paper's initial values in the place of the released
    script's: sqrt(2 / (5 dim)) for matrices, `table_std` for the table.

    `score_std` is that of the chosen scores. Their mean (metric `score`, over the slices) should be
    about 1, which `UltraMemV2.norm_power` sets: they grow by key_dim^(2 norm_power).
    """
    (stack,) = model.stacks
    block = stack.block
    assert isinstance(block, Block) and isinstance(block.ffn, Parallel)
    ffn, memory = block.ffn.layers
    assert isinstance(ffn, GLU) and isinstance(memory, UltraMemV2)
    std = table_std(
        hidden=ffn.hidden,
        entries=memory.num_heads * memory.top_k,
        score_std=score_std,
        pre_dim=memory.table.pre_dim,
        value_dim=memory.table.dim,
        num_layers=stack.n,
    )
    table = replace(memory.table, std=std)
    ffn = replace(block.ffn, layers=(ffn, replace(memory, table=table)))
    blocks = replace(stack, block=replace(block, ffn=ffn))
    return replace(model, blocks=blocks, shared=table, std=(2 / (5 * memory.dim)) ** 0.5)


def with_four_memories(model: Decoder, memory: Layer, first: int) -> Decoder:
    """`model` with `memory` beside the feed-forward of every fourth block from `first` on, four in
    all."""
    (stack,) = model.stacks
    block = stack.block
    assert isinstance(block, Block) and block.ffn is not None
    beside = replace(block, ffn=Parallel(layers=(block.ffn, memory)))
    groups = Repeat(block=Chain(layers=(beside, block, block, block)), n=4)
    blocks = (Repeat(block=block, n=first), groups)
    if left := stack.n - first - 16:
        blocks += (Repeat(block=block, n=left),)
    return replace(model, blocks=Chain(layers=blocks))


def olmo(*, num_layers: int, dim: int, num_heads: int, hidden: int, tied: bool) -> Decoder:
    """The dense decoder that the memories are added to: OLMoE's with a SwiGLU."""
    model = olmoe(num_layers, dim, num_heads, swiglu(dim, hidden))
    # memories have initial values of their own, which one std for all matrices would replace
    return replace(model, std=None, head=None if tied else model.head)


def memoryplus_227m() -> Decoder:
    """Memory+ with one table for its four memories, in blocks 4, 8, 12, 16 of 20 (as released)."""
    memory = MemoryPlus(dim=768, num_heads=2, num_keys=1138, key_dim=768, top_k=80, shared=True)
    model = olmo(num_layers=20, dim=768, num_heads=12, hidden=3008, tied=True)
    table = replace(memory.table, reads=4 * memory.table.reads)
    return replace(with_four_memories(model, memory, 4), shared=table)


def ultramem_227m() -> Decoder:
    """UltraMem with four memories, which read in blocks 2, 6, 10, 14 of 20 and answer there (in the
    released script, three blocks later)."""
    table = MemoryTable(rows=808**2, dim=384, slices=2, reads=2 * 80)
    memory = UltraMem(dim=768, key_dim=192, top_k=80, num_heads=2, expand=4, table=table)
    model = olmo(num_layers=20, dim=768, num_heads=12, hidden=2752, tied=True)
    return with_four_memories(model, memory, 2)


def ultramemv2_227m() -> Decoder:
    """UltraMemV2 with a memory in every of 20 blocks.

    Trained on 500B tokens in batches of 768 x 4096, the first 10B of warm-up.
    """
    return with_memory(
        olmo(num_layers=20, dim=768, num_heads=12, hidden=2496, tied=True),
        memory(num_layers=20, dim=768, knum=360, key_dim=192, top_k=32, value_dim=192, pre_dim=192),
    )


def ultramemv2_1b7b() -> Decoder:
    """UltraMemV2 beside OLMoE-1B-7B. The width of the feed-forward is not published: this one gives
    the published active parameters."""
    return with_memory(
        olmo(num_layers=16, dim=2048, num_heads=16, hidden=7040, tied=False),
        memory(
            num_layers=16, dim=2048, knum=528, key_dim=512, top_k=128, value_dim=768, pre_dim=384
        ),
    )


def ultramemv2_tiny() -> Decoder:
    """`llama_tiny` with half of its feed-forward's FLOPs spent on memories, for experiments."""
    return with_memory(
        byte_llama(4, 128, swiglu(128, 176)),
        memory(num_layers=4, dim=128, knum=64, key_dim=64, top_k=8, value_dim=96, pre_dim=32),
    )


def memory(
    *,
    num_layers: int,
    dim: int,
    knum: int,
    key_dim: int,
    top_k: int,
    value_dim: int,
    pre_dim: int,
) -> UltraMemV2:
    """A memory whose table has knum^2 rows for each of `num_layers` layers, half of all in sight of
    one."""
    table = MemoryTable(
        rows=num_layers * knum**2,
        dim=value_dim,
        pre_dim=pre_dim,
        slices=2,
        reads=num_layers * top_k,
    )
    return UltraMemV2(
        dim=dim,
        key_dim=key_dim,
        top_k=top_k,
        num_layers=num_layers,
        share_ratio=0.5,
        shared=True,
        table=table,
    )
