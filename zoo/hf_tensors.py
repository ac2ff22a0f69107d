"""The tensors of a family's folder, and where they lie in the parameters."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bestiary.layers.base import Param, flatten
from bestiary.layers.repeat import Chain
from bestiary.zoo.decoder import Decoder
from bestiary.zoo.hf_families import Family

MTP_BLOCK = "mtp/block"


@dataclass(frozen=True)
class Tensor:
    """One tensor of a folder and its place in the parameters, in most cases in a single one."""

    name: str
    parts: Mapping[str, Param]
    """The parameters that it joins, by path."""
    index: tuple[int, ...]
    """On their leading stacked axes."""
    axis: int
    """Of their outputs, along which they are joined."""
    depthwise: bool = False
    """A convolution per channel, in torch [channels, 1, taps]."""

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self.parts)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(next(iter(self.parts.values())).dtype)

    @property
    def joined(self) -> tuple[int, ...]:
        """The shape in torch's order, [*outputs, inputs], before the outputs become one axis."""
        shapes = [self._outputs(param) for param in self.parts.values()]
        outputs = list(shapes[0])
        if len(shapes) > 1:
            outputs[self.axis] = sum(shape[self.axis] for shape in shapes)
        return *outputs, *self._inputs

    @property
    def shape(self) -> tuple[int, ...]:
        """In torch's layout: matrices are [outputs, inputs]."""
        if not self._inputs:
            return self.joined
        return math.prod(self.joined[:-1]), self.joined[-1]

    def part(self, path: str, stacked: np.ndarray) -> np.ndarray:
        """The tensor's share of the parameter at `path`, in torch's order: a view to assign to."""
        x, param = stacked[(*self.index, ...)], self.parts[path]
        if self.depthwise:
            return x.T[:, None]
        if param.inputs is None:
            return x
        return np.moveaxis(x.reshape(*self._inputs, *self._outputs(param)), 0, -1)

    def part_of(self, path: str, value: np.ndarray) -> np.ndarray:
        """What of the tensor's `value` belongs to the parameter at `path`."""
        if len(self.parts) == 1:
            return value.reshape(self.joined)
        ends = np.cumsum([self._outputs(param)[self.axis] for param in self.parts.values()])
        parts = np.split(value.reshape(self.joined), ends[:-1], self.axis)
        return parts[self.paths.index(path)]

    def join(self, stacked: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor, from its parameters."""
        parts = [self.part(path, x) for path, x in zip(self.paths, stacked, strict=True)]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts, self.axis)
        return joined.reshape(self.shape)

    @property
    def _inputs(self) -> tuple[int, ...]:
        param = next(iter(self.parts.values()))
        shape = param.shape[len(self.index) :]
        return () if param.inputs is None else (math.prod(shape[: param.inputs]),)

    def _outputs(self, param: Param) -> tuple[int, ...]:
        outputs = param.shape[len(self.index) + (param.inputs or 0) :]
        return (outputs[1], 1, outputs[0]) if self.depthwise else outputs


def family_tensors(family: Family, model: Decoder) -> Iterator[Tensor]:
    """Every tensor of the folder of a model that the family expresses, parameter by parameter."""
    for (name, layers), parts in stored_params(family, model).items():
        first = next(iter(parts.values()))
        for index in np.ndindex(first.shape[: first.batch_ndim]):
            stacked = first.axes[:1] == ("layers",)
            numbers = (layers[index[0]], *index[1:]) if stacked else (layers[0], *index)
            axis, depthwise = int(name in family.by_head), name in family.depthwise
            yield Tensor(name.format(*numbers), parts, index, axis, depthwise)


def copied_names(family: Family, model: Decoder) -> dict[str, str]:
    """Tensors of the layer for multi-token prediction that repeat another: name -> that one's."""
    if model.mtp is None:
        return {}
    after, names = layers_of(model)[MTP_BLOCK][0], family.names(model)
    tied = {names["head/weight"]: names["embedding/table"]} if model.head is None else {}
    return {copy.format(after): str(tied.get(name, name)) for copy, name in family.copies.items()}


def stored_params(family: Family, model: Decoder) -> dict[tuple[str, range], dict[str, Param]]:
    """The parameters that share a name in the same layers; ValueError for one without a name."""
    names, layers = family.names(model), layers_of(model)
    declared: dict[str, list] = {key: [] for key in names}
    for path, param in flatten(model.declare()):
        place = next((place for place in layers if path.startswith(f"{place}/")), None)
        key = path if place is None else f"blocks{path.removeprefix(place)}"
        if key not in names:
            raise ValueError(f"{path}: no tensor stores it")
        declared[key].append((path, param, layers[place or MTP_BLOCK]))
    stored: dict[tuple[str, range], dict[str, Param]] = {}
    for key, params in declared.items():
        if (name := names[key]) is not None:
            for path, param, numbers in params:
                stored.setdefault((name, numbers), {})[path] = param
    return stored


def layers_of(model: Decoder) -> dict[str, range]:
    """The numbers of the layers whose parameters lie below a path."""
    layers, first = {}, 0
    for i, stack in enumerate(model.stacks):
        path = f"blocks/{i}" if isinstance(model.blocks, Chain) else "blocks"
        members = [path]
        if isinstance(stack.block, Chain):
            members = [f"{path}/{k}" for k in range(len(stack.block.layers))]
        end = first + stack.n * len(members)
        for k, member in enumerate(members):
            layers[member] = range(first + k, end, len(members))
        first = end
    return layers | {MTP_BLOCK: range(first, first + 1)}
