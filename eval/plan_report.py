"""What a plan says, and its text for people: every figure is marked compiled or modelled."""

from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bestiary.eval.hlo import HloReport
from bestiary.eval.show import short, wide_console
from bestiary.train.experiment import Experiment
from bestiary.train.objective import NextToken
from bestiary.zoo.model import Model

Level = Literal["O0", "O1", "O2", "O3"]

_CLASSES = {
    "parameters": "parameters",
    "optimizer": "optimiser",
    "cache": "key-value cache",
    "batch": "batch and counters",
    "temporaries": "activations and temporaries",
}


@dataclass(frozen=True, kw_only=True)
class Rate:
    """One execution, modelled."""

    seconds: float
    tokens_per_second: float
    mfu: float
    """Active FLOPs of the model over those that all devices could do in the time."""


@dataclass(frozen=True, kw_only=True)
class Modelled:
    """Times of one execution by the roofline of each resource."""

    seconds: dict[str, float]
    """"compute", "memory", and "KIND AXES" for each collective over these mesh axes."""
    overlapped: Rate
    """When everything runs at once: the slowest resource."""
    serial: Rate
    """When no collective overlaps: the slower of compute and memory, then every collective."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """One program on one device; FLOPs are of all devices."""

    name: str
    tokens: int
    """Or images, or other rows, that one execution processes, on all devices."""
    memory: dict[str, int]
    """Compiled: bytes on a device by class: the arguments, then "temporaries" (activations,
    gradients, new outputs, padding)."""
    needed: int
    """Compiled: their sum; when the compiler refused the program, what its message says."""
    fits: bool
    refusal: str | None
    """The compiler's message when the program does not fit."""
    model_flops: float
    """Modelled: matmul FLOPs that the model's declaration counts, executed densely."""
    active_flops: float
    """Modelled: of them those that the active units and the keys in sight need."""
    six_n_flops: float
    """Modelled: the rule of thumb, 6 (2 without backward pass) per active parameter and token."""
    compiled_flops: int | None
    """Compiled: matmul FLOPs of the program, loops followed; recomputation shows here."""
    kernel_flops: int
    """Modelled: matmul FLOPs inside Pallas kernels, as if they skipped no masked block; they come
    on top of those of the program."""
    compile_seconds: float | None
    report: HloReport | None
    modelled: Modelled | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `experiment` needs on `topology`; see `Program` for the marks of the figures."""

    name: str
    topology: str
    devices: int
    usable_bytes: float
    """Memory of a device that a program may use."""
    mesh: dict[str, int]
    level: Level
    versions: dict[str, str]
    experiment: Experiment
    params_total: int
    params_active: int
    programs: tuple[Program, ...]

    @property
    def fits(self) -> bool:
        return all(program.fits for program in self.programs)


def print_plan(plan: Plan, console: Console | None = None) -> None:
    console = wide_console() if console is None else console
    experiment = plan.experiment
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    versions = ", ".join(f"{name} {number}" for name, number in plan.versions.items())
    decode = plan.programs[0].name != "training step"
    console.print(f"[bold]{escape(plan.name)}[/bold] on {plan.topology}: {plan.devices} devices")
    facts = [
        f"mesh {mesh}",
        experiment.data.describe(),
        f"{short(plan.params_total)} parameters ({short(plan.params_active)} active)",
    ]
    model, objective = experiment.model, experiment.objective
    if isinstance(model, Model):
        facts.append(f"activations {model.precision.compute}")
        if not decode:
            facts.append(f"parameters {model.precision.params}")
            facts.append(f"remat {', '.join({stack.remat for stack in model.stacks})}")
    if not decode:
        facts.append(experiment.optimizer.name)
    if not decode and isinstance(objective, NextToken):
        facts.append(f"logits in {objective.chunks} chunks")
    for i in range(0, len(facts), 4):
        console.print(escape("  " + ", ".join(facts[i : i + 4])))
    console.print(
        "  "
        f"compiled at level {plan.level} with windowed einsums off by {versions}; "
        "times are modelled (roofline), nothing is measured"
    )
    for program in plan.programs:
        console.print()
        _print_program(console, plan, program)


def _print_program(console: Console, plan: Plan, program: Program) -> None:
    unit = plan.experiment.data.unit
    verdict = "[green]fits[/green]" if program.fits else "[red]does not fit[/red]"
    console.print(
        f"[bold]{program.name}[/bold]: {verdict}, needs {_size(program.needed)} of "
        f"{_size(plan.usable_bytes)} usable on a device"
    )
    if program.refusal:
        console.print(f"  the compiler refused it: {escape(program.refusal)}")
    table = _table("figure", "value", "", "source")
    for name, size in program.memory.items():
        share = f"{size / plan.usable_bytes:.1%}"
        table.add_row(_CLASSES[name], _size(size), share, "compiled")
    table.add_section()
    for label, flops in (
        ("model FLOPs, executed densely", program.model_flops),
        ("model FLOPs, active", program.active_flops),
        (f"{6 if program.name == 'training step' else 2} x N x {unit}", program.six_n_flops),
    ):
        each = f"{flops / program.tokens:.4g} per {unit.removesuffix('s')}"
        table.add_row(label, _tera(flops), each, "modelled")
    if program.compiled_flops is not None:
        ratio = f"{program.compiled_flops / program.model_flops:.3f} of the model's"
        table.add_row("FLOPs of the program", _tera(program.compiled_flops), ratio, "compiled")
    if program.kernel_flops:
        ratio = f"{program.kernel_flops / program.model_flops:.3f} of the model's, at most"
        table.add_row("FLOPs in its kernels", _tera(program.kernel_flops), ratio, "modelled")
    if program.compile_seconds is not None:
        table.add_row("compilation", f"{program.compile_seconds:.1f} s", "", "measured here")
    console.print(table)
    if program.report and program.modelled:
        console.print(_collectives(program))
        console.print(_times(program, plan.experiment.data.unit))
        if program.report.custom_calls:
            calls = ", ".join(f"{k} {n}x" for k, n in sorted(program.report.custom_calls.items()))
            console.print(f"  custom calls (compiled): {escape(calls)}")
        if program.report.unknown_loops:
            console.print(
                f"  {program.report.unknown_loops} loops depend on data and count once (compiled)"
            )


def _collectives(program: Program) -> Table:
    assert program.report
    table = _table("collective (compiled)", "mesh axes", "devices", "launches", "bytes", "mode")
    for item in program.report.collectives:
        table.add_row(
            item.kind,
            ", ".join(item.axes),
            str(item.group),
            str(item.count),
            _size(item.bytes),
            "async" if item.asynchronous else "sync",
        )
    return table


def _times(program: Program, unit: str) -> Table:
    assert program.modelled
    table = _table("time (modelled)", "ms", "")
    for name, seconds in program.modelled.seconds.items():
        table.add_row(name, f"{seconds * 1e3:.3f}", "")
    table.add_section()
    for name, rate in (
        ("all overlapped", program.modelled.overlapped),
        ("no collective overlapped", program.modelled.serial),
    ):
        told = f"{rate.tokens_per_second:,.0f} {unit}/s, MFU {rate.mfu:.1%}"
        table.add_row(name, f"{rate.seconds * 1e3:.3f}", told)
    return table


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 2))
    table.add_column(first)
    for name in columns:
        numeric = name in ("value", "devices", "launches", "bytes", "ms")
        table.add_column(name, justify="right" if numeric else "left")
    return table


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.3f} T"


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"
