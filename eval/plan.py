"""`bestiary plan`: what a model needs on a TPU that is not there, from the program compiled for it.

The training step (or, to generate text, prefill and decode) is compiled ahead of time exactly as it
would run. What that program says is "compiled"; times that follow from it and from the figures of
the chip, and FLOPs that follow from the declaration of the model, are "modelled". Nothing is
measured.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Annotated, Any, Literal

import jax.sharding as js
import tyro

from bestiary.eval import topology as tpu
from bestiary.eval.plan_programs import compile_task, decode_step, prefill, training_step
from bestiary.eval.plan_report import Level, Plan, print_plan
from bestiary.eval.topology import Topology
from bestiary.kernels.dispatch import axis_names
from bestiary.layers.base import DTypeName, Layer, flatten
from bestiary.layers.repeat import Remat
from bestiary.layers.sharding import pspec
from bestiary.train.data import Data
from bestiary.train.experiment import Experiment, experiments, language_model, load_experiment
from bestiary.train.mesh import MESH_AXES, Mesh, batch_shards, placed
from bestiary.train.objective import NextToken
from bestiary.train.optimizer import Optimizer
from bestiary.train.tree_json import to_json
from bestiary.zoo import load_model, models
from bestiary.zoo.decoder import Decoder
from bestiary.zoo.model import Model

_DEFAULT_LENGTH = 4096
_LOGITS = 2**27  # of one chunk on one device: 512 MiB in float32


def experiment_for(
    model: Decoder,
    devices: int,
    *,
    mesh: Mesh | None = None,
    batch: int | None = None,
    length: int = _DEFAULT_LENGTH,
    remat: Remat = "full",
    precision: DTypeName = "bfloat16",
    optimizer: Optimizer | None = None,
) -> Experiment:
    """How a bare model would be trained on so many devices.

    Defaults: parameters split over all devices, one sequence each; float32 parameters, bfloat16
    activations, recomputed backwards; logits in chunks that stay below 512 MiB on a device.
    """
    mesh = Mesh(data=1, fsdp=devices) if mesh is None else mesh
    batch = devices if batch is None else batch
    data = Data(batch_size=batch, length=length)
    rows = max(1, batch // math.prod(mesh.sizes(devices)[:2]))
    logits = rows * length * model.vocab_size / mesh.tensor
    chunks = next(n for n in range(1, length + 1) if length % n == 0 and logits <= n * _LOGITS)
    return Experiment(
        model=_changed(model, remat, precision),
        data=data,
        objective=NextToken(chunks=chunks),
        optimizer=optimizer or Optimizer(),
        mesh=mesh,
        steps=1,
    )


def plan(
    experiment: Experiment,
    topology: Topology,
    *,
    name: str = "experiment",
    decode: bool = False,
    level: Level = "O0",
) -> Plan:
    """Compiles the step of `experiment`, or with `decode` prefill and decode, for `topology`.

    Decoding keeps parameters in the compute type, and the cache of a batch of
    `experiment.data.batch_size` sequences of `data.length` tokens. At level "O0" collectives and
    memory are nearly those of a full compilation, in a fraction of its time.

    Raises ValueError when the mesh does not have as many devices as the topology, or does not
    divide the batch or a parameter.
    """
    sizes = experiment.mesh.sizes(len(topology.devices))
    mesh = tpu.mesh(topology, dict(zip(MESH_AXES, sizes, strict=True)))
    _check_divides(experiment, mesh)
    if decode:
        language_model(experiment)
    with placed(mesh, experiment.mesh.table):
        makers = (prefill, decode_step) if decode else (training_step,)
        programs = tuple(
            compile_task(make(experiment, mesh), topology, mesh, level) for make in makers
        )
    count = experiment.model.count()
    return Plan(
        name=name,
        topology=topology.name,
        devices=len(topology.devices),
        usable_bytes=topology.chip.hbm_bytes,
        mesh=dict(mesh.shape),
        level=level,
        versions={package: version(package) for package in ("jax", "libtpu")},
        experiment=experiment,
        params_total=count.total,
        params_active=count.active,
        programs=programs,
    )


def _check_divides(experiment: Experiment, mesh: js.Mesh) -> None:
    rules = experiment.mesh.table
    rows, shards = experiment.data.batch_size, batch_shards(mesh, rules)
    if rows % shards:
        raise ValueError(f"batch: {rows} sequences do not divide over {shards} shards of the mesh")
    with placed(mesh, rules):
        for path, param in flatten(experiment.model.declare()):
            spec = pspec(*param.axes, mesh=mesh) or ()
            for size, axis, entry in zip(param.shape, param.axes, spec, strict=False):
                names = axis_names(entry)
                shards = math.prod(mesh.shape[name] for name in names)
                if size % shards:
                    raise ValueError(
                        f"mesh: {axis} {size} of {path} does not divide over "
                        f"{' x '.join(f'{name}={mesh.shape[name]}' for name in names)}"
                    )


def _changed(model: Layer, remat: Remat | None, compute: DTypeName | None) -> Any:
    """`model` with another recomputation or type of activations, unless None."""
    if remat is None and compute is None:
        return model
    if not isinstance(model, Model):
        name = "precision" if remat is None else "remat"
        raise ValueError(f"{name}: {type(model).__name__} has none to choose; leave it out")
    if remat is not None:
        model = model.map_stacks(lambda stack: replace(stack, remat=remat))
    if compute is not None:
        precision = replace(model.precision, compute=compute)
        model = replace(model, precision=precision)  # type: ignore[type-var]
    return model


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compile a training step for a TPU that is not there, and report what it needs.

    Exit status 1 when it does not fit into the memory.
    """

    name: Annotated[str, tyro.conf.Positional]
    """A model or an experiment of `bestiary list`."""
    topology: str
    """Chip and layout of the slice, such as v5e:4x4, v5p:4x4x4, v6e:16x16 or tpu7x:2x2x1."""
    mesh: str | None = None
    """Sizes of the mesh axes data, fsdp and tensor, such as fsdp=16,tensor=4; what is not named is
    1. By default that of the experiment; of a model all devices are fsdp."""
    batch: int | None = None
    """Sequences in a global batch; by default that of the experiment, or one for each device."""
    length: int | None = None
    """Tokens in a sequence; by default that of the experiment, or 4096."""
    decode: bool = False
    """Plan prefill and decode steps at a context of `length` tokens instead of training."""
    remat: Remat | None = None
    """What backward recomputes; a model by default everything (full)."""
    precision: DTypeName | None = None
    """Type of the activations; a model by default bfloat16."""
    optimizer: Literal["adamw", "adafactor", "lion", "muon"] | None = None
    """By default that of the experiment, or adamw."""
    optimization_level: Level = "O0"
    """Of the compiler: O0 is the fastest and keeps collectives exact, O2 is what would run."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        for name in ("batch", "length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value}; need at least 1")


def run(options: Options) -> int:
    """`bestiary plan`; the exit status. Raises ValueError for options that make no sense.

    Sets JAX up for absent TPUs (`topology.quiet_libtpu`), so nothing may use JAX devices before.
    """
    tpu.quiet_libtpu()
    mesh = None if options.mesh is None else _mesh(options.mesh)
    topology = tpu.parse(options.topology)
    if mesh is not None:  # before the model is looked at: says how many devices there are
        tpu.mesh(topology, {name: getattr(mesh, name) for name in MESH_AXES})
    result = plan(
        _experiment(options, mesh, len(topology.devices)),
        topology,
        name=options.name,
        decode=options.decode,
        level=options.optimization_level,
    )
    if options.json:
        print(json.dumps(to_json(result), indent=2))
    else:
        print_plan(result)
    return 0 if result.fits else 1


def _mesh(text: str) -> Mesh:
    """A `Mesh` from "fsdp=16,tensor=4"."""
    sizes = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)=(\d+)\s*", part)
        if not found:
            raise ValueError(f"mesh: {part!r} is not AXIS=SIZE, for example fsdp=16,tensor=4")
        axis, size = found[1], int(found[2])
        if axis not in MESH_AXES:
            raise ValueError(f"mesh: {axis!r} is not one of the axes {', '.join(MESH_AXES)}")
        if size < 1 or axis in sizes:
            raise ValueError(f"mesh: {text!r}; need each axis once and at least 1")
        sizes[axis] = size
    return Mesh(data=sizes.get("data", 1), fsdp=sizes.get("fsdp", 1), tensor=sizes.get("tensor", 1))


def _experiment(options: Options, mesh: Mesh | None, devices: int) -> Experiment:
    optimizer = Optimizer(name=options.optimizer) if options.optimizer else None
    if options.name not in experiments():
        if options.name not in models():
            known = ", ".join([*experiments(), *models()])
            raise ValueError(f"name: {options.name!r} is no experiment or model; known: {known}")
        model = load_model(options.name)
        if not isinstance(model, Decoder):
            raise ValueError(
                f"name: {options.name!r} is no language model; need an experiment that trains it"
            )
        return experiment_for(
            model,
            devices,
            mesh=mesh,
            batch=options.batch,
            length=options.length or _DEFAULT_LENGTH,
            remat=options.remat or "full",
            precision=options.precision or "bfloat16",
            optimizer=optimizer,
        )
    experiment = load_experiment(options.name)
    data: Any = experiment.data
    if options.batch is not None:
        data = replace(data, batch_size=options.batch)
    if options.length is not None:
        data = replace(
            language_model(experiment)[1], batch_size=data.batch_size, length=options.length
        )
    return replace(
        experiment,
        model=_changed(experiment.model, options.remat, options.precision),
        data=data,
        optimizer=optimizer or experiment.optimizer,
        mesh=replace(mesh, rules=experiment.mesh.rules) if mesh else experiment.mesh,
    )
