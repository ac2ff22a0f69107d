"""The runs of a comparison, one after another in this process.

A process per run would outlive a comparison that is killed, start anew every time, and two cannot
share a TPU. The price: a run that the system ends for want of memory ends the comparison, which the
same command then continues.
"""

import json
import statistics
import sys
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bestiary.eval.accounting import account
from bestiary.eval.compare_members import Member
from bestiary.eval.compare_report import write
from bestiary.eval.compare_statistics import Found, routing_of, summary
from bestiary.eval.evaluate import count_bytes, evaluate
from bestiary.train import step
from bestiary.train.checkpoint import load_run
from bestiary.train.data import Data, load, validation_batches
from bestiary.train.experiment import Experiment, language_model
from bestiary.train.files import put_json
from bestiary.train.log import read_metrics
from bestiary.train.loop import Interrupted
from bestiary.train.mesh import Mesh
from bestiary.train.run import train

SETTINGS, RESULT = "settings.json", "result.json"
VALIDATION = 100  # batches
_CALIBRATION = 30  # steps


@dataclass(kw_only=True)
class Comparison:
    """The runs that are to be made, and what is known of those that are."""

    out: Path
    members: list[Member]
    experiments: dict[str, Experiment]
    """How each member is trained, but for steps and seed."""
    seeds: int
    initial: Path | None = None
    """Whose runs, of the same member and seed, these continue."""
    heading: Found
    """What the report says of the whole: "command", "match", "routing", "topology" (or None)."""
    settings: Found = field(default_factory=dict)
    """What SETTINGS keeps: with the number of "steps", "memory" and "modelled" times, once they are
    known."""
    results: dict[str, dict[int, Found]] = field(init=False)
    """By member and seed."""
    failed: dict[str, dict[str, str]] = field(init=False)
    """One line by member and seed."""

    def __post_init__(self) -> None:
        self.results = {member.name: {} for member in self.members}
        self.failed = {member.name: {} for member in self.members}

    @property
    def data(self) -> Data:
        return language_model(self.experiments["dense"])[1]

    def fix_steps(self, steps: int | None, minutes: float | None) -> None:
        """Settles the length of the runs: given, or what the dense member does in the minutes."""
        if "steps" not in self.settings:
            self.settings["steps"] = steps or self._calibrated(minutes or 0)
            keep(self.out, self.settings)

    def _calibrated(self, minutes: float) -> int:
        run_dir, dense = self.out / "calibration", self.experiments["dense"]
        train(replace(dense, steps=_CALIBRATION, run_dir=str(run_dir)), "calibration")
        rate = read_metrics(run_dir)[-1]["tokens_per_second"]
        return max(1, round(60 * minutes * rate / (self.data.batch_size * self.data.length)))

    def model_times(self, name: str) -> None:
        """Models the members' training steps on a topology; a line of text where there is none."""
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
                optimizer=self.experiments[member.name].optimizer,
            )
            try:
                modelled = plan(experiment, topology, name=member.name).programs[0].modelled
                known[member.name] = modelled.overlapped.seconds if modelled else "does not fit"
            except Exception as error:
                known[member.name] = _line(error)
            keep(self.out, self.settings)

    def go(self) -> None:
        """Makes the runs that are missing, all members of a seed before the next one."""
        runs = [(seed, m.name) for seed in range(self.seeds) for m in self.members]
        for number, (seed, name) in enumerate(runs, 1):
            finished = _run_dir(self.out, name, seed) / RESULT
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

    def _made(self, name: str, seed: int) -> Found:
        """What a run shows that is made, or continued, now."""
        run_dir, steps = _run_dir(self.out, name, seed), self.settings["steps"]
        experiment = replace(
            self.experiments[name],
            steps=steps,
            log_every=max(1, steps // 200),
            seed=seed,
            run_dir=str(run_dir),
            initial=None if self.initial is None else str(_run_dir(self.initial, name, seed)),
        )
        memory = self.settings.setdefault("memory", {})
        if name not in memory:
            memory[name] = step_memory(experiment)
            keep(self.out, self.settings)
        train(experiment, name)
        found = measure(run_dir)
        put_json(run_dir / RESULT, found)
        return found

    def found(self) -> Found:
        """What is known so far, fit for JSON."""
        return self.heading | {
            "steps": self.settings["steps"],
            "length": self.data.length,
            "tokens_per_step": self.data.batch_size * self.data.length,
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
            "cache_bytes": figures.cache_bytes,
            "step_bytes": self.settings.get("memory", {}).get(name),
            "runs": [
                str(_run_dir(self.out, name, s).relative_to(self.out)) for s in self.results[name]
            ],
            "failed": self.failed[name],
        }
        if (topology := self.heading["topology"]) is not None:
            facts["modelled_step_seconds"] = self.settings["modelled"][topology][name]
        return summary(facts, self.results[name], self.results["dense"])


def measure(run_dir: Path) -> Found:
    """What a finished run shows: on the held-out rows, and in its log."""
    experiment, params = load_run(run_dir)
    model, data = language_model(experiment)
    tokenizer, _, validation = load(data)
    batches = islice(validation_batches(validation, data), VALIDATION)
    bytes_of = count_bytes(tokenizer, model.vocab_size)
    found = evaluate(model, params, batches, bytes_of)
    shares = [share for layers in found.nonzero.values() for share in layers]
    logged = read_metrics(run_dir)
    speed = statistics.median(line["tokens_per_second"] for line in logged)
    return {
        "validation_loss": found.nats_per_token,
        "accuracy": found.accuracy,
        "exact_rows": found.exact_rows,
        "nonzero": sum(shares) / len(shares) if shares else None,
        "tokens_per_second": speed,
        "step_seconds": data.units / speed,
        "seconds": logged[-1]["seconds"],
        "routing": routing_of(run_dir),
    }


def step_memory(experiment: Experiment) -> int:
    """Bytes on a device of a training step: its arguments and what it computes in between."""
    mesh = experiment.mesh.build()
    state, batch = step.abstract_state(experiment, mesh), step.abstract_batch(experiment, mesh)
    total = jax.ShapeDtypeStruct((), jnp.int32, sharding=state["step"].sharding)
    program: Any = step.make_step(experiment, mesh)
    sizes = program.lower(state, batch, total).compile().memory_analysis()
    return sizes.argument_size_in_bytes + sizes.temp_size_in_bytes


def keep(out: Path, settings: Found) -> None:
    """Writes SETTINGS."""
    put_json(out / SETTINGS, settings)


def _run_dir(out: Path, name: str, seed: int) -> Path:
    return out / name / f"seed-{seed}"


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
