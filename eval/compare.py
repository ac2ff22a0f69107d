"""`bestiary compare`: architectures of one budget, trained on the same tokens in the same order.

The members are trained one after another in this process, each run by `train.run` in a directory of
its own. A process per run would outlive a comparison that is killed, start anew every time, and two
cannot share a TPU; the price is that running out of memory may end the comparison, which the same
command then continues.
"""

import json
import shlex
import signal
import sys
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bestiary.eval.accounting import account
from bestiary.eval.compare_members import MEMBERS, Match, Member, sized
from bestiary.eval.compare_report import Found, routing_of, show, summary, write
from bestiary.eval.evaluate import count_bytes, evaluate
from bestiary.eval.routing import Routing, skewed
from bestiary.train.checkpoint import load_run
from bestiary.train.data import Data, load, validation_batches
from bestiary.train.experiment import Checkpoints, Evaluation, Experiment, load_experiment
from bestiary.train.log import read_metrics
from bestiary.train.mesh import Mesh
from bestiary.train.placement import check
from bestiary.train.recall import is_recall
from bestiary.train.run import Interrupted, train
from bestiary.train.runtime import locked, start
from bestiary.train.tree_json import difference, to_json

SETTINGS, RESULT = "settings.json", "result.json"
_RECALL = "recall:facts=8192"
_VALIDATION = 100  # batches
_CALIBRATION = 30  # steps


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Train several architectures of one budget on the same tokens and compare them.

    Members differ in their feed-forwards, whose width is solved for. The table, the figures and the
    curves are written to OUT. A comparison that was stopped goes on by the same command; members
    and seeds may be added to one. Exit status 1 when a run failed.
    """

    members: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="MEMBER,...", help=f"dense, and any of {', '.join(list(MEMBERS)[1:])}."
        ),
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
    dim: int = 128
    """Width of all members, a multiple of 32."""
    num_layers: int = 4
    """Blocks of all members."""
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
        if self.data.tokenizer != "bytes":
            raise ValueError(f"data.tokenizer: {self.data.tokenizer!r}; members read 'bytes'")
        if not 0 < self.data.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction: {self.data.validation_fraction}; need a part to train "
                "on and a part to measure on"
            )
        if self.task == "recall" and not (self.data.path is None or is_recall(self.data.path)):
            raise ValueError(
                f"task: recall with data.path {self.data.path!r}; need recall:facts=N or none"
            )

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
    start()
    data, out = options.data, Path(options.out)
    if options.task == "recall" and data.path is None:
        data = replace(data, path=_RECALL)
    members = sized(
        options.names,
        dim=options.dim,
        num_layers=options.num_layers,
        length=data.length,
        match=options.match,
    )
    bases = {
        member.name: replace(
            load_experiment("quickstart"),
            model=skewed(member.model, options.routing).unrolled(),
            data=data,
            minutes=None,
            steps=options.steps or 1,
            evaluation=Evaluation(every=0, batches=_VALIDATION),
            checkpoints=Checkpoints(every=200, keep_best=0),
        )
        for member in members
    }
    if options.routing != "balanced" and all(
        bases[member.name].model == member.model.unrolled() for member in members
    ):
        raise ValueError(f"routing: {options.routing!r}, but no member has routers; add moe")
    for base in bases.values():
        check(base, base.mesh.build())
    load(data)
    settings = _claim(out, options, data)
    comparison = _Comparison(options, out, members, bases, settings)
    try:
        with locked(out):
            comparison.go()
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT
    except FloatingPointError as error:
        print(f"bestiary compare: error: dense, to measure its speed: {error}", file=sys.stderr)
        return 1
    show(comparison.found())
    print(f"report: {out / 'comparison.md'}\nfigure: {out / 'comparison.png'}")
    return 1 if any(comparison.failed.values()) else 0


class _Comparison:
    """The runs that are to be made, and those that are."""

    def __init__(
        self,
        options: Compare,
        out: Path,
        members: list[Member],
        bases: dict[str, Experiment],
        settings: Found,
    ):
        self.options, self.out, self.members, self.bases = options, out, members, bases
        self.settings = settings
        self.data = bases["dense"].data
        self.results: dict[str, dict[int, Found]] = {m.name: {} for m in members}
        self.failed: dict[str, dict[str, str]] = {m.name: {} for m in members}

    def go(self) -> None:
        """Makes the runs that are missing, all members of a seed before the next one."""
        if self.options.topology is not None:
            self._model_times(self.options.topology)
        if "steps" not in self.settings:
            self.settings["steps"] = self.options.steps or self._calibrated()
            self._keep_settings()
        runs = [(seed, m.name) for seed in range(self.options.seeds) for m in self.members]
        for number, (seed, name) in enumerate(runs, 1):
            finished = self._run_dir(name, seed) / RESULT
            if finished.is_file():
                self.results[name][seed] = json.loads(finished.read_text())
                continue
            print(f"[{number}/{len(runs)}] {name}, seed {seed}", flush=True)
            try:
                self.results[name][seed] = self._made(name, seed)
            except Interrupted:
                raise
            except Exception as error:
                self.failed[name][str(seed)] = _line(error)
                print(f"{name}, seed {seed} failed: {_line(error)}", file=sys.stderr, flush=True)
            write(self.out, self.found())
        write(self.out, self.found())

    def found(self) -> Found:
        """What is known so far, fit for JSON."""
        steps, data = self.settings["steps"], self.data
        return {
            "command": command(self.options),
            "match": self.options.match,
            "steps": steps,
            "tokens_per_step": data.batch_size * data.length,
            "routing": self.options.routing,
            "topology": self.options.topology,
            "settings": self.settings,
            "members": [self._row(member) for member in self.members],
        }

    def _row(self, member: Member) -> Found:
        name, figures = member.name, account(member.model, self.data.length)
        facts = {
            "name": name,
            "width": member.width,
            "budget": member.budget,
            "achieved": member.achieved,
            "off": member.off,
            "active_params": figures.params_active,
            "total_params": figures.params_total,
            "train_flops_per_token": figures.training_flops_total,
            "forward_flops_active_per_token": figures.forward_flops_active,
            "decode_bytes_per_token": figures.decode_bytes_active,
            "runs": [str(self._run_dir(name, s).relative_to(self.out)) for s in self.results[name]],
            "failed": self.failed[name],
        }
        if self.options.topology is not None:
            facts["modelled_step_seconds"] = self.settings["modelled"][self.options.topology][name]
        return summary(facts, self.results[name], self.results["dense"])

    def _run_dir(self, name: str, seed: int) -> Path:
        return self.out / name / f"seed-{seed}"

    def _made(self, name: str, seed: int) -> Found:
        """What a run shows that is made, or continued, now."""
        run_dir, steps = self._run_dir(name, seed), self.settings["steps"]
        experiment = replace(
            self.bases[name],
            steps=steps,
            log_every=max(1, steps // 200),
            seed=seed,
            run_dir=str(run_dir),
        )
        train(experiment, name)
        found = measure(run_dir)
        _write_json(run_dir / RESULT, found)
        return found

    def _calibrated(self) -> int:
        """Steps of the dense member that fit into the minutes."""
        run_dir = self.out / "calibration"
        experiment = replace(self.bases["dense"], steps=_CALIBRATION, run_dir=str(run_dir))
        train(experiment, "calibration")
        rate = read_metrics(run_dir)[-1]["tokens_per_second"]
        seconds = 60 * (self.options.minutes or 0)
        return max(1, round(seconds * rate / (self.data.batch_size * self.data.length)))

    def _model_times(self, name: str) -> None:
        """Of the members' training steps on a topology; a line of text where there is none."""
        from bestiary.eval.plan import experiment_for, plan
        from bestiary.eval.topology import parse

        topology = parse(name)
        devices = len(topology.devices)
        known = self.settings.setdefault("modelled", {}).setdefault(name, {})
        for member in self.members:
            if member.name in known:
                continue
            print(f"compiling {member.name} for {name}", flush=True)
            experiment = experiment_for(
                member.model,
                devices,
                mesh=Mesh(data=devices),
                batch=-(-self.data.batch_size // devices) * devices,
                length=self.data.length,
                remat="none",
                optimizer=self.bases[member.name].optimizer,
            )
            try:
                modelled = plan(experiment, topology, name=member.name).programs[0].modelled
                known[member.name] = modelled.overlapped.seconds if modelled else "does not fit"
            except Exception as error:
                known[member.name] = _line(error)
            self._keep_settings()

    def _keep_settings(self) -> None:
        _write_json(self.out / SETTINGS, self.settings)


def command(options: Compare) -> str:
    """The command line that these options come from."""
    plain = Compare(members=options.members, steps=sys.maxsize)
    flags = [
        f"--{path.replace('_', '-')} {shlex.quote(str(value))}"
        for path, (_, value) in difference(plain, options).items()
        if value is not None
    ]
    return " ".join(["bestiary compare", options.members, *flags])


def measure(run_dir: Path) -> Found:
    """What a finished run shows: on the held-out rows, and in its log."""
    experiment, params = load_run(run_dir)
    tokenizer, _, validation = load(experiment.data)
    batches = islice(validation_batches(validation, experiment.data), _VALIDATION)
    bytes_of = count_bytes(tokenizer, experiment.model.vocab_size)
    found = evaluate(experiment.model, params, batches, bytes_of)
    shares = [share for layers in found.nonzero.values() for share in layers]
    last = read_metrics(run_dir)[-1]
    return {
        "validation_loss": found.nats_per_token,
        "accuracy": found.accuracy,
        "nonzero": sum(shares) / len(shares) if shares else None,
        "tokens_per_second": last["tokens_per_second"],
        "seconds": last["seconds"],
        "routing": routing_of(run_dir),
    }


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
    _write_json(file, asked)
    return asked


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _write_json(path: Path, value: Any) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(value, indent=2) + "\n")
    beside.replace(path)
