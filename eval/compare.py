"""`bestiary compare`: architectures of one budget, trained on the same tokens in the same order."""

import json
import shlex
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bestiary.eval import compare_lengths, compare_report
from bestiary.eval.compare_members import NAMES, Match, sized
from bestiary.eval.compare_runs import SETTINGS, VALIDATION, Comparison, keep
from bestiary.eval.compare_statistics import Found
from bestiary.eval.routing import Routing, skewed
from bestiary.train.data import Data, load
from bestiary.train.experiment import Checkpoints, Evaluation, load_experiment
from bestiary.train.loop import Interrupted
from bestiary.train.placement import check
from bestiary.train.runtime import locked, start
from bestiary.train.tasks import Recall, is_task, parse
from bestiary.train.tree_json import difference, to_json

_RECALL = "recall:facts=8192"


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Train several architectures of one budget on the same tokens and compare them.

    Members differ in their feed-forwards or token mixers; the width of feed-forwards is solved for.
    The table, the figures and the curves are written to OUT. A comparison that was stopped goes on
    by the same command; members and seeds may be added to one. Exit status 1 when a run failed.
    """

    members: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="MEMBER,...", help=f"dense, and any of {', '.join(NAMES[1:])}."),
    ]
    match: Match = "active_params"
    """What all have as much of as the dense member."""
    minutes: float | None = None
    """How long a run of the dense member takes here, compilation apart; all others take as many
    steps."""
    steps: int | None = None
    """Or the number of steps itself."""
    seeds: int = 3
    """How many runs of each member: seeds 0, 1, ..."""
    task: Literal["text", "recall"] = "text"
    """recall: 8192 facts that must be memorised (other sizes: --data.path recall:facts=N)."""
    data: Data = Data(length=128, batch_size=8)
    lengths: str | None = None
    """LENGTH,...: the whole at each of these lengths of rows, of which a step then has as many as
    make data.length x data.batch_size tokens."""
    span: int = 32
    """For token mixers: how many near keys a window is; blocks are half as long, and those that
    choose keys choose twice as many."""
    dim: int = 128
    """Width of all members, a multiple of 32."""
    num_layers: int = 4
    """Blocks of all members."""
    rate: float = 1.0
    """Factor on the learning rates, quickstart's, of all members: below 1 for what continues."""
    initial: str | None = None
    """The folder of another comparison at one length, with the parameters of whose runs those of
    the same member and seed begin: a curriculum."""
    routing: Routing = "balanced"
    """How members with routers are trained: as they route by themselves, or with a fixed bias on
    the choice of experts, by Zipf's law or towards the same few for all tokens."""
    topology: str | None = None
    """Also models the time of a training step on this TPU, such as v5e:2x2 (needs libtpu; the runs
    then use the CPU)."""
    out: str = "runs/compare"
    """Where the runs and the report are kept."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(
                f"steps: {self.steps} with minutes {self.minutes}; need exactly one of the two"
            )
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes: {self.minutes}; need more than 0")
        for name in ("steps", "seeds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value}; need at least 1")
        if not self.rate > 0:
            raise ValueError(f"rate: {self.rate}; need more than 0")
        if self.data.tokenizer != "bytes":
            raise ValueError(f"data.tokenizer: {self.data.tokenizer!r}; members read 'bytes'")
        if not 0 < self.data.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction: {self.data.validation_fraction}; need a part to train "
                "on and a part to measure on"
            )
        if self.task == "recall" and not (
            self.data.path is None
            or (is_task(self.data.path) and isinstance(parse(self.data.path), Recall))
        ):
            raise ValueError(
                f"task: recall with data.path {self.data.path!r}; need recall:facts=N or none"
            )

        if self.lengths is not None:
            _ = self.parsed_lengths

    @property
    def parsed_lengths(self) -> list[int]:
        """Of `lengths`, rising. Raises ValueError for other than two or more different numbers."""
        parts = [part.strip() for part in (self.lengths or "").split(",")]
        numbers = sorted({int(part) for part in parts if part.isdecimal()})
        if len(numbers) < max(len(parts), 2) or numbers[0] < 1:
            raise ValueError(f"lengths: {self.lengths!r}; need two or more, as in 256,512,1024")
        return numbers

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in self.members.split(",")]


def run(options: Compare) -> int:
    """`bestiary compare`; the exit status, 128 + N when signal N ended it.

    Raises ValueError before any training for options that make no sense, unreadable data or a
    folder that holds something else.
    """
    if options.topology is not None:
        from bestiary.eval import topology as tpu

        tpu.quiet_libtpu()
        tpu.parse(options.topology)
    if options.initial is not None and not (Path(options.initial) / SETTINGS).is_file():
        raise ValueError(
            f"initial: {options.initial!r} holds no comparison at one length; need one"
        )
    start()
    out = Path(options.out)
    comparisons = [_comparison(options, data, folder) for data, folder in _rows(options, out)]
    if len(comparisons) > 1 and (out / SETTINGS).is_file():
        raise ValueError(f"out: {options.out!r} holds a comparison at one length; need another out")
    for comparison in comparisons:
        comparison.settings = _claim(comparison.out, options, comparison.data)
    try:
        with locked(out):
            _train(options, comparisons)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT
    except FloatingPointError as error:
        print(f"bestiary compare: error: dense, to measure its speed: {error}", file=sys.stderr)
        return 1
    if len(comparisons) == 1:
        name, tables = "comparison", compare_report.tables(comparisons[0].found())
    else:
        name = "lengths"
        tables = compare_lengths.tables([comparison.found() for comparison in comparisons])
    compare_report.show(tables)
    print(f"report: {out / name}.md\nfigure: {out / name}.png")
    return 1 if any(f for comparison in comparisons for f in comparison.failed.values()) else 0


def _train(options: Compare, comparisons: list[Comparison]) -> None:
    steps, minutes = options.steps, options.minutes
    for number, comparison in enumerate(comparisons, 1):
        if len(comparisons) > 1:
            print(f"length {comparison.data.length}", flush=True)
        if options.topology is not None:
            comparison.model_times(options.topology)
        comparison.fix_steps(steps, minutes)
        steps, minutes = comparison.settings["steps"], None  # as many at all lengths
        comparison.go()
        if len(comparisons) > 1:
            found = [other.found() for other in comparisons[:number]]
            compare_lengths.write(Path(options.out), command(options), found)


def _rows(options: Compare, out: Path) -> list[tuple[Data, Path]]:
    """The data of every length, and the folder of its comparison."""
    data = options.data
    if options.task == "recall" and data.path is None:
        data = replace(data, path=_RECALL)
    if options.lengths is None:
        return [(data, out)]
    tokens, found = data.length * data.batch_size, []
    for length in options.parsed_lengths:
        if tokens % length:
            raise ValueError(
                f"lengths: {length} does not divide the {tokens} tokens of a step, data.length "
                f"{data.length} x data.batch_size {data.batch_size}"
            )
        rows = replace(data, length=length, batch_size=tokens // length)
        found.append((rows, out / f"length-{length}"))
    return found


def _comparison(options: Compare, data: Data, out: Path) -> Comparison:
    members = sized(
        options.names,
        dim=options.dim,
        num_layers=options.num_layers,
        length=data.length,
        match=options.match,
        span=options.span,
    )
    quickstart = load_experiment("quickstart")
    optimizer = quickstart.optimizer
    assert optimizer.adam_learning_rate is not None
    optimizer = replace(
        optimizer,
        learning_rate=options.rate * optimizer.learning_rate,
        adam_learning_rate=options.rate * optimizer.adam_learning_rate,
    )
    experiments = {
        member.name: replace(
            quickstart,
            model=skewed(member.model, options.routing).unrolled(),
            data=data,
            optimizer=optimizer,
            minutes=None,
            steps=options.steps or 1,
            evaluation=Evaluation(every=0, batches=VALIDATION),
            checkpoints=Checkpoints(every=200, keep_best=0),
        )
        for member in members
    }
    if options.routing != "balanced" and all(
        experiments[member.name].model == member.model.unrolled() for member in members
    ):
        raise ValueError(f"routing: {options.routing!r}, but no member has routers; add moe")
    for experiment in experiments.values():
        check(experiment, experiment.mesh.build())
    load(data)  # refuses now what no run could read
    return Comparison(
        out=out,
        members=members,
        experiments=experiments,
        seeds=options.seeds,
        initial=None if options.initial is None else Path(options.initial),
        heading={
            "command": command(options),
            "match": options.match,
            "routing": options.routing,
            "topology": options.topology,
        },
    )


def command(options: Compare) -> str:
    """The command line that these options come from."""
    plain = Compare(members=options.members, steps=sys.maxsize)
    flags = [
        f"--{path.replace('_', '-')} {shlex.quote(str(value))}"
        for path, (_, value) in difference(plain, options).items()
        if value is not None
    ]
    return " ".join(["bestiary compare", options.members, *flags])


def _claim(out: Path, options: Compare, data: Data) -> Found:
    """The settings of the comparison in `out`, new or to be continued. Raises ValueError when it
    holds anything else."""
    asked = {
        "match": options.match,
        "minutes": options.minutes,
        "given_steps": options.steps,
        "dim": options.dim,
        "num_layers": options.num_layers,
        "routing": options.routing,
        "span": options.span,
        "rate": options.rate,
        "initial": options.initial,
        "data": to_json(data),
    }
    file = out / SETTINGS
    if file.is_file():
        try:
            there = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"out: {file} cannot be read: {error}") from None
        for name, value in asked.items():
            if there.get(name) != value:
                raise ValueError(
                    f"out: {options.out!r} holds another comparison, with {name} "
                    f"{there.get(name)!r}; need this value instead of {value!r}, or another out"
                )
        return there
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {options.out!r} holds no comparison; need a new or empty folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: {options.out!r}: {error.strerror}; need a folder") from None
    keep(out, asked)
    return asked
