"""Kolmogorov-Arnold networks, with nodes that multiply, and as feed-forwards of a decoder."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from bestiary.layers.activations import Silu
from bestiary.layers.base import Array, Aux, Context, Layer, Param, Tree, layer, ones, positive
from bestiary.layers.feedforward import HIDDEN
from bestiary.layers.kan import KAN, Scale
from bestiary.layers.kan_basis import Basis
from bestiary.layers.kan_grid import refine, update_grid
from bestiary.layers.sharding import shard


@layer
class KANNet(Layer):
    """KAN layers one after the other (Liu et al. 2024, arXiv 2404.19756), with multiplying nodes
    (KAN 2.0, arXiv 2408.10205): [..., first of dims] -> [..., last of dims].

    An entry of `dims` is a number of nodes that add, or a pair (adding, multiplying). A multiplying
    node is the product of `arity` sub-nodes, which add as others do. With `affine`, sub-nodes and
    then nodes are scaled and shifted by trained factors (pykan keeps these frozen at 1 and 0 unless
    told to train them). The other fields are those of `KAN`.

    Raises ValueError for fewer than two entries, a width below 1, or an arity below 2.
    """

    dims: tuple[int | tuple[int, int], ...]
    basis: Basis
    base: Layer | None = Silu()
    scale: Scale = "none"
    mask: bool = False
    bias: bool = False
    arity: int = 2
    affine: bool = False

    def __post_init__(self) -> None:
        if len(self.dims) < 2:
            raise ValueError(f"dims: {self.dims}; need inputs and outputs at least")
        if self.arity < 2:
            raise ValueError(f"arity: {self.arity}; need at least 2")
        for adding, multiplying in self.nodes:
            if min(adding, multiplying) < 0 or adding + multiplying < 1:
                raise ValueError(
                    f"dims: {self.dims}; need at least one node each, and none below 0"
                )

    @property
    def nodes(self) -> tuple[tuple[int, int], ...]:
        """(adding, multiplying) of every entry of dims."""
        return tuple((d, 0) if isinstance(d, int) else d for d in self.dims)

    @property
    def layers(self) -> tuple[KAN, ...]:
        last = len(self.dims) - 2
        return tuple(
            KAN(
                inputs=sum(self.nodes[i]),
                outputs=self.nodes[i + 1][0] + self.arity * self.nodes[i + 1][1],
                basis=self.basis,
                base=self.base,
                scale=self.scale,
                mask=self.mask,
                bias=self.bias,
                # by turns, as in an MLP; inputs and outputs of the whole are not split
                axes=(
                    "mlp" if i % 2 else None,
                    None if i % 2 or i == last else "mlp",
                ),
            )
            for i in range(last + 1)
        )

    def spec(self) -> Tree:
        spec: Tree = {str(i): kan for i, kan in enumerate(self.layers)}
        if self.affine:
            for i, (adding, multiplying) in enumerate(self.nodes[1:]):
                subnodes = Param((adding + self.arity * multiplying,), (None,), ones)
                nodes = Param((adding + multiplying,), (None,), ones)
                spec[f"affine_{i}"] = {
                    "subnode_scale": subnodes,
                    "subnode_bias": Param(subnodes.shape, (None,)),
                    "node_scale": nodes,
                    "node_bias": Param(nodes.shape, (None,)),
                }
        return spec

    def connect(self, params: Tree, i: int, y: Array) -> Array:
        """The nodes behind layer i, from what it puts out."""
        adding, multiplying = self.nodes[i + 1]
        affine = params.get(f"affine_{i}", {})

        def scaled(kind: str, y: Array) -> Array:
            if not self.affine:
                return y
            return y * affine[f"{kind}_scale"].astype(y.dtype) + affine[f"{kind}_bias"].astype(
                y.dtype
            )

        y = scaled("subnode", y)
        if multiplying:
            factors = y[..., adding:].reshape(*y.shape[:-1], multiplying, self.arity)
            y = jnp.concatenate([y[..., :adding], factors.prod(-1)], -1)
        return scaled("node", y)

    def trace(self, params: Tree, x: Array) -> tuple[Array, ...]:
        """The inputs of every layer, and the output: what grids are moved by and edges shown on."""
        values = [x]
        for i, kan in enumerate(self.layers):
            values.append(self.connect(params, i, kan.apply(params[str(i)], values[-1])))
        return tuple(values)

    def apply(self, params: Tree, x: Array) -> Array:
        return self.trace(params, x)[-1]


def update_grids(net: KANNet, params: Tree, x: Array, **options: Any) -> Tree:
    """`update_grid` with its options for one layer after the other, each at what the layers before
    it now make of the samples x [..., inputs]."""
    for i, kan in enumerate(net.layers):
        new = update_grid(kan, params[str(i)], x, **options)
        params = params | {str(i): new}
        x = net.connect(params, i, kan.apply(new, x))
    return params


def refine_grids(net: KANNet, params: Tree, num_intervals: int) -> tuple[KANNet, Tree]:
    """`refine` for all layers."""
    basis = net.basis
    for i, kan in enumerate(net.layers):
        finer, new = refine(kan, params[str(i)], num_intervals)
        params, basis = params | {str(i): new}, finer.basis
    return replace(net, basis=basis), params


@layer
class KANFFN(Layer):
    """Two KAN layers, dim -> hidden -> dim, as the feed-forward of a block: [batch, seq, dim] ->
    the same. The share of inputs outside of the grid is the metric "outside" of either."""

    dim: int
    hidden: int
    basis: Basis
    base: Layer | None = Silu()
    scale: Scale = "none"
    bias: bool = False

    def __post_init__(self) -> None:
        positive(dim=self.dim, hidden=self.hidden)

    @property
    def up(self) -> KAN:
        return KAN(
            inputs=self.dim,
            outputs=self.hidden,
            basis=self.basis,
            base=self.base,
            scale=self.scale,
            bias=self.bias,
        )

    @property
    def down(self) -> KAN:
        return replace(self.up, inputs=self.hidden, outputs=self.dim, axes=("mlp", "embed"))

    def spec(self) -> Tree:
        return {"up": self.up, "down": self.down}

    def apply(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        h = shard(self.up.apply(params["up"], x), *HIDDEN)
        y = self.down.apply(params["down"], h)

        def report(kan: KAN, params: Tree, x: Array) -> Aux:
            return Aux(metrics={"outside": ctx.mean(kan.outside_grid(params, x)).mean()})

        up, down = report(self.up, params["up"], x), report(self.down, params["down"], h)
        return y, Aux.join(up=up, down=down)
