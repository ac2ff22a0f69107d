"""The device mesh of a run and the rules that place logical axes on it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import jax
import jax.sharding as js

from bestiary.layers.sharding import AXES, DEFAULT_RULES, Rules, use_rules

MESH_AXES = ("data", "fsdp", "tensor")


def _default_rules() -> dict[str, str]:
    def text(target: str | tuple[str, ...] | None) -> str:
        return target if isinstance(target, str) else ",".join(target or ())

    return {name: text(DEFAULT_RULES.get(name)) for name in AXES}


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Sizes of the mesh axes: `data` splits the batch, `fsdp` also parameters, `tensor` layers."""

    data: int = 0
    """Size of the data axis; 0: all devices that the other axes leave."""
    fsdp: int = 1
    tensor: int = 1
    rules: dict[str, str] = field(default_factory=_default_rules)
    """Mesh axes of every logical axis, separated by commas; empty: not split."""

    def __post_init__(self) -> None:
        for name in ("fsdp", "tensor"):
            if getattr(self, name) < 1:
                raise ValueError(f"mesh.{name}: {getattr(self, name)}; need at least 1")
        if self.data < 0:
            raise ValueError(f"mesh.data: {self.data}; need 1 or more, or 0 for all that is left")
        for name, target in self.rules.items():
            if name not in AXES:
                raise ValueError(f"mesh.rules: unknown axis {name!r}; known: {', '.join(AXES)}")
            for axis in filter(None, target.split(",")):
                if axis not in MESH_AXES:
                    raise ValueError(
                        f"mesh.rules.{name}: {axis!r} is not a mesh axis; need some of {MESH_AXES}"
                    )

    @property
    def table(self) -> Rules:
        """The rules that split anything, as layers read them."""
        return {name: tuple(to.split(",")) for name, to in self.rules.items() if to}

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) over `num_devices`. Raises ValueError if they do not fit."""
        rest = self.fsdp * self.tensor
        data = self.data or num_devices // rest
        if data * rest != num_devices:
            raise ValueError(
                f"mesh: data {self.data or 'rest'} x fsdp {self.fsdp} x tensor {self.tensor}; "
                f"need a product of {num_devices}, the number of devices"
            )
        return data, self.fsdp, self.tensor

    def build(self, devices: list | None = None) -> js.Mesh:
        """The mesh over `devices`, by default all of the process group."""
        devices = jax.devices() if devices is None else devices
        sizes = self.sizes(len(devices))
        axis_types = (js.AxisType.Auto,) * len(MESH_AXES)
        return jax.make_mesh(sizes, MESH_AXES, axis_types=axis_types, devices=devices)


@contextmanager
def placed(mesh: js.Mesh | js.AbstractMesh, rules: Rules) -> Iterator[None]:
    """Programs traced inside see the rules and the mesh's axes, whose devices need not exist."""
    with js.use_abstract_mesh(mesh.abstract_mesh), use_rules(rules):
        yield


def batch_shards(mesh: js.Mesh, rules: Rules) -> int:
    """Into how many parts the batch is split."""
    target = rules.get("batch") or ()
    return math.prod(mesh.shape[a] for a in ((target,) if isinstance(target, str) else target))
