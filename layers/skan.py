"""S-KAN and S-ConvKAN (Yang et al. 2024, arXiv 2408.08338): nodes choose their basis from a pool.

Three phases: all parameters train; then only the selection weights, with an entropy term that makes
up their mind; then each node keeps the basis it prefers (`skan_select.select`), and what is left is
trained on. The paper's formula of the selection could not be confirmed, and its code was not
released: the formula here is this library's own.
"""

import math
from dataclasses import replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from bestiary.layers.activations import Silu
from bestiary.layers.base import (
    Array,
    Aux,
    Context,
    Layer,
    Param,
    Tree,
    is_param,
    layer,
    ones,
    positive,
    zeros,
)
from bestiary.layers.feedforward import HIDDEN, check_back
from bestiary.layers.kan import KAN
from bestiary.layers.kan_basis import Basis, EdgeAxes
from bestiary.layers.kan_conv import KANConv
from bestiary.layers.sharding import shard

Weighting = Literal["softmax", "linear"]
Granularity = Literal["node", "layer", "edge"]
Phase = Literal[1, 2, 3]

TINY = jnp.finfo(jnp.float32).tiny


@layer
class Selection(Layer):
    """The share pi of each of `size` alternatives: float32 [*shape, size], from weights w of that
    shape, which start equal.

    softmax: pi = softmax(w / temperature). linear: pi = w / sum |w|, with signs.

    Raises ValueError for fewer than two alternatives, an unknown weighting, or a temperature that
    is not positive.
    """

    size: int
    shape: tuple[int, ...] = ()
    axes: tuple[str | None, ...] = ()
    weighting: Weighting = "softmax"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError(f"pool: {self.size}; need at least 2 bases to select from")
        if self.weighting not in get_args(Weighting):
            known = ", ".join(get_args(Weighting))
            raise ValueError(f"weighting: {self.weighting!r}; need one of {known}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature}; need more than 0")

    def spec(self) -> Tree:
        start = zeros if self.weighting == "softmax" else ones
        shape, axes = (*self.shape, self.size), (*self.axes, None)
        return {"weight": Param(shape, axes, start, decay=False)}

    def shares(self, params: Tree) -> Array:
        w = params["weight"].astype(jnp.float32)
        if self.weighting == "softmax":
            return jax.nn.softmax(w / self.temperature, -1)
        return w / jnp.maximum(jnp.abs(w).sum(-1, keepdims=True), TINY)

    def entropy(self, params: Tree) -> Array:
        """sum -|pi| log |pi|, in nats, over everything that selects: float32 scalar."""
        share = jnp.abs(self.shares(params))
        return -(share * jnp.log(jnp.maximum(share, TINY))).sum()

    def undecided(self, params: Tree) -> Array:
        """The entropy as a share of that of equal weights, 1 at first: float32 scalar."""
        return self.entropy(params) / (math.prod(self.shape) * math.log(self.size))


@layer
class Selectable(Layer):
    """A layer for every basis of the pool, summed with the shares of a `Selection`.

    Shares multiply the curves in their bases, each with the norm of its own basis; the base branch
    and the bias are common to all and not selected. A subclass says by `member` which layers these
    are; one selection decides for all of them unless it says otherwise.
    """

    pool: tuple[Basis, ...]
    base: Layer | None = Silu()
    bias: bool = False
    weighting: Weighting = "softmax"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _ = self.selection  # which refuses what cannot select

    @property
    def selection(self) -> Selection:
        return Selection(
            size=len(self.pool), weighting=self.weighting, temperature=self.temperature
        )

    def member(self, p: int) -> KAN | KANConv:
        """The layer that is left when everything selects basis p."""
        raise NotImplementedError

    def factor(self, share: Array) -> Array:
        """The shares of one basis, so that they multiply the member's weight."""
        return share

    def spec(self) -> Tree:
        spec: Tree = {"selection": self.selection}
        for p in range(len(self.pool)):
            common = self.member(p).spec()
            spec[str(p)] = {name: common.pop(name) for name in ("basis", "weight")}
            spec |= common
        return spec

    def parameters(self, params: Tree, p: int, share: Array) -> Tree:
        """Those of member p, its curves multiplied by their shares [...]."""
        own = {name: params[name] for name in ("activation", "base", "bias") if name in params}
        weight = params[str(p)]["weight"] * self.factor(share)
        return own | params[str(p)] | {"weight": weight}

    def apply(self, params: Tree, x: Array) -> Array:
        share = self.selection.shares(params["selection"])
        parts = []
        for p in range(len(self.pool)):
            member = self.member(p)
            if p:  # what is common to all is in the first
                member = replace(member, base=None, bias=False)
            parts.append(member.apply(self.parameters(params, p, share[..., p]), x))
        return sum(parts[1:], parts[0])


@layer
class SKAN(Selectable):
    """y_o = sum_i (b_io act(x_i) + sum_p pi_ip phi^p_io(x_i)) + c_o: [..., inputs] ->
    [..., outputs] in the type of x.

    phi^p are the curves of a `KAN` in basis p of the pool, and pi is selected by every input node
    (the paper), by the layer (pi_p), or by every edge (pi_iop).

    Raises ValueError for a width below 1, an unknown granularity, and, unless the whole layer
    selects, for a basis whose functions depend on the number that an input has.
    """

    inputs: int
    outputs: int
    granularity: Granularity = "node"
    axes: EdgeAxes = ("embed", "mlp")
    """Logical names of the inputs and of the outputs."""

    def __post_init__(self) -> None:
        positive(inputs=self.inputs, outputs=self.outputs)
        if self.granularity not in get_args(Granularity):
            known = ", ".join(get_args(Granularity))
            raise ValueError(f"granularity: {self.granularity!r}; need one of {known}")
        super().__post_init__()
        for basis in self.pool if self.granularity != "layer" else ():
            if (reason := basis.why_numbered()) is not None:
                raise ValueError(f"pool: {type(basis).__name__} with {reason} in nodes")

    @property
    def selection(self) -> Selection:
        ndim = {"layer": 0, "node": 1, "edge": 2}[self.granularity]
        shape, axes = (self.inputs, self.outputs)[:ndim], self.axes[:ndim]
        return replace(super().selection, shape=shape, axes=axes)

    def member(self, p: int) -> KAN:
        return KAN(
            inputs=self.inputs,
            outputs=self.outputs,
            basis=self.pool[p],
            base=self.base,
            bias=self.bias,
            axes=self.axes,
        )

    def factor(self, share: Array) -> Array:
        return share[:, None] if self.granularity == "node" else share


@layer
class SConvKAN(Selectable):
    """The same with `KANConv`, [..., height, width, inputs] -> [..., height', width', outputs]; the
    whole layer selects one basis."""

    inputs: int
    outputs: int
    kernel: int = 3
    stride: int = 1
    padding: int = 0

    def member(self, p: int) -> KANConv:
        return KANConv(
            inputs=self.inputs,
            outputs=self.outputs,
            basis=self.pool[p],
            base=self.base,
            kernel=self.kernel,
            stride=self.stride,
            padding=self.padding,
            bias=self.bias,
        )


@layer
class SKANFFN(Layer):
    """Two S-KANs as a feed-forward, or what is selected of them: [batch, seq, dim] -> the same.

    While they select, the loss "selection" is `entropy` times the entropy of both selections, and
    the metric "undecided" of either goes from 1 to 0.

    Raises ValueError unless the layers lead there and back, and for an entropy below 0.
    """

    up: Layer
    """[..., dim] -> [..., hidden], with axes ("embed", "mlp")."""
    down: Layer
    """[..., hidden] -> [..., dim], with axes ("mlp", "embed")."""
    entropy: float = 0.0
    """Phase 2: 0.1 or more, with weights that move by 0.1 a step; 0.003 leaves nodes undecided."""

    def __post_init__(self) -> None:
        check_back(self.up, self.down)
        if self.entropy < 0:
            raise ValueError(f"entropy: {self.entropy}; need 0 or more")

    @property
    def dim(self) -> int:
        return self.up.inputs  # type: ignore[attr-defined]

    def spec(self) -> Tree:
        return {"up": self.up, "down": self.down}

    def apply(self, params: Tree, x: Array, ctx: Context = Context()) -> tuple[Array, Aux]:
        del ctx
        h = shard(self.up.apply(params["up"], x), *HIDDEN)
        y = self.down.apply(params["down"], h)
        return y, Aux.join(
            up=self.report(self.up, params["up"]), down=self.report(self.down, params["down"])
        )

    def report(self, layer: Layer, params: Tree) -> Aux:
        if not isinstance(layer, Selectable):
            return Aux()
        selection, own = layer.selection, params["selection"]
        losses = {"selection": self.entropy * selection.entropy(own)} if self.entropy else {}
        return Aux(losses, {"undecided": selection.undecided(own)})


def trains(layer: Layer, phase: Phase) -> Tree:
    """Which parameters of a layer or of a whole model train in a phase: a tree of bools, as
    `optax.partition` takes labels.

    1: all; 2: the selection weights; 3: all, of what `select` left. Raises ValueError for another
    phase, and for phase 3 while anything selects.
    """
    if phase not in get_args(Phase):
        raise ValueError(f"phase: {phase!r}; need 1, 2 or 3")

    def one(path: tuple[Any, ...], param: Param) -> bool:
        selects = any(part.key == "selection" for part in path)
        if phase == 3 and selects:
            raise ValueError(
                f"phase: 3; need a selected layer, and {jax.tree_util.keystr(path)} still selects"
            )
        return param.trainable and (selects or phase != 2)

    return jax.tree_util.tree_map_with_path(one, layer.declare(), is_leaf=is_param)
