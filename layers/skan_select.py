"""The third phase of an S-KAN (see `skan`): what is left of it when every node has selected."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from bestiary.layers.activations import Silu
from bestiary.layers.base import Array, Layer, Param, Tree, expand, is_param, layer, positive
from bestiary.layers.kan import KAN
from bestiary.layers.kan_basis import Basis, EdgeAxes
from bestiary.layers.norms import LayerNorm
from bestiary.layers.repeat import Chain, Repeat
from bestiary.layers.sharding import dot
from bestiary.layers.skan import SKAN, Selectable

Groups = tuple[tuple[Basis, tuple[int, ...]], ...]


@layer
class PrunedSKAN(Layer):
    """A KAN whose inputs have different bases: [..., inputs] -> [..., outputs] in the type of x.

    Inputs are grouped by basis, and each group is one product. The layer norm of a basis stays
    whole, since its statistics are those of all inputs.

    Raises ValueError for a width below 1, and unless every input is in one group, or, with `mask`,
    in at least one.
    """

    inputs: int
    outputs: int
    groups: Groups
    """Bases, each with the numbers of the inputs that have it."""
    base: Layer | None = Silu()
    bias: bool = False
    mask: bool = False
    """Single edges have selected: in each group those are masked that have another basis."""
    axes: EdgeAxes = ("embed", "mlp")

    def __post_init__(self) -> None:
        positive(inputs=self.inputs, outputs=self.outputs)
        members = [i for _, where in self.groups for i in where]
        if sorted(set(members) if self.mask else members) != list(range(self.inputs)):
            times = "at least once" if self.mask else "once"
            raise ValueError(f"groups: {members}; need every input below {self.inputs} {times}")

    def kan(self, basis: Basis, where: tuple[int, ...]) -> KAN:
        """The curves of a group. Its inputs are too few to be split over devices evenly."""
        return KAN(
            inputs=len(where),
            outputs=self.outputs,
            basis=replace(basis, norm=False),
            base=None,
            mask=self.mask,
            axes=(None, self.axes[1]),
        )

    def spec(self) -> Tree:
        whole = KAN(
            inputs=self.inputs,
            outputs=self.outputs,
            basis=self.groups[0][0],
            base=self.base,
            bias=self.bias,
            axes=self.axes,
        )
        names = {"activation", "base", "bias"}
        spec = {name: part for name, part in whole.spec().items() if name in names}
        for g, (basis, where) in enumerate(self.groups):
            norm = {"norm": LayerNorm(dim=self.inputs)} if basis.norm else {}
            spec[str(g)] = norm | self.kan(basis, where).spec()
        return spec

    def apply(self, params: Tree, x: Array) -> Array:
        parts = []
        for g, (basis, where) in enumerate(self.groups):
            own, z = params[str(g)], x
            if basis.norm:
                z = LayerNorm(dim=self.inputs).apply(own["norm"], x)
            parts.append(self.kan(basis, where).apply(own, take_inputs(z, where, -1)))
        if self.base is not None:
            act = self.base.apply(params["activation"], x)
            parts.append(dot("...i,io->...o", act, params["base"]))
        y = sum(parts[1:], parts[0])
        return y + params["bias"].astype(y.dtype) if self.bias else y


def take_inputs(x: Array, where: tuple[int, ...], axis: int) -> Array:
    return jnp.take(
        x, np.array(where), axis, mode="clip", unique_indices=True, indices_are_sorted=True
    )


def select(layer: Layer, params: Tree) -> tuple[Layer, Tree]:
    """The layer, or whatever holds it up to a whole model, in which only the basis with the largest
    share is left, and its parameters.

    Left is a `PrunedSKAN` where nodes or edges selected, and a `KAN` or `KANConv` where the layer
    did. It equals the layer with shares of 1 and 0 (or -1, where linear weights are negative). A
    `Repeat` whose copies chose alike stays one; else it becomes a `Chain` of one `Repeat` for each,
    since what is left of them has other shapes.

    The choice becomes part of the layer, so that this cannot be traced. Raises ValueError for a
    layer in which nothing selects.
    """
    left, kept = _selected(layer, params)
    if left == layer:
        raise ValueError(f"layer: {type(layer).__name__}; need SKAN or SConvKAN, or what holds one")
    return left, kept


def _selected(layer: Layer, params: Tree) -> tuple[Layer, Tree]:
    if isinstance(layer, Selectable):
        return _best(layer, params)
    if isinstance(layer, Repeat):
        return _each(layer, params)
    if isinstance(layer, Chain):
        parts: list[tuple[Layer, Tree]] = []
        for i, member in enumerate(layer.layers):
            left, kept = _selected(member, params[str(i)])
            if isinstance(member, Repeat) and isinstance(left, Chain):
                parts += [(m, kept[str(j)]) for j, m in enumerate(left.layers)]
            else:
                parts.append((left, kept))
        return _chain(parts)
    spec, fields = layer.spec(), {}
    for name in spec:
        part = getattr(layer, name, None)
        if isinstance(part, Layer) and part == spec[name]:
            fields[name], own = _selected(part, params[name])
            params = params | {name: own}
    return replace(layer, **fields) if fields else layer, params  # type: ignore[type-var]


def _each(layer: Repeat, params: Tree) -> tuple[Layer, Tree]:
    parts = [
        _selected(layer.block, jax.tree.map(lambda w, i=i: w[i], params)) for i in range(layer.n)
    ]
    blocks = [block for block, _ in parts]
    if blocks.count(blocks[0]) == layer.n:
        kept = jax.tree.map(lambda *w: jnp.stack(w), *(kept for _, kept in parts))
        return replace(layer, block=blocks[0]), kept
    return _chain(
        [
            (
                replace(
                    layer,
                    block=block,
                    n=1,
                    constants=tuple((name, v[i : i + 1]) for name, v in layer.constants),
                ),
                jax.tree.map(lambda w: w[None], kept),
            )
            for i, (block, kept) in enumerate(parts)
        ]
    )


def _chain(parts: list[tuple[Layer, Tree]]) -> tuple[Layer, Tree]:
    layers = tuple(layer for layer, _ in parts)
    return Chain(layers=layers), {str(i): kept for i, (_, kept) in enumerate(parts)}


def _best(layer: Selectable, params: Tree) -> tuple[Layer, Tree]:
    share = layer.selection.shares(params["selection"])
    choice, sign = np.asarray(jnp.abs(share).argmax(-1)), jnp.sign(share)
    if choice.ndim == 0:
        p = int(choice)
        return layer.member(p), layer.parameters(params, p, sign[p])
    assert isinstance(layer, SKAN)
    groups, kept = [], {n: params[n] for n in ("activation", "base", "bias") if n in params}
    for p, basis in enumerate(layer.pool):
        chosen = choice == p
        where = tuple(np.flatnonzero(chosen.reshape(layer.inputs, -1).any(1)).tolist())
        if not where:
            continue
        own = layer.parameters(params, p, sign[..., p])
        group = {
            "basis": take_basis(basis, own["basis"], where, layer),
            "weight": take_inputs(own["weight"], where, 1),
        }
        if basis.norm:
            group["norm"] = own["basis"]["norm"]
        if layer.granularity == "edge":
            group["mask"] = jnp.asarray(chosen[list(where)], jnp.float32)
        kept[str(len(groups))] = group
        groups.append((basis, where))
    pruned = PrunedSKAN(
        inputs=layer.inputs,
        outputs=layer.outputs,
        groups=tuple(groups),
        base=layer.base,
        bias=layer.bias,
        mask=layer.granularity == "edge",
        axes=layer.axes,
    )
    return pruned, kept


def take_basis(basis: Basis, params: Tree, where: tuple[int, ...], layer: SKAN) -> Tree:
    """The parameters of the functions, without a norm, for some of the inputs: axes that are
    declared with another length for as many inputs are axes of inputs."""
    bare = replace(basis, norm=False)
    all_, some = (expand(bare.spec(n, layer.outputs)) for n in (layer.inputs, len(where)))

    def one(whole: Param, part: Param, value: Array) -> Array:
        for axis, (n, m) in enumerate(zip(whole.shape, part.shape, strict=True)):
            value = value if n == m else take_inputs(value, where, axis)
        return value

    return jax.tree.map(one, all_, some, {n: params[n] for n in all_}, is_leaf=is_param)
