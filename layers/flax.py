"""Any layer as a Flax module, nnx or linen: the only file that imports flax.

Both are called as the pure form is, without the parameters, and return what it returns. Parameters
keep their names and carry their logical axes as sharding metadata, which Flax translates by
`logical_rules(DEFAULT_RULES)`. State (`Param.trainable` False) is kept apart from the parameters
and takes its next value from `Aux.state`, as BatchNorm's does; a call counts as one optimiser step
(`Param.advance`). Caches go in and come out of the call; `module.layer.init_cache(batch, length)`
makes one.
"""

from typing import Any

import jax
from flax import linen, nnx
from jax.sharding import Mesh

from bestiary.layers.base import (
    Aux,
    Layer,
    Param,
    Tree,
    advance,
    flatten,
    init,
    is_param,
    map_params,
    update,
)
from bestiary.layers.sharding import AXES, Axes, Rules, pspec


def logical_rules(rules: Rules) -> tuple[tuple[str, Axes], ...]:
    """`rules` as `nnx.` and `linen.logical_axis_rules` take them: every name has its line."""
    return tuple((name, rules.get(name)) for name in AXES)


class State(nnx.Variable):
    """A declared array that no optimiser touches."""


class NnxLayer(nnx.Module):
    """`layer` with the parameters that `layer.init` draws, as `nnx.Param`s under `weights`.

    The state changes in calls until `eval()` is called. On a mesh, under `use_rules`, the weights
    are born sharded and the metadata name mesh axes.
    """

    def __init__(self, layer: Layer, *, rngs: nnx.Rngs, mesh: Mesh | None = None) -> None:
        def variable(p: Param, value: jax.Array) -> nnx.Variable:
            kind = nnx.Param if p.trainable else State
            spec = pspec(*p.axes, mesh=mesh)
            # logical axes without rules: no mesh has them, so Flax must not place by them at once
            return kind(value, out_sharding=p.axes if spec is None else spec, eager_sharding=False)

        declared, drawn = layer.declare(), layer.init(rngs.params(), mesh)
        self.layer = nnx.static(layer)
        self.weights = nnx.data(jax.tree.map(variable, declared, drawn, is_leaf=is_param))
        self.deterministic = False  # Flax's name for what `train` and `eval` switch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        params = nnx.as_pure(self.weights)
        output = self.layer.apply(params, *args, **kwargs)
        if not self.deterministic:
            following = dict(flatten(next_state(self.layer, params, output)))
            for path, param in flatten(self.layer.declare()):
                if not param.trainable:
                    variable = self.weights
                    for name in path.split("/"):
                        variable = variable[name]
                    variable[...] = following[path]
        return output


class LinenLayer(linen.Module):
    """`layer` with its parameters in the collection "params", exactly the pure form's tree, and
    its state in "state", which changes where that collection is mutable.

    The axes are boxes, `linen.LogicallyPartitioned`, that `linen.unbox` takes off.
    """

    layer: Layer

    @linen.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        declared = self.layer.declare()

        def draw(key: jax.Array, declared: Tree) -> Tree:
            drawn = init(declared, key)
            return jax.tree.map(
                lambda p, value: linen.LogicallyPartitioned(value, p.axes),
                declared,
                drawn,
                is_leaf=is_param,
            )

        trained, state = {}, {}
        for name, part in declared.items():
            trained[name] = self.param(name, draw, only(part, trainable=True))
            untrained = only(part, trainable=False)
            if jax.tree.leaves(untrained, is_leaf=is_param):
                state[name] = self.variable(
                    "state", name, lambda d=untrained: draw(self.make_rng("params"), d)
                )
        params = trained | {
            name: jax.tree.map(
                lambda p, a, b: a if p.trainable else b,
                declared[name],
                trained[name],
                variable.value,
                is_leaf=is_param,
            )
            for name, variable in state.items()
        }
        output = self.layer.apply(params, *args, **kwargs)
        if self.is_mutable_collection("state") and not self.is_initializing():
            following = next_state(self.layer, params, output)
            for name, variable in state.items():
                variable.value = jax.tree.map(
                    lambda p, value: None if p.trainable else value,
                    declared[name],
                    following[name],
                    is_leaf=is_param,
                )
        return output


def only(declared: Tree, *, trainable: bool) -> Tree:
    """The declaration with None in place of what is (not) trained."""
    return map_params(lambda p: p if p.trainable == trainable else None, declared)


def next_state(layer: Layer, params: Tree, output: Any) -> Tree:
    """`params` with the state after a call that returned `output`."""
    aux = output[-1] if isinstance(output, tuple) else None
    state = aux.state if isinstance(aux, Aux) else {}
    return advance(layer.declare(), update(params, state))
