"""UltraMem (Huang et al. 2024, arXiv 2411.12364) and UltraMemV2 (Huang et al. 2025, arXiv
2508.18756): memories whose keys are scored by a Tucker decomposition, TDQKR.

The score of a pair of keys is not a sum but a small bilinear form of `rank` numbers per key, and
there are `slices` such forms, one for every slice of a value row.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bestiary.layers.base import (
    Array,
    Aux,
    Context,
    Cost,
    Layer,
    Param,
    Tree,
    constant,
    layer,
    normal,
    ones,
    positive,
)
from bestiary.layers.memory import MemoryTable, Tables, pick, top_k
from bestiary.layers.rows import dot_rows, sum_rows
from bestiary.layers.sharding import dot

POSITIONS = 128  # whose top_k^2 candidates exist at a time


class Side(NamedTuple):
    """The row or the column keys: scores float32 [batch, seq, heads, rank, n], merged by u or v to
    [batch, seq, heads, n], and the best of these, int32 [batch, seq, heads, top_k]."""

    scores: Array
    merged: Array
    candidates: Array


class Chosen(NamedTuple):
    """What the queries chose: scores float32 [batch, seq, heads, top_k, slices], best sum first,
    and ids row * n + column int32 [batch, seq, heads, top_k]; the sides they come from."""

    scores: Array
    ids: Array
    sides: tuple[Side, Side]


@layer
class UltraMem(Layer):
    """TDQKR with implicit value expansion: [batch, seq, dim] -> the same.

    Heads share the query and have keys and a core of their own. `expand` E > 1 makes E virtual rows
    of every row, each with a key, told apart by the group in which they are summed up: y =
    concat(groups) W_v.

    u and v, the leading singular vectors of the summed core, choose the candidates. They are state:
    each call takes them anew from the core, with the signs nearest to the last ones.

    Raises ValueError when expand is no square, top_k exceeds the keys, or the table's slices or
    rows do not fit.
    """

    dim: int
    key_dim: int
    top_k: int
    table: MemoryTable
    shared: bool = False
    """The table is `Decoder.shared`; else the layer has one of its own."""
    num_heads: int = 1
    rank: int = 2
    expand: int = 1
    balance: float = 0.0
    """Coefficient of the loss that spreads the choice of candidates over the keys."""
    core_penalty: float = 0.0
    """Coefficient of the loss that keeps the core near rank one, where the search is exact."""
    core_threshold: float = 0.15
    """Below it the core's further singular values cost nothing."""
    eps: float = 1e-5
    norm_power: float = -0.33
    """The gains of the norms of queries and keys start at key_dim to this power."""

    def __post_init__(self) -> None:
        positive(dim=self.dim, key_dim=self.key_dim, top_k=self.top_k)
        positive(num_heads=self.num_heads, rank=self.rank, expand=self.expand)
        if self.core_penalty and self.rank == 1:
            raise ValueError(f"core_penalty: {self.core_penalty}; a core of rank 1 has none")
        if math.isqrt(self.expand) ** 2 != self.expand:
            raise ValueError(f"expand: {self.expand}; need a square")
        if math.isqrt(self.window) ** 2 != self.window:
            raise ValueError(f"table.rows: {self.window}; need a square")
        if self.top_k > self.num_keys:
            raise ValueError(f"top_k: {self.top_k}; need at most {self.num_keys}, the row keys")

    @property
    def window(self) -> int:
        """Rows of the table that this layer can reach."""
        return self.table.rows

    @property
    def num_keys(self) -> int:
        return math.isqrt(self.window * self.expand)

    def spec(self) -> Tree:
        h, r, n, kd = self.num_heads, self.rank, self.num_keys, self.key_dim
        slices, width = self.table.slices, self.table.dim // self.table.slices
        draw = normal(kd**-0.5)
        gain = constant(kd**self.norm_power)
        spec: Tree = {
            "query": Param((self.dim, 2, kd), ("embed", None, None), draw, inputs=1),
            "query_norm": Param((kd,), (None,), gain),
            "keys": Param((2, kd, h, r, n), (None, "embed", None, None, None), draw),
            "key_norm": Param((kd,), (None,), gain),
            "core": Param((slices, h, r, r), (None, None, None, None), jax.random.uniform),
            "u": Param((h, r), (None, None), ones, trainable=False),
            "v": Param((h, r), (None, None), ones, trainable=False),
            "shuffle": Param(
                (n * n,),
                (None,),
                lambda key, shape, dtype: jax.random.permutation(key, shape[0]).astype(dtype),
                jnp.int32,
                trainable=False,
                active=h * self.top_k / n**2,
            ),
            "out": Param(
                (self.expand, slices, width, self.dim),
                (None, None, "memory", "embed"),
                normal((self.expand * self.table.dim) ** -0.5),
                inputs=3,
            ),
        }
        return spec if self.shared else spec | {"table": self.table}

    def cost(self, length: int) -> Cost:
        """Beside the declared matrices: keys, candidates and the scores of the chosen."""
        r, m = self.rank, self.top_k
        keys = 2 * self.key_dim * r * self.num_keys
        candidates = m * r * r + m * m * r
        flops = 2 * self.num_heads * (keys + candidates + m * self.table.slices * r * r)
        return super().cost(length) + Cost(flops, flops)

    def choose(self, params: Tree, x: Array, u: Array, v: Array) -> Chosen:
        q = dot("bsd,dpk->bspk", x, params["query"])
        q = _rms(q, params["query_norm"], -1, self.eps)
        keys = _rms(params["keys"], params["key_norm"], 1, self.eps)
        core = params["core"].astype(jnp.float32)

        def side(p: int, vector: Array) -> Side:
            s = dot("bsk,khrn->bshrn", q[:, :, p], keys[p], dtype=jnp.float32)
            merged = (s * vector[..., None]).sum(-2)
            return Side(s, merged, top_k(merged, self.top_k)[1])

        rows, columns = sides = side(0, u), side(1, v)
        row, column = (pick(s.scores, s.candidates[..., None, :]) for s in sides)
        a, b = _best_pairs(*jax.lax.stop_gradient((row, column, core.sum(0))))
        ids = pick(rows.candidates, a) * self.num_keys + pick(columns.candidates, b)
        row, column = pick(row, a[..., None, :]), pick(column, b[..., None, :])
        left = jnp.einsum("bshrm,phrq->bshmpq", row, core)
        scores = (left * column.swapaxes(-1, -2)[..., None, :]).sum(-1)
        return Chosen(scores, ids, sides)

    def apply(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        u, v = leading(jax.lax.stop_gradient(params["core"]), params["u"], params["v"])
        chosen = self.choose(params, x, u, v)
        ids = params["shuffle"][chosen.ids.reshape(*x.shape[:2], -1)]
        scores = chosen.scores.reshape(*ids.shape, -1)
        tables = self.table.lent(ctx.shared if self.shared else params["table"])
        rows, scores, tables = self.entries(params, tables, x, ids % self.window, scores, ctx)
        groups = jax.nn.one_hot(ids // self.window, self.expand, dtype=scores.dtype)
        weights = groups[..., None] * scores[..., None, :]
        y, values = sum_rows(tables["values"], rows, weights)
        y = dot("bsgpc,gpcd->bsd", y.astype(x.dtype), params["out"])

        losses = {}
        if self.balance:
            rows_loss, columns_loss = (balance(side, ctx) for side in chosen.sides)
            losses["memory_balance"] = self.balance * (rows_loss + columns_loss)
        if self.core_penalty:
            core = params["core"].astype(jnp.float32).sum(0)
            values = jnp.linalg.svd(core, compute_uv=False)
            over = jax.nn.relu(values[:, 1:] - self.core_threshold)
            losses["memory_core"] = self.core_penalty * jnp.square(over).mean()
        metrics = {"score": ctx.mean(chosen.scores.sum(-1)).mean()}
        shared = tables | {"values": values} if self.shared else {}
        return y, Aux(losses, metrics, {"u": u, "v": v}, shared)

    def entries(
        self, params: Tree, tables: Tables, x: Array, rows: Array, scores: Array, ctx: Context
    ) -> tuple[Array, Array, Tables]:
        """Where in the table the chosen rows [batch, seq, k] lie, their final scores [batch, seq,
        k, slices], and the tables as the next reader takes them."""
        del params, x, ctx
        return rows, scores, tables


@layer
class UltraMemV2(UltraMem):
    """UltraMem whose rows are experts of one neuron, in a table that all layers share as a ring.

    The scores of row i are multiplied by act((x W_p) . P_i), P the table's pre-values. Of the
    n_all rows of the table, the layer sees a window of floor(sqrt(n_all share_ratio))^2 from row
    `memory_layer` n_all / num_layers on, where `memory_layer` is a constant of the repeat.
    """

    num_layers: int = 1
    """How many layers share the table."""
    share_ratio: float = 1.0
    """Share of the table that one layer sees, rounded down to a square."""
    pre_activation: Layer | None = None
    norm_power: float = -0.4

    def __post_init__(self) -> None:
        positive(num_layers=self.num_layers, pre_dim=self.table.pre_dim)
        if not 0 < self.share_ratio <= 1:
            raise ValueError(f"share_ratio: {self.share_ratio}; need 0 < share_ratio <= 1")
        if self.table.rows % self.num_layers:
            raise ValueError(
                f"table.rows: {self.table.rows}; need a multiple of num_layers {self.num_layers}"
            )
        super().__post_init__()

    @property
    def window(self) -> int:
        return int((self.table.rows * self.share_ratio) ** 0.5) ** 2

    def spec(self) -> Tree:
        shape, axes = (self.dim, self.table.pre_dim), ("embed", "memory")
        spec = super().spec() | {"pre": Param(shape, axes, normal(self.dim**-0.5), inputs=1)}
        if self.pre_activation is not None:
            spec["pre_activation"] = self.pre_activation
        return spec

    def cost(self, length: int) -> Cost:
        flops = 2 * self.num_heads * self.top_k * self.table.pre_dim
        return super().cost(length) + Cost(flops, flops)

    def entries(
        self, params: Tree, tables: Tables, x: Array, rows: Array, scores: Array, ctx: Context
    ) -> tuple[Array, Array, Tables]:
        index = jnp.asarray(ctx.layer.get("memory_layer", 0), jnp.int32)
        rows = (rows + index * (self.table.rows // self.num_layers)) % self.table.rows
        z = dot("bsd,de->bse", x, params["pre"], dtype=jnp.float32)
        hidden, pre = dot_rows(tables["pre"], rows, z[:, :, None, None])
        hidden = hidden[..., 0]
        if self.pre_activation is not None:
            hidden = self.pre_activation.apply(params["pre_activation"], hidden)
        return rows, scores * hidden, tables | {"pre": pre}


def leading(core: Array, u: Array, v: Array) -> tuple[Array, Array]:
    """Leading singular vectors of sum_p C_p, float32 [heads, rank] each, with the common sign that
    is nearer (L1) to the last `u` and `v`: the core [slices, heads, rank, rank] drifts, and a flip
    would make the search look at the other end of the scores."""
    left, _, right = jnp.linalg.svd(core.astype(jnp.float32).sum(0))
    left, right = left[..., 0], right[..., 0, :]

    def distance(sign: float) -> Array:
        parts = jnp.abs(sign * left - u) + jnp.abs(sign * right - v)
        return parts.sum(-1, keepdims=True)

    sign = jnp.where(distance(-1) < distance(1), -1.0, 1.0)
    return sign * left, sign * right


def table_std(
    *, hidden: int, entries: int, score_std: float, pre_dim: int, value_dim: int, num_layers: int
) -> float:
    """Standard deviation of a table's initial values and pre-values (UltraMemV2, equations 22-26).

    With matrices of std sqrt(2 / (5 dim)) and scores of mean 1 and std `score_std`, a memory that
    sums `entries` rows then starts as large as a feed-forward of `hidden` gated units whose output
    is scaled by 1 / sqrt(2 num_layers).
    """
    rows = entries * (1 + score_std**2) * pre_dim * value_dim
    return (0.2 * hidden / (rows * num_layers)) ** 0.25  # printed: without a root over the variance


def balance(side: Side, ctx: Context) -> Array:
    """n sum_i p_i f_i: p the mean softmax of the merged scores, f the share of the candidates that
    key i is."""
    n = side.merged.shape[-1]
    p = ctx.mean(jax.nn.softmax(side.merged, -1)).mean(0)
    real = ctx.without_padding(jnp.ones(side.candidates.shape))
    f = jnp.zeros(n).at[side.candidates].add(real)
    return n * (p * f).sum() / jnp.maximum(f.sum(), 1)


def _best_pairs(row: Array, column: Array, core: Array) -> tuple[Array, Array]:
    """Which of the m x m pairs have the best m scores row_a^T core column_b: int32 a and b [batch,
    seq, heads, m], from [batch, seq, heads, rank, m] and [heads, rank, rank]."""
    m = row.shape[-1]

    def position(xs: tuple[Array, Array]) -> Array:
        row, column = xs  # [batch, heads, rank, m]
        left = jnp.einsum("bhrm,hrq->bhmq", row, core)
        pairs = jnp.einsum("bhmq,bhqn->bhmn", left, column)
        return top_k(pairs.reshape(*pairs.shape[:2], -1), m)[1]

    xs = row.swapaxes(0, 1), column.swapaxes(0, 1)
    best = jax.lax.map(position, xs, batch_size=POSITIONS).swapaxes(0, 1)
    return best // m, best % m


def _rms(x: Array, gain: Array, axis: int, eps: float) -> Array:
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(axis, keepdims=True) + eps)
    shape = [1] * x.ndim
    shape[axis] = -1
    return (y * gain.astype(jnp.float32).reshape(shape)).astype(x.dtype)
