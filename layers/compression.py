"""How NSA makes one key, or value, of a block of them (Yuan et al. 2025, arXiv 2502.11089)."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from bestiary.layers.base import Array, Cost, Layer, Param, Tree, layer, normal, positive, weight
from bestiary.layers.sharding import dot


class Compression(Layer):
    """Makes one key (or value) of the `length` in a block, which begin at every `stride`-th
    place."""

    def span(self, block_size: int) -> tuple[int, int]:
        """(length, stride), given the size of the blocks that are chosen."""
        raise NotImplementedError

    def compress(self, params: Tree, blocks: Array) -> Array:
        """[batch, C, length, kv_heads, head] -> [batch, C, kv_heads, head]."""
        raise NotImplementedError

    def flops(self) -> float:
        """Matmul FLOPs for one block of one head."""
        return 0


@layer
class MeanPool(Compression):
    """The mean of every block that can be chosen, as in fla's code."""

    def span(self, block_size: int) -> tuple[int, int]:
        return block_size, block_size

    def compress(self, params: Tree, blocks: Array) -> Array:
        return blocks.mean(2, dtype=jnp.float32).astype(blocks.dtype)


@layer
class LearnedMLP(Compression):
    """gelu((block + position) W_1) W_2 of overlapping blocks, as in the paper, shared by the heads.

    The activation and the hidden width are this library's choice.
    """

    head_dim: int
    hidden: int
    length: int = 32
    stride: int = 16

    def __post_init__(self) -> None:
        positive(head_dim=self.head_dim, hidden=self.hidden, length=self.length, stride=self.stride)
        if self.length % self.stride:
            raise ValueError(f"stride: {self.stride} does not divide length {self.length}")

    def spec(self) -> Tree:
        block = (self.length, self.head_dim)
        return {
            "position": Param(block, (None, "head"), normal(0.02)),
            "up": weight((*block, self.hidden), (None, "head", "mlp"), inputs=2),
            "down": weight((self.hidden, self.head_dim), ("mlp", "head")),
        }

    def cost(self, length: int) -> Cost:
        """The parameters; they meet blocks and heads, not tokens, which `NSA` counts."""
        return replace(super().cost(length), flops=0, active_flops=0)

    def flops(self) -> float:
        return 2 * self.hidden * self.head_dim * (self.length + 1)

    def span(self, block_size: int) -> tuple[int, int]:
        if block_size % self.stride:
            raise ValueError(f"stride: {self.stride} does not divide block_size {block_size}")
        return self.length, self.stride

    def compress(self, params: Tree, blocks: Array) -> Array:
        blocks += params["position"].astype(blocks.dtype)[:, None]
        hidden = jax.nn.gelu(dot("bclkh,lhf->bckf", blocks, params["up"]))
        return dot("bckf,fh->bckh", hidden, params["down"])
