"""Runs that are stopped, killed and damaged, and go on as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bestiary.train.checkpoint import load_run, restore, save_run, saved_steps
from bestiary.train.data import Data
from bestiary.train.experiment import (
    Checkpoints,
    Evaluation,
    Experiment,
    load_experiment,
    save_experiment,
)
from bestiary.train.log import read_metrics
from bestiary.train.mesh import Mesh
from bestiary.train.run import train

CHILD = """
import sys, time
from pathlib import Path
from bestiary.train.experiment import read_experiment
from bestiary.train.run import run
sys.exit(run(read_experiment(Path(sys.argv[1])), "tiny", started=time.monotonic()))
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(random.Random(0).choices("abcd efg\n", k=6000)))
    return str(path)


def tiny(text: str, run_dir: Path, **changes: Any) -> Experiment:
    fields = {
        "data": Data(path=text, length=16, batch_size=8),
        "evaluation": Evaluation(every=8, batches=3),
        "checkpoints": Checkpoints(every=4),
        "log_every": 2,
        "run_dir": str(run_dir),
        "steps": 24,
    }
    return replace(load_experiment("tiny"), **(fields | changes))


@pytest.fixture(scope="module")
def finished(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 24 steps that nothing interrupted."""
    return train(tiny(text, tmp_path_factory.mktemp("run")), "tiny")


def copy(finished: Path, to: Path) -> Path:
    """The run with its last checkpoint taken away, as if stopped after 20 steps."""
    shutil.copytree(finished, to)
    shutil.rmtree(to / "checkpoints" / "24")
    return to


def equal(a: Path, b: Path) -> bool:
    """Whether the newest parameters of two runs agree bit for bit."""
    one, other = load_run(a)[1], load_run(b)[1]
    same = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), one, other)
    return all(jax.tree.leaves(same))


def start(experiment: Experiment, beside: Path) -> subprocess.Popen:
    save_experiment(experiment, beside)
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(beside)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


def wait_for(run_dir: Path, step: int, child: subprocess.Popen) -> None:
    """Until the child has logged a step after `step`."""
    for _ in range(6000):
        lines = read_metrics(run_dir)
        if child.poll() is not None or (lines and lines[-1]["step"] > step):
            return
        time.sleep(0.02)
    raise TimeoutError


def test_finished_run_is_left_alone(text: str, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_text()
    assert train(tiny(text, finished), "tiny") == finished
    assert (finished / "metrics.jsonl").read_text() == before
    assert saved_steps(finished) == [20, 24]


def test_continues_bit_exactly(text: str, finished: Path, tmp_path: Path) -> None:
    run_dir = copy(finished, tmp_path / "run")
    train(tiny(text, run_dir), "tiny")
    assert equal(run_dir, finished)
    steps = [line["step"] for line in read_metrics(run_dir)]
    assert steps == list(range(2, 25, 2))
    losses = [[line["loss"] for line in read_metrics(r)] for r in (run_dir, finished)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_names_the_way_on(
    text: str, tmp_path: Path, number: signal.Signals
) -> None:
    experiment = tiny(text, tmp_path / "run", steps=100_000)
    child = start(experiment, tmp_path / "experiment.json")
    wait_for(tmp_path / "run", 5, child)
    child.send_signal(number)
    heard, _ = child.communicate(timeout=60)
    assert child.returncode == 128 + number, heard
    step = saved_steps(tmp_path / "run")[-1]
    last = heard.strip().splitlines()[-1]
    assert f"{number.name}, saved in {tmp_path}/run/checkpoints/{step}; the same command" in last
    assert "Traceback" not in heard


@pytest.mark.slow
def test_kill_at_any_moment(text: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 150, "checkpoints": Checkpoints(every=4)}
    whole = train(tiny(text, tmp_path / "whole", **changes), "tiny")
    experiment = tiny(text, tmp_path / "run", **changes)
    moments, step = random.Random(time.time_ns()), 0
    for _ in range(3):
        child = start(experiment, tmp_path / "experiment.json")
        wait_for(tmp_path / "run", step, child)
        time.sleep(moments.uniform(0, 0.5))
        child.kill()
        heard, _ = child.communicate()
        assert "Traceback" not in heard
        step = max(saved_steps(tmp_path / "run"), default=0)
    child = start(experiment, tmp_path / "experiment.json")
    heard, _ = child.communicate(timeout=120)
    assert child.returncode == 0, heard
    assert equal(tmp_path / "run", whole)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(2, 151, 2))


DAMAGES = {
    "no manifest": lambda f: (f / "params" / "manifest.ocdbt").unlink(),
    "no params": lambda f: shutil.rmtree(f / "params"),
    "no optimizer": lambda f: shutil.rmtree(f / "optimizer"),
    "no run": lambda f: shutil.rmtree(f / "run"),
    "no sums": lambda f: (f / "sums.json").unlink(),
    "empty": lambda f: [shutil.rmtree(f), f.mkdir()],
    "garbled sums": lambda f: (f / "sums.json").write_bytes(b"\xff{"),
    "sums of another kind": lambda f: (f / "sums.json").write_text("[1]"),
    "garbled run": lambda f: (f / "run" / "metadata").write_text("{"),
    "other run": lambda f: (f / "run" / "metadata").write_text('{"step": 1}'),
    "truncated params": lambda f: truncate(largest(f / "params")),
    "truncated optimizer": lambda f: truncate(largest(f / "optimizer")),
    "flipped bit in params": lambda f: flip(largest(f / "params")),
    "flipped bit in optimizer": lambda f: flip(largest(f / "optimizer")),
    "no metadata": lambda f: (f / "params" / "_METADATA").unlink(),
}


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_newest_checkpoint(
    name: str, text: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    DAMAGES[name](run_dir / "checkpoints" / "24")
    load_run(run_dir)
    said = capsys.readouterr().err
    assert said.startswith("checkpoint 24 is damaged (") and said.endswith("using 20\n")
    experiment = tiny(text, run_dir)
    restored = restore(run_dir, experiment, experiment.mesh.build())
    assert restored is not None and restored[1]["step"] == 20
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "24.damaged" in said
    assert (run_dir / "checkpoints" / "24.damaged").is_dir()


def test_run_goes_on_from_before_the_damage(text: str, finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    flip(largest(run_dir / "checkpoints" / "24"))
    (run_dir / "checkpoints" / "28.orbax-checkpoint-tmp").mkdir()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 26, "lo')
    train(tiny(text, run_dir), "tiny")
    assert equal(run_dir, finished)
    assert saved_steps(run_dir) == [20, 24]


def test_nothing_sound_is_an_error_and_moves_nothing(
    text: str, finished: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    for step in saved_steps(run_dir):
        flip(largest(run_dir / "checkpoints" / str(step)))
    for call in (lambda: load_run(run_dir), lambda: train(tiny(text, run_dir), "tiny")):
        with pytest.raises(ValueError, match="every checkpoint in .* is damaged"):
            call()
    assert saved_steps(run_dir) == [20, 24]


@pytest.mark.parametrize("sizes", [(4, 2, 1), (1, 4, 2), (2, 2, 2)], ids=str)
def test_restores_on_another_mesh(sizes: tuple[int, int, int], text: str, finished: Path) -> None:
    mesh = Mesh(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    experiment = tiny(text, finished)
    here = restore(finished, experiment, experiment.mesh.build())
    there = restore(finished, replace(experiment, mesh=mesh), mesh.build())
    assert here is not None and there is not None
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(r[0]) for r in (here, there)))
    if sizes[2] > 1:
        gate = there[0]["params"]["blocks"]["ffn"]["gate"]
        assert gate.addressable_shards[0].data.size * sizes[1] * sizes[2] == gate.size


def test_load_run_on_a_mesh(finished: Path) -> None:
    mesh = Mesh(fsdp=4, tensor=2).build()
    sharded, single = load_run(finished, mesh=mesh)[1], load_run(finished)[1]
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (sharded, single)))
    assert len(jax.tree.leaves(single)[0].devices()) == 1
    assert len(jax.tree.leaves(sharded)[0].devices()) == 8


def test_load_run_says_what_is_missing(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run; need a folder with experiment.json"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="step: 7; .* has checkpoints of 20, 24"):
        load_run(finished, step=7)
    shutil.copy(finished / "experiment.json", tmp_path)
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        load_run(tmp_path)


def test_save_run_is_read_and_trained_on(text: str, finished: Path, tmp_path: Path) -> None:
    experiment, params = load_run(finished)
    save_run(tmp_path / "run", experiment, params)
    assert equal(tmp_path / "run", finished)
    with pytest.raises(ValueError, match="exists; need a new or empty folder"):
        save_run(tmp_path / "run", experiment, params)
    run_dir = train(tiny(text, tmp_path / "run"), "tiny")
    first, last = (read_metrics(r)[i]["loss"] for r, i in ((run_dir, 0), (finished, -1)))
    assert abs(first - last) < 0.7  # begins where the other ended


def test_keeps_the_newest_and_the_best(text: str, tmp_path: Path) -> None:
    # a learning rate that ruins what the first steps have learnt: the best is an early one
    experiment = tiny(text, tmp_path, checkpoints=Checkpoints(every=8, keep=2, keep_best=1))
    wild = replace(experiment.optimizer, learning_rate=2.0)
    run_dir = train(replace(experiment, optimizer=wild, steps=40), "tiny")
    losses = {line["step"]: line.get("validation_loss") for line in read_metrics(run_dir)}
    best = min((loss, step) for step, loss in losses.items() if loss is not None)[1]
    assert saved_steps(run_dir) == sorted({best, 32, 40})


def test_only_one_process_at_a_time(text: str, tmp_path: Path) -> None:
    child = start(tiny(text, tmp_path / "run", steps=100_000), tmp_path / "experiment.json")
    wait_for(tmp_path / "run", 0, child)
    with pytest.raises(ValueError, match="is in use by another process"):
        train(tiny(text, tmp_path / "run", steps=100_000), "tiny")
    child.kill()
    child.communicate()


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("steps", {"steps": 25}),
        ("seed", {"seed": 1}),
        ("data.length", {"data": Data(length=8, batch_size=8)}),
        ("evaluation.batches", {"evaluation": Evaluation(every=8)}),
    ],
)
def test_another_experiment_is_refused(
    field: str, changes: dict, text: str, finished: Path
) -> None:
    if "data" in changes:
        changes = {"data": replace(changes["data"], path=text)}
    before = (finished / "experiment.json").read_text()
    with pytest.raises(ValueError, match=f"holds another run, with {field} "):
        train(tiny(text, finished, **changes), "tiny")
    assert (finished / "experiment.json").read_text() == before


def test_run_directory_that_is_something_else(text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="run_dir: .* is a file"):
        train(tiny(text, tmp_path / "file"), "tiny")
    with pytest.raises(ValueError, match="run_dir: .* holds 'file' but no run"):
        train(tiny(text, tmp_path), "tiny")
    with pytest.raises(ValueError, match="run_dir: .*; need a folder"):
        train(tiny(text, tmp_path / "file" / "below"), "tiny")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "experiment.json").write_text(json.dumps({"class": "nonsense"}))
    with pytest.raises(ValueError, match="experiment.json: class"):
        train(tiny(text, tmp_path / "bad"), "tiny")
