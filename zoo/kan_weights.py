"""Weights of released KAN programs, in and out: pykan, efficient-kan and FastKAN.

Tensors come and go as a dict by the names of the program's state dict, as an .npz or .safetensors
file holds it. Functions are pure; networks are `KANNet`s.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bestiary.layers.base import Param, Tree, flatten, is_param
from bestiary.layers.kan_bases import RBF
from bestiary.layers.kan_net import KANNet
from bestiary.layers.kan_spline import BSpline

Tensors = Mapping[str, np.ndarray]


class Entry(NamedTuple):
    """A parameter and the released tensor: `order` puts its axes into ours; `shape` is its own with
    joined axes apart."""

    path: str
    name: str
    order: tuple[int, ...]
    shape: tuple[int, ...] | None = None


def from_pykan(net: KANNet, tensors: Tensors) -> Tree:
    """The parameters of a `MultKAN` or `KAN`. Its edges with symbolic functions are refused.

    `net` needs a `BSpline` and scale "constant"; what it does not declare (knots, a mask, affine
    maps) must be without effect. Raises ValueError naming a tensor that is missing, misshapen or
    without a place.
    """
    for i in range(len(net.layers)):
        name = f"symbolic_fun.{i}.mask"
        if np.any(tensors.get(name, 0)):
            raise ValueError(f"{name}: symbolic functions on edges; need spline edges only")
    return _read(net, list(_pykan(net)), tensors)


def to_pykan(net: KANNet, params: Tree) -> dict[str, np.ndarray]:
    """All tensors of the state dict of a `MultKAN` without symbolic functions."""
    tensors = _write(net, list(_pykan(net)), params)
    for i, kan in enumerate(net.layers):
        edges = (kan.outputs, kan.inputs)
        tensors[f"symbolic_fun.{i}.mask"] = np.zeros(edges, np.float32)
        tensors[f"symbolic_fun.{i}.affine"] = np.zeros((*edges, 4), np.float32)
    return tensors


def from_efficient_kan(net: KANNet, tensors: Tensors) -> Tree:
    """The parameters of an efficient-kan `KAN`; scale "none" where it was built without
    `enable_standalone_scale_spline`. Raises ValueError as `from_pykan` does."""
    return _read(net, list(_efficient(net)), tensors)


def to_efficient_kan(net: KANNet, params: Tree) -> dict[str, np.ndarray]:
    return _write(net, list(_efficient(net)), params)


def from_fastkan(net: KANNet, tensors: Tensors) -> Tree:
    """The parameters of a `FastKAN`: `RBF` with a bias, which belongs to the base branch there.
    Raises ValueError as `from_pykan` does."""
    return _read(net, list(_fastkan(net)), tensors)


def to_fastkan(net: KANNet, params: Tree) -> dict[str, np.ndarray]:
    return _write(net, list(_fastkan(net)), params)


def _pykan(net: KANNet) -> Iterator[Entry]:
    for i in range(len(net.layers)):
        layer = f"act_fun.{i}"
        yield Entry(f"{i}/basis/knots", f"{layer}.grid", (1, 0))
        yield Entry(f"{i}/weight", f"{layer}.coef", (2, 0, 1))
        yield Entry(f"{i}/base", f"{layer}.scale_base", (0, 1))
        yield Entry(f"{i}/scale", f"{layer}.scale_sp", (0, 1))
        yield Entry(f"{i}/mask", f"{layer}.mask", (0, 1))
        for name in ("node_bias", "node_scale", "subnode_bias", "subnode_scale"):
            yield Entry(f"affine_{i}/{name}", f"{name}_{i}", (0,))


def _efficient(net: KANNet) -> Iterator[Entry]:
    for i in range(len(net.layers)):
        layer = f"layers.{i}"
        yield Entry(f"{i}/basis/knots", f"{layer}.grid", (1, 0))
        yield Entry(f"{i}/weight", f"{layer}.spline_weight", (2, 1, 0))
        yield Entry(f"{i}/base", f"{layer}.base_weight", (1, 0))
        yield Entry(f"{i}/scale", f"{layer}.spline_scaler", (1, 0))


def _fastkan(net: KANNet) -> Iterator[Entry]:
    for i, kan in enumerate(net.layers):
        layer = f"layers.{i}"
        yield Entry(f"{i}/basis/norm/weight", f"{layer}.layernorm.weight", (0,))
        yield Entry(f"{i}/basis/norm/bias", f"{layer}.layernorm.bias", (0,))
        yield Entry(f"{i}/centres", f"{layer}.rbf.grid", (0,))
        apart = (kan.outputs, kan.inputs, kan.basis.size)
        yield Entry(f"{i}/weight", f"{layer}.spline_linear.weight", (2, 1, 0), apart)
        yield Entry(f"{i}/base", f"{layer}.base_linear.weight", (1, 0))
        yield Entry(f"{i}/bias", f"{layer}.base_linear.bias", (0,))


def _implied(net: KANNet, entry: Entry) -> np.ndarray | None:
    """What stands for a parameter that the network does not declare; None: nothing can."""
    which, _, name = entry.path.rpartition("/")
    kan = net.layers[int(which.removeprefix("affine_").partition("/")[0])]
    basis, edges = kan.basis, (kan.inputs, kan.outputs)
    if name == "knots" and isinstance(basis, BSpline):
        return np.repeat(np.asarray(basis.knots())[:, None], kan.inputs, 1)
    if name == "centres" and isinstance(basis, RBF):
        return np.linspace(basis.low, basis.high, basis.num_centres, dtype=np.float32)
    if name == "mask":
        return np.ones(edges, np.float32)
    if which.startswith("affine"):
        i = int(which.removeprefix("affine_"))
        nodes = kan.outputs if name.startswith("sub") else sum(net.nodes[i + 1])
        return np.full(nodes, float(name.endswith("scale")), np.float32)
    return None


def _read(net: KANNet, entries: list[Entry], tensors: Tensors) -> Tree:
    declared = dict(flatten(net.declare()))
    values: dict[str, Any] = {}
    for entry in entries:
        implied = _implied(net, entry)
        param = declared.pop(entry.path, None)
        if entry.name not in tensors:
            if param is None:
                continue
            raise ValueError(f"{entry.name}: missing; need it for {entry.path} {param.shape}")
        if param is None and implied is None:
            raise ValueError(f"{entry.name}: no parameter {entry.path} in this network")
        ours = np.asarray(tensors[entry.name])
        if entry.shape is not None and ours.size == np.prod(entry.shape):
            ours = ours.reshape(entry.shape)
        shape = param.shape if param is not None else implied.shape  # type: ignore[union-attr]
        theirs = tuple(shape[entry.order.index(axis)] for axis in range(len(shape)))
        if ours.shape != theirs:
            raise ValueError(f"{entry.name}: shape {ours.shape}; need {theirs}")
        ours = ours.transpose(entry.order)
        if param is not None:
            values[entry.path] = jnp.asarray(ours, param.dtype)
        elif implied is not None and not np.allclose(ours, implied, atol=1e-5):
            raise ValueError(f"{entry.name}: not what {entry.path} is in a network without it")
    if declared:
        raise ValueError(f"{next(iter(declared))}: this format has no tensor for it")

    def find(path: tuple, param: Param) -> Any:
        del param
        return values["/".join(key.key for key in path)]

    return jax.tree_util.tree_map_with_path(find, net.declare(), is_leaf=is_param)


def _write(net: KANNet, entries: list[Entry], params: Tree) -> dict[str, np.ndarray]:
    flat, tensors = dict(flatten(params)), {}
    for entry in entries:
        value = flat.pop(entry.path, None)
        value = _implied(net, entry) if value is None else np.asarray(value)
        if value is not None:
            theirs = value.transpose(np.argsort(entry.order))
            joined = theirs.shape if entry.shape is None else (len(theirs), -1)
            tensors[entry.name] = np.ascontiguousarray(theirs.reshape(joined))
    if flat:
        raise ValueError(f"{next(iter(flat))}: this format has no tensor for it")
    return tensors
