"""Product-key memories: PKM (Lample et al. 2019, arXiv 1907.05242), Memory+ (Berges et al. 2024,
arXiv 2412.09764) and PEER (He 2024, arXiv 2407.04153).

n^2 rows have n^2 keys, each the pair of one of n row keys and one of n column keys, so that the
best of all are found by scoring 2 n.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bestiary.layers.activations import Gelu, Silu
from bestiary.layers.base import (
    Array,
    Aux,
    Context,
    Cost,
    Layer,
    Param,
    Tree,
    layer,
    normal,
    positive,
    uniform,
    weight,
)
from bestiary.layers.linear import project
from bestiary.layers.rows import Table, dot_rows, lend, sum_rows
from bestiary.layers.sharding import dot


class Found(NamedTuple):
    """The pairs of keys that a query chose, best first: scores float32 and ids row * n + column
    int32, [..., k] each."""

    scores: Array
    ids: Array


def product_keys(rows: Array, columns: Array, k: int) -> Found:
    """The `k` largest of the n^2 sums rows[i] + columns[j], exactly: [..., n] each, k <= n."""
    n = rows.shape[-1]
    best_rows, i = top_k(rows, k)
    best_columns, j = top_k(columns, k)
    # pair (a, b) is no better than the (a + 1) (b + 1) pairs up to it: the others cannot be chosen
    a, b = np.nonzero(np.outer(np.arange(1, k + 1), np.arange(1, k + 1)) <= k)
    _, at = top_k(best_rows[..., a] + best_columns[..., b], k)
    i, j = pick(i, jnp.asarray(a)[at]), pick(j, jnp.asarray(b)[at])
    return Found(pick(rows, i) + pick(columns, j), i * n + j)


def top_k(x: Array, k: int) -> list[Array]:
    """The `k` largest entries of the last axis and where they are, without gradient."""
    # XLA would merge a slice of the result with the sort that top_k is at first, and then not
    # know it for a top-k any more: a whole sort takes 20 times as long
    return jax.lax.optimization_barrier(jax.lax.top_k(jax.lax.stop_gradient(x), k))


def pick(x: Array, index: Array) -> Array:
    """x[..., index] along the last axis, batched over the others."""
    return jnp.take_along_axis(x, index, -1, mode="promise_in_bounds")


Tables = dict[str, Table]


@layer
class MemoryTable(Layer):
    """A table of `rows` value rows, each cut in `slices`, and where `pre_dim` > 0 of pre-value
    rows: the parameters alone, a layer's own or `Decoder.shared`.

    Rows are sharded by columns (axis "memory"); TPUs want 128 of them or more on a device.
    """

    rows: int
    dim: int
    pre_dim: int = 0
    slices: int = 1
    reads: int
    """Rows that one token reads, over all layers that share the table: for the accounting."""
    std: float = 0.02

    def __post_init__(self) -> None:
        positive(rows=self.rows, dim=self.dim, slices=self.slices, reads=self.reads)
        if self.dim % self.slices:
            raise ValueError(f"dim: {self.dim}; need a multiple of slices {self.slices}")

    def spec(self) -> Tree:
        active = min(1.0, self.reads / self.rows)

        def table(slices: int, width: int) -> Param:
            shape, axes = (self.rows, slices, width), (None, None, "memory")
            return Param(shape, axes, normal(self.std), active=active, table=True)

        spec = {"values": table(self.slices, self.dim // self.slices)}
        return spec | {"pre": table(1, self.pre_dim)} if self.pre_dim else spec

    def lent(self, arrays: Tree) -> Tables:
        """The tables among `arrays`, the layer's parameters or `Context.shared`."""
        return {name: lend(arrays[name]) for name in self.spec()}


@layer
class PKM(Layer):
    """Product-key memory (Lample et al. 2019): [batch, seq, dim] -> the same.

    Per head, q = x W_q + b_q in two halves; the score of a pair of keys is K_1[i] q_1 + K_2[j] q_2;
    w = softmax over the `top_k` best pairs; y = sum over heads and pairs of w V[row]. The query has
    no batch norm, which the paper offers.

    Raises ValueError when top_k exceeds num_keys or key_dim is odd.
    """

    dim: int
    num_heads: int
    num_keys: int
    """Keys per half: the table has num_keys^2 rows."""
    key_dim: int
    """Width of a head's query, both halves together."""
    top_k: int
    query_bias: bool = True
    shared: bool = False
    """The table is `Decoder.shared`, made as `table` is; else the layer has one of its own."""

    def __post_init__(self) -> None:
        positive(dim=self.dim, num_heads=self.num_heads, key_dim=self.key_dim, top_k=self.top_k)
        if self.key_dim % 2:
            raise ValueError(f"key_dim: {self.key_dim}; need an even number, two halves")
        if self.top_k > self.num_keys:
            raise ValueError(f"top_k: {self.top_k}; need at most num_keys {self.num_keys}")

    @property
    def table(self) -> MemoryTable:
        rows, reads = self.num_keys**2, self.num_heads * self.top_k
        return MemoryTable(rows=rows, dim=self.dim, reads=reads, std=self.dim**-0.5)

    def spec(self) -> Tree:
        heads, half = (self.num_heads, 2), self.key_dim // 2
        xavier = uniform(math.sqrt(6 / (self.dim + self.num_heads * self.key_dim)))
        keys, axes = uniform(self.key_dim**-0.5), (None, None, "embed", None)
        spec: Tree = {
            "query": Param((self.dim, *heads, half), ("embed", None, None, None), xavier, inputs=1),
            "keys": Param((*heads, half, self.num_keys), axes, keys),
        }
        if self.query_bias:
            spec["query_bias"] = Param((*heads, half), (None, None, None))
        return spec if self.shared else spec | {"table": self.table}

    def cost(self, length: int) -> Cost:
        """Adds the keys, matrices per head and half; a sum of rows counts as no product."""
        flops = 2 * self.num_heads * self.key_dim * self.num_keys
        return super().cost(length) + Cost(flops, flops)

    def find(self, params: Tree, x: Array) -> Found:
        """The chosen rows with their scores before the softmax, [batch, seq, heads, top_k]."""
        q = project("bsd,dhpk->bshpk", x, params, "query")
        scores = dot("bshpk,hpkn->bshpn", q, params["keys"], dtype=jnp.float32)
        return product_keys(scores[..., 0, :], scores[..., 1, :], self.top_k)

    def read(self, params: Tree, x: Array, ctx: Context) -> tuple[Array, Aux]:
        """The memory's output, before what others add to it: [batch, seq, dim] -> the same."""
        found = self.find(params, x)
        shape = (*x.shape[:2], -1)  # the heads are summed: their entries lie side by side
        rows, weights = found.ids.reshape(shape), jax.nn.softmax(found.scores, -1).reshape(shape)
        tables = self.table.lent(ctx.shared if self.shared else params["table"])
        weights, tables = self.weigh(params, tables, x, rows, weights)
        y, values = sum_rows(tables["values"], rows, weights[..., None, None])
        aux = Aux(shared=tables | {"values": values} if self.shared else {})
        return y.reshape(x.shape).astype(x.dtype), aux

    def weigh(
        self, params: Tree, tables: Tables, x: Array, rows: Array, weights: Array
    ) -> tuple[Array, Tables]:
        """The final weights of the chosen rows, [batch, seq, heads * top_k], and the tables as the
        next reader takes them."""
        del params, x, rows
        return weights, tables

    def apply(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        return self.read(params, x, ctx)


@layer
class MemoryPlus(PKM):
    """y = (z * silu(x W_s + b_s)) W_o + b_o, z the output of `PKM` (Berges et al. 2024)."""

    bias: bool = True
    """The gate and the output have biases, which start at 0."""
    activation: Layer = Silu()

    def spec(self) -> Tree:
        square = (self.dim, self.dim)
        spec = super().spec() | {
            "gate": weight(square, ("embed", "mlp")),
            "activation": self.activation,
            "out": weight(square, ("mlp", "embed")),
        }
        if self.bias:
            spec |= {"gate_bias": Param((self.dim,), ("mlp",))}
            spec |= {"out_bias": Param((self.dim,), (None,))}
        return spec

    def apply(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        gate = project("bsd,df->bsf", x, params, "gate")
        z, aux = self.read(params, x, ctx)
        h = z * self.activation.apply(params["activation"], gate)
        return project("bsf,fd->bsd", h, params, "out"), aux


@layer
class PEER(PKM):
    """Experts of one neuron (He 2024): y = sum over heads and pairs of w gelu(u_row x) v_row, the u
    being the pre-values of the table and the v its values."""

    activation: Layer = Gelu()

    @property
    def table(self) -> MemoryTable:
        return replace(super().table, pre_dim=self.dim)

    def spec(self) -> Tree:
        return super().spec() | {"activation": self.activation}

    def cost(self, length: int) -> Cost:
        flops = 2 * self.table.reads * self.dim
        return super().cost(length) + Cost(flops, flops)

    def weigh(
        self, params: Tree, tables: Tables, x: Array, rows: Array, weights: Array
    ) -> tuple[Array, Tables]:
        wide = x.astype(jnp.float32)[:, :, None, None]
        hidden, pre = dot_rows(tables["pre"], rows, wide)
        weights *= self.activation.apply(params["activation"], hidden[..., 0, 0])
        return weights, tables | {"pre": pre}
