"""One device, eight devices and two processes compute the same run."""

import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.train.checkpoint import load_run
from bestiary.train.data import Data, load, train_iterator
from bestiary.train.experiment import Checkpoints, Evaluation, Experiment, load_experiment
from bestiary.train.log import read_metrics
from bestiary.train.mesh import Mesh, placed
from bestiary.train.optimizer import Optimizer
from bestiary.train.placement import check
from bestiary.train.run import train
from bestiary.train.step import init_state, make_step
from bestiary.zoo.decoder import Decoder
from bestiary.zoo.llama import llama, multi_head, swiglu

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


def tiny(text: str, **changes: Any) -> Experiment:
    fields = {"data": Data(path=text, length=16, batch_size=16), "log_every": 1, "steps": 6}
    return replace(load_experiment("tiny"), **(fields | changes))


def losses(experiment: Experiment, devices: int = 8) -> tuple[list[float], Any]:
    """Losses of four steps on so many devices, and the parameters after them."""
    mesh = experiment.mesh.build(jax.devices()[:devices])
    check(experiment, mesh)
    _, corpus, _ = load(experiment.data)
    state, step = init_state(experiment, mesh), make_step(experiment, mesh)
    found = []
    with placed(mesh, experiment.mesh.table):
        for batch, _ in zip(train_iterator(corpus, experiment.data, 0), range(4), strict=False):
            state, metrics = step(state, batch, jnp.int32(4))
            found.append(float(metrics["loss"]))
    return found, jax.device_get(state["params"])


@pytest.mark.parametrize(
    ("sizes", "accumulate", "optimizer"),
    [
        ((8, 1, 1), 1, "adamw"),
        ((1, 4, 2), 2, "adamw"),
        ((2, 2, 2), 2, "muon"),
        ((2, 4, 1), 1, "adafactor"),
        ((4, 1, 2), 4, "lion"),
    ],
    ids=str,
)
def test_devices_do_not_change_the_losses(
    sizes: tuple[int, int, int], accumulate: int, optimizer: Any, text: str
) -> None:
    mesh = Mesh(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    rate = {"muon": 0.02, "lion": 1e-3}.get(optimizer, 0.01)
    experiment = tiny(text, optimizer=Optimizer(name=optimizer, learning_rate=rate))
    alone, params = losses(experiment, devices=1)
    together, sharded = losses(replace(experiment, mesh=mesh, accumulate=accumulate))
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    # lion and adam turn rounding of a gradient near 0 into a step of either sign
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=4 * rate), sharded, params)


def model(**changes: Any) -> Decoder:
    fields = {"vocab_size": 256, "num_layers": 1, "tied": True}
    fields |= {"attention": multi_head(16, 2), "ffn": swiglu(16, 48)} | changes
    return llama(**fields)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("mesh: data rest x fsdp 3 x tensor 1; need a product of 8", {"mesh": Mesh(fsdp=3)}),
        ("mesh: data 4 x fsdp 1 x tensor 1; need a product of 8", {"mesh": Mesh(data=4)}),
        ("mesh: tensor splits '(kv_)?heads' of .* into 4; need a divisor of 2",
         {"mesh": Mesh(tensor=4)}),
        ("mesh: tensor splits 'mlp' of .* into 2; need a divisor of 47",
         {"mesh": Mesh(tensor=2), "model": model(ffn=swiglu(16, 47))}),
        ("mesh: tensor splits 'vocab' of .* into 2; need a divisor of 257",
         {"mesh": Mesh(tensor=2), "model": model(vocab_size=257)}),
        ("data.batch_size: 12 with accumulate 1; need a multiple of 8",
         {"data": Data(length=16, batch_size=12)}),
        ("data.batch_size: 24 with accumulate 2; need a multiple of 16",
         {"data": Data(length=16, batch_size=24), "accumulate": 2}),
        ("data.length: 18; need a multiple of 4",
         {"data": Data(length=18, batch_size=16),
          "mesh": Mesh(tensor=4, rules={"seq": "tensor"})}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(message: str, changes: dict, text: str) -> None:
    experiment = tiny(text, **changes)
    with pytest.raises(ValueError, match=message):
        check(experiment, experiment.mesh.build())


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run_two(experiment: Experiment, file: Path) -> str:
    """Two processes of four devices each run the experiment; what the first one said."""
    from bestiary.train.experiment import save_experiment

    save_experiment(experiment, file)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(file)],
            env=env | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    heard = [child.communicate(timeout=240)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], heard
    return heard[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(),
        Mesh(fsdp=4, tensor=2),
        Mesh(tensor=8, rules={"batch": "data", "mlp": "tensor"}),  # both hold every row
    ],
    ids=["data", "fsdp", "tensor"],
)
def test_two_processes_equal_one(mesh: Mesh, text: str, tmp_path: Path) -> None:
    experiment = tiny(
        text,
        mesh=mesh,
        evaluation=Evaluation(every=3, batches=2),
        checkpoints=Checkpoints(every=3),
    )
    one = train(replace(experiment, run_dir=str(tmp_path / "one")), "tiny")
    two = tmp_path / "two"
    run_two(replace(experiment, run_dir=str(two)), tmp_path / "experiment.json")
    for name in ("loss", "validation_loss"):
        a, b = ([line.get(name) for line in read_metrics(r) if name in line] for r in (one, two))
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert [line["step"] for line in read_metrics(two)] == list(range(1, 7))
    assert read_metrics(two)[-1]["compilations"] == 1
    params = [load_run(r)[1] for r in (one, two)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *params)


@pytest.mark.slow
def test_processes_continue_each_others_runs(text: str, tmp_path: Path) -> None:
    experiment = tiny(text, checkpoints=Checkpoints(every=3), run_dir=str(tmp_path / "run"))
    whole = train(replace(experiment, run_dir=str(tmp_path / "whole")), "tiny")
    train(experiment, "tiny")
    # as if it had stopped after 3 steps
    (tmp_path / "run" / "checkpoints" / "6").rename(tmp_path / "6")
    heard = run_two(experiment, tmp_path / "experiment.json")
    assert "goes on after step 3" in heard
    params = [load_run(r)[1] for r in (whole, tmp_path / "run")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *params)
    assert json.loads((tmp_path / "run" / "experiment.json").read_text())["steps"] == 6
