"""`bestiary list` and `bestiary show`: what there is, and what it holds and costs."""

import dataclasses
import importlib
import inspect
import json
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.sharding as js
import tyro
from rich.console import Console
from rich.markup import escape
from rich.pretty import Pretty
from rich.table import Table

import bestiary.layers
from bestiary.eval.accounting import Accounting, account
from bestiary.eval.caching import Caching
from bestiary.layers.base import Layer, flatten
from bestiary.train.experiment import Experiment, experiments, load_experiment
from bestiary.train.mesh import MESH_AXES, placed
from bestiary.train.tree_json import to_json
from bestiary.zoo import load_model, models
from bestiary.zoo.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class List:
    """Models, experiments and layers by name."""

    json: bool = False
    """Print JSON."""
    figures: bool = False
    """Print a Markdown table of every model's figures (docs/models.md)."""
    length: int = 4096
    """Context length of the figures."""


def run_list(options: List) -> None:
    if options.figures:
        print(figures_table(options.length))
        return
    found = {
        "models": {name: _first_line(build) for name, build in models().items()},
        "experiments": experiments(),
        "layers": {cls.__name__: _first_line(cls) for cls in layers()},
    }
    if options.json:
        print(json.dumps(found, indent=2))
        return
    console = wide_console()
    for kind, entries in found.items():
        table = Table(title=kind.capitalize(), title_justify="left", box=None)
        table.add_column("name", style="bold", no_wrap=True)
        if kind == "models":
            table.add_column("parameters", justify="right")
            table.add_column("active", justify="right")
        table.add_column("what it is")
        for name, text in entries.items():
            count = load_model(name).count() if kind == "models" else ()
            table.add_row(name, *(short(n) for n in count), escape(text))
        console.print(table, "")


def figures_table(length: int) -> str:
    """Every model's accounting as Markdown; a table of language models, at context `length`, comes
    last."""
    found = {name: load_model(name) for name in models()}
    texts = {name: model for name, model in found.items() if isinstance(model, Decoder)}
    rest = {name: account(model, 1) for name, model in found.items() if name not in texts}
    held = {
        "parameters": lambda a: short(a.params_total),
        "active": lambda a: short(a.params_active),
        "training FLOPs": lambda a: short(a.training_flops_total),
    }
    forward = {"forward FLOPs": lambda a: short(a.forward_flops_active)}
    decode = {
        "prefill FLOPs": lambda a: short(a.forward_flops_active),
        "decode FLOPs": lambda a: short(a.decode_flops_active),
        "decode bytes": lambda a: short(a.decode_bytes_active, "B"),
        "cache bytes": lambda a: short(a.cache_bytes_per_token, "B"),
    }
    moments = {"optimiser bytes": lambda a: short(a.optimizer_bytes, "B")}
    tables = [_markdown(held | forward | moments, rest)] if rest else []
    accounts = {name: account(model, length) for name, model in texts.items()}
    return "\n\n".join([*tables, _markdown(held | decode | moments, accounts)])


def _markdown(columns: dict[str, Callable[[Accounting], str]], rows: dict[str, Accounting]) -> str:
    lines = [f"| model | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, figures in rows.items():
        lines.append(f"| `{name}` | {' | '.join(f(figures) for f in columns.values())} |")
    return "\n".join(lines)


def layers() -> list[type[Layer]]:
    """Every public layer class of the layer files, by name."""
    found = set()
    for info in pkgutil.iter_modules(bestiary.layers.__path__):
        if info.name == "flax":  # wraps layers, declares none
            continue
        module = importlib.import_module(f"bestiary.layers.{info.name}")
        for name, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, Layer) and cls is not Layer and not name.startswith("_"):
                found.add(cls)
    return sorted(found, key=lambda cls: cls.__name__)


@dataclass(frozen=True, kw_only=True)
class Show:
    """What a model or an experiment holds and costs."""

    name: Annotated[str, tyro.conf.Positional]
    """A model or an experiment of `bestiary list`."""
    length: int | None = None
    """Context length of the figures of a language model; by default that of the experiment, 4096
    for a model."""
    sharding: bool = False
    """Print every parameter's shape and placement on the mesh of the experiment."""
    caching: tyro.conf.OmitArgPrefixes[Caching] = Caching()
    json: bool = False
    """Print JSON."""


def run_show(options: Show, experiment: Experiment | None = None) -> None:
    """`experiment` stands for `options.name`, with fields overridden."""
    if experiment is None and options.name in experiments():
        experiment = load_experiment(options.name)
    if experiment is None and options.sharding:
        raise ValueError(f"sharding: {options.name!r} is not an experiment, so it has no mesh")
    model = load_model(options.name) if experiment is None else experiment.model
    if not isinstance(model, Decoder) and (options.caching.cache or options.length):
        raise ValueError(f"name: {options.name!r} is no language model: it has no cache or length")
    length = options.length
    if length is None and experiment is not None:
        length = experiment.data.length
    length = length or (4096 if isinstance(model, Decoder) else 1)
    if options.caching.cache is not None and isinstance(model, Decoder):
        model, _, _ = options.caching.apply(model, None, length)
        experiment = experiment and dataclasses.replace(experiment, model=model)
    figures = account(model, length)
    places = placements(experiment) if experiment and options.sharding else {}
    if options.json:
        data: dict[str, Any] = {"name": options.name, "accounting": dataclasses.asdict(figures)}
        data |= {"config": to_json(model if experiment is None else experiment)}
        print(json.dumps(data | ({"sharding": places} if places else {}), indent=2))
        return
    console = wide_console()
    console.print(f"[bold]{options.name}[/bold]")
    console.print(_figures(figures, model.unit))
    console.print()
    if places:
        console.print(_placements(places))
    else:
        console.print(Pretty(model if experiment is None else experiment, expand_all=True))


def placements(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Shape, logical axes, PartitionSpec and bytes per device of every parameter.

    The mesh is that of the experiment over the devices here, or over as many as its axes need.
    """
    mesh_config = experiment.mesh
    needed = max(mesh_config.data, 1) * mesh_config.fsdp * mesh_config.tensor
    devices = needed if mesh_config.data else needed * max(1, jax.device_count() // needed)
    sizes = mesh_config.sizes(devices)
    mesh = js.AbstractMesh(sizes, MESH_AXES, axis_types=(js.AxisType.Auto,) * len(sizes))
    out = {}
    with placed(mesh, mesh_config.table):
        for path, param in flatten(experiment.model.declare()):
            sharding = param.abstract(mesh).sharding
            shard = sharding.shard_shape(param.shape)
            share = math.prod(shard) * param.nbytes // param.size
            out[path] = {
                "shape": param.shape,
                "axes": param.axes,
                "spec": str(tuple(sharding.spec)),
                "shard": shard,
                "bytes_per_device": share,
            }
    return {"mesh": dict(zip(MESH_AXES, sizes, strict=True)), "parameters": out}


def short(n: float, unit: str = "") -> str:
    """A number with three digits: 8.03 B parameters or FLOPs, or 8.03 GB with unit "B"."""
    for size, letter in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= 0.9995 * size:  # what rounds to it
            return f"{n / size:.3g} {letter}{unit}"
    return f"{n:.3g} {unit}".strip()


def wide_console() -> Console:
    """As wide as the terminal; wide enough for a table where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def _figures(a: Accounting, unit: str) -> Table:
    table = Table(box=None, show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    rows = [
        ("parameters", f"{a.params_total:,}"),
        (f"active parameters per {unit}", f"{a.params_active:,}"),
    ]
    if unit == "token":
        rows.append(("context length of what follows", f"{a.length:,}"))
    rows += [
        (f"forward FLOPs per {unit}", short(a.forward_flops_total)),
        ("  of them active", short(a.forward_flops_active)),
        (f"training FLOPs per {unit}", short(a.training_flops_total)),
        ("  of them active", short(a.training_flops_active)),
    ]
    if unit == "token":
        rows += [
            ("active FLOPs of the last decoded token", short(a.decode_flops_active)),
            ("bytes read per decoded token, batch 1", short(a.decode_bytes_active, "B")),
            ("KV-cache bytes per token", short(a.cache_bytes_per_token, "B")),
            ("KV-cache bytes per sequence", short(a.cache_bytes, "B")),
        ]
    rows.append(("optimiser bytes (AdamW)", short(a.optimizer_bytes, "B")))
    for row in rows:
        table.add_row(*row)
    return table


def _placements(places: dict[str, Any]) -> Table:
    sizes = " x ".join(f"{name} {size}" for name, size in places["mesh"].items())
    table = Table(title=f"mesh {sizes}", title_justify="left", box=None)
    for column in ("parameter", "shape", "logical axes", "placement", "on one device"):
        table.add_column(column, overflow="fold")
    for path, p in places["parameters"].items():
        table.add_row(
            path,
            str(p["shape"]),
            ", ".join(str(a or "-") for a in p["axes"]),
            p["spec"],
            f"{p['shard']}, {short(p['bytes_per_device'], 'B')}",
        )
    return table


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").split("\n")[0]
