"""The training job: schedules, optimisers, the step, budgets, what a run directory holds."""

import json
import math
import random
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import monitoring
from optax import contrib

from bestiary.layers.base import flatten, params_of
from bestiary.train.checkpoint import load_run, saved_steps
from bestiary.train.clock import Clock
from bestiary.train.data import Data, load, train_iterator
from bestiary.train.experiment import Checkpoints, Evaluation, Experiment, load_experiment
from bestiary.train.log import Log, layer_metrics, read_metrics
from bestiary.train.mesh import placed
from bestiary.train.objective import NextToken
from bestiary.train.optimizer import Optimizer, Schedule
from bestiary.train.run import train
from bestiary.train.step import State, init_state, make_step
from bestiary.zoo.decoder import Decoder
from bestiary.zoo.llama import llama, multi_head, swiglu
from bestiary.zoo.mamba import mamba_tiny


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(random.Random(0).choices("abcd efg\n", k=6000)))
    return str(path)


def tiny(text: str, **changes: Any) -> Experiment:
    fields = {
        "data": Data(path=text, length=16, batch_size=8),
        "evaluation": Evaluation(every=8, batches=3),
        "checkpoints": Checkpoints(every=8),
        "log_every": 2,
        "steps": 24,
    }
    return replace(load_experiment("tiny"), **(fields | changes))


def tiny_model(**changes: Any) -> Decoder:
    fields = {"vocab_size": 256, "num_layers": 2, "tied": True}
    fields |= {"attention": multi_head(16, 2), "ffn": swiglu(16, 48)} | changes
    return llama(**fields)


def oracle(schedule: Schedule, step: int, total: int) -> float:
    """The share of the peak by its definition, in double precision."""
    done = (step + 1) / total
    warm = 1.0 if not schedule.warmup else min(1.0, done / schedule.warmup)
    start = 1 - schedule.cooldown if schedule.decay == "wsd" else schedule.warmup
    if done <= start:
        return warm
    part = (done - start) / (1 - start)
    left = (1 + math.cos(math.pi * part)) / 2 if schedule.decay == "cosine" else 1 - part
    return warm * (schedule.final + (1 - schedule.final) * left)


@pytest.mark.parametrize("total", [1, 7, 1000, 300_000])
@pytest.mark.parametrize("decay", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0.0, 0.1])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_schedule_against_its_definition(
    decay: Any, warmup: float, final: float, total: int
) -> None:
    schedule = Schedule(decay=decay, warmup=warmup, cooldown=0.3, final=final)
    steps = np.unique(np.linspace(0, total - 1, 50).astype(int))
    got = jax.vmap(lambda s: schedule(s, jnp.int32(total)))(jnp.asarray(steps, jnp.int32))
    want = [oracle(schedule, int(s), total) for s in steps]
    np.testing.assert_allclose(got, want, atol=2e-6)
    if total > 1:
        np.testing.assert_allclose(got[-1], final, atol=2e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_weight_decay_spares_gains(name: Any) -> None:
    declared = tiny_model().declare()
    params = tiny_model().init(jax.random.key(0))
    # at gradient 0 only the decay moves a parameter
    zero = jax.tree.map(jnp.zeros_like, params)
    updates = []
    for decay in (0.0, 0.5):
        tx = Optimizer(name=name, weight_decay=decay, clip=0.0).build(declared)
        updates.append(dict(flatten(tx.update(zero, tx.init(params), params)[0])))
    for path, param in flatten(declared):
        moved = float(jnp.abs(updates[1][path] - updates[0][path]).max())
        value = dict(flatten(params))[path]
        is_gain = len(param.shape) - param.batch_ndim < 2
        assert ("norm/" in path) == is_gain, path
        spared = is_gain or (name == "muon" and path == "embedding/table")
        expected = 0.0 if spared else 0.5 * float(jnp.abs(value).max())
        assert moved == pytest.approx(expected, rel=1e-5), path


def test_weight_decay_spares_what_is_declared_without() -> None:
    declared = mamba_tiny().declare()
    params = mamba_tiny().init(jax.random.key(0))
    tx = Optimizer(weight_decay=0.5, clip=0.0).build(declared)
    zero = jax.tree.map(jnp.zeros_like, params)
    moved = dict(flatten(tx.update(zero, tx.init(params), params)[0]))
    names = {path.rsplit("/")[-1] for path, update in moved.items() if not np.any(update)}
    assert names >= {"A_log", "D"} and not names & {"out", "table", "x"}


def test_muon_sees_the_matrices_of_stacked_heads() -> None:
    model = tiny_model(attention=multi_head(16, 4), ffn=swiglu(16, 40))
    declared = model.declare()
    params = model.init(jax.random.key(0))
    gradient = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)
    tx = Optimizer(name="muon", weight_decay=0.0, clip=0.0).build(declared)
    got = dict(flatten(tx.update(gradient, tx.init(params), params)[0]))
    gradients = dict(flatten(gradient))
    plain = contrib.muon(1.0, beta=0.9, weight_decay=0.0)
    seen = 0
    for path, param in flatten(declared):
        if param.inputs is None:
            continue
        rows = math.prod(param.shape[param.batch_ndim :][: param.inputs])
        for i in range(param.shape[0]):
            matrix = gradients[path][i].reshape(rows, -1)
            want: Any = plain.update([matrix], plain.init([matrix]), [matrix])[0]
            np.testing.assert_allclose(
                got[path][i].reshape(rows, -1), want[0], atol=2e-5, err_msg=path
            )
            seen += 1
    assert seen == 2 * 7  # query, key, value, out, gate, up, down of both layers


def one_step(experiment: Experiment, **batch: Any) -> tuple[State, dict]:
    """A step with all the rows given, on one device."""
    mesh = experiment.mesh.build(jax.devices()[:1])
    _, corpus, _ = load(experiment.data)
    rows = next(train_iterator(corpus, experiment.data, 0)) | batch
    with placed(mesh, experiment.mesh.table):
        step = make_step(experiment, mesh)
        return step(init_state(experiment, mesh), rows, jnp.int32(10))


@pytest.mark.parametrize("objective", [NextToken(), NextToken(z_loss=1e-2, chunks=4)], ids=str)
def test_accumulation_is_one_large_batch(objective: NextToken, text: str) -> None:
    # parts of unequal weight: a mean of means would differ
    weights = np.random.default_rng(0).integers(0, 2, (8, 16)).astype(np.float32)
    weights[1::4] = 0
    sgd = Optimizer(name="lion", b1=0.0, b2=0.0, learning_rate=1e-2, clip=0.0)
    outcomes = [
        one_step(tiny(text, accumulate=n, objective=objective, optimizer=sgd), weights=weights)
        for n in (1, 4)
    ]
    for name in ("loss", "grad_norm", "tokens"):
        np.testing.assert_allclose(outcomes[0][1][name], outcomes[1][1][name], rtol=2e-6)


def steps(experiment: Experiment, weights: list[float]) -> tuple[list[State], list[dict]]:
    """States before and after steps whose batches have these weights."""
    mesh = experiment.mesh.build(jax.devices()[:1])
    _, corpus, _ = load(experiment.data)
    batches = train_iterator(corpus, experiment.data, 0)
    states, metrics = [init_state(experiment, mesh)], []
    with placed(mesh, experiment.mesh.table):
        step = make_step(experiment, mesh)
        for weight, batch in zip(weights, batches, strict=False):
            batch = batch | {"weights": np.full_like(batch["weights"], weight)}
            state = jax.tree.map(jnp.copy, states[-1])
            state, report = step(state, batch, jnp.int32(10))
            states.append(state)
            metrics.append(jax.device_get(report))
    return states, metrics


def test_a_skipped_step_changes_nothing(text: str) -> None:
    states, metrics = steps(tiny(text, nonfinite="skip"), [1, math.nan, 1, math.inf])

    def same(i: int, j: int) -> bool:
        names = ("params", "opt", "frozen")
        pair = [{n: states[k][n] for n in names} for k in (i, j)]
        return all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), *pair)))

    assert not same(0, 1) and same(1, 2) and not same(2, 3) and same(3, 4)
    assert [int(m["bad"]) for m in metrics] == [-1, 1, 1, 1]
    assert [int(m["skipped"]) for m in metrics] == [0, 1, 1, 2]
    assert [int(s["step"]) for s in states] == [0, 1, 2, 3, 4]


def test_the_first_bad_step_is_remembered(text: str) -> None:
    _, metrics = steps(tiny(text, nonfinite="stop"), [1, math.inf, 1])
    assert [int(m["bad"]) for m in metrics] == [-1, 1, 1]
    assert [int(m["skipped"]) for m in metrics] == [0, 0, 0]


def wild(text: str, run_dir: Path, **changes: Any) -> Experiment:
    """The first step ruins the parameters, all later losses are not finite."""
    return tiny(
        text,
        optimizer=Optimizer(learning_rate=1e30),
        schedule=Schedule(warmup=0.0),
        run_dir=str(run_dir),
        **changes,
    )


def test_stops_at_what_is_not_finite(text: str, tmp_path: Path) -> None:
    experiment = wild(text, tmp_path, checkpoints=Checkpoints(every=1))
    with pytest.raises(FloatingPointError) as error:
        train(experiment, "tiny")
    assert re.fullmatch(
        r"step 2: loss or gradient is not finite at batch 1 of the data \(rows 8 to 15 as shuffled "
        r"by seed 0\); last good checkpoint: .*/checkpoints/1",
        str(error.value),
    )
    assert saved_steps(tmp_path) == [1]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(load_run(tmp_path)[1]))
    with pytest.raises(FloatingPointError, match="step 2: .*checkpoints/1"):  # and again
        train(experiment, "tiny")


def test_skips_what_is_not_finite(text: str, tmp_path: Path) -> None:
    train(wild(text, tmp_path, nonfinite="skip", steps=6), "tiny")
    lines = read_metrics(tmp_path)
    assert [line["skipped"] for line in lines] == [1, 3, 5]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["grad_norm"] is None


def test_run_directory(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    compiled: list[str] = []

    def count(event: str, duration_secs: float, **details: str | int) -> None:
        del duration_secs
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(details.get("fun_name")))

    monitoring.register_event_duration_secs_listener(count)
    try:
        train(tiny(text, run_dir=str(tmp_path / "run")), "tiny", started=time.monotonic())
    finally:
        monitoring.clear_event_listeners()
    assert compiled.count("jit(step)") == 1 and compiled.count("jit(evaluation)") == 1, compiled
    found = {p.name for p in (tmp_path / "run").iterdir()} - {".lock"}
    assert found == {
        "experiment.json",
        "overrides.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "curves.png",
        "samples.txt",
    }
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(2, 25, 2))
    assert [line["step"] for line in lines if "validation_loss" in line] == [8, 16, 24]
    assert lines[-1]["compilations"] == 1
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    keys = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds"}
    assert all(keys <= line.keys() and "layers" not in line for line in lines)
    overrides = json.loads((tmp_path / "run" / "overrides.json").read_text())
    assert overrides["experiment"] == "tiny"
    assert overrides["overrides"]["steps"] == 24 and "seed" not in overrides["overrides"]
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    start = (tmp_path / "run" / "samples.txt").read_text(errors="replace")
    assert set(start[:30]) <= set("abcd efg\n")
    said = capsys.readouterr().out
    assert re.search(r"step 24/24  loss \d\.\d{4}  validation \d\.\d{4}  lr .* tokens/s", said)


def test_sparse_models_report_their_activations(text: str, tmp_path: Path) -> None:
    from bestiary.layers.spark import SparkFFN

    model = tiny_model(ffn=SparkFFN(dim=16, hidden=48, predictor_dim=8, top_k=5))
    train(tiny(text, model=model, run_dir=str(tmp_path), steps=4), "own")
    shares = read_metrics(tmp_path)[-1]["layers"]["ffn/nonzero"]
    assert len(shares) == 2 and all(0.03 < share < 0.3 for share in shares)
    assert not (tmp_path / "overrides.json").exists()  # there is no such experiment by name


def test_layer_metrics_weave_patterns() -> None:
    reported = {
        "blocks": {
            "0": {"ffn": {"nonzero": np.array([0.1, 0.3]), "load": np.array([1.0, 3.0])}},
            "1": {"ffn": {"nonzero": np.array([0.2, 0.4]), "load": np.array([2.0, 4.0])}},
        }
    }
    assert layer_metrics(reported) == {
        "ffn/nonzero": [0.1, 0.2, 0.3, 0.4],
        "ffn/load": [1.0, 2.0, 3.0, 4.0],
    }
    assert layer_metrics({"blocks": {"ffn": {"nonzero": np.ones(3)}}}) == {}


def test_log_goes_on_after_a_step(tmp_path: Path) -> None:
    def line(step: int) -> dict:
        return {"step": step, "loss": 1.0, "learning_rate": 1.0, "tokens_per_second": 1.0}

    log = Log(tmp_path, 0)
    for step in (2, 4, 6):
        log.write(line(step), 8, 1.0)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    log = Log(tmp_path, 4)
    log.write(line(6), 8, 1.0)
    log.close()
    assert [found["step"] for found in read_metrics(tmp_path)] == [2, 4, 6]


def test_evaluation_is_a_weighted_mean(text: str, tmp_path: Path) -> None:
    experiment = tiny(text, evaluation=Evaluation(batches=0), run_dir=str(tmp_path), steps=2)
    train(experiment, "tiny")
    reported = read_metrics(tmp_path)[-1]["validation_loss"]
    # all of the split in one row, without the rows' memory cut: the same tokens, other contexts
    _, _, validation = load(experiment.data)
    _, params = load_run(tmp_path)
    total = weight = 0.0
    for start in range(0, len(validation) - 1, 16):
        tokens = np.asarray(validation.tokens[start : start + 17], np.int32)
        logits, _, _ = jax.jit(experiment.model.apply)(params, tokens[None, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[0], tokens[1:])
        total, weight = total + float(losses.sum()), weight + len(tokens) - 1
    assert reported == pytest.approx(total / weight, rel=1e-5)


class FakeTime:
    """A clock that goes where the test moves it, and by `tick` whenever it is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tick: float = 0.0):
        self.now, self.tick = 1000.0, tick
        monkeypatch.setattr(time, "monotonic", self.read)

    def read(self) -> float:
        self.now += self.tick
        return self.now


def test_minutes_are_kept(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTime(monkeypatch, tick=5e-3)  # other tests may take the cores meanwhile
    experiment = tiny(text, steps=None, minutes=0.2, run_dir=str(tmp_path), log_every=50)
    experiment = replace(
        experiment,
        evaluation=Evaluation(every=1000, batches=3),
        checkpoints=Checkpoints(every=1000),
        schedule=Schedule(final=0.0),
    )
    train(experiment, "tiny", started=fake.now)
    lines = read_metrics(tmp_path)
    assert 0.75 * 12 < lines[-1]["seconds"] < 1.1 * 12
    assert lines[-1]["learning_rate"] < 1e-6 < lines[len(lines) // 2]["learning_rate"]
    assert lines[-1]["compilations"] == 1


@pytest.mark.parametrize("used", [0.0, 30.0])
def test_clock_fits_the_steps_to_the_time(
    used: float, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeTime(monkeypatch)
    experiment = tiny(text, steps=None, minutes=2.0, evaluation=Evaluation(every=500))
    experiment = replace(experiment, checkpoints=Checkpoints(every=300))
    clock = Clock(experiment, fake.now, used, batches=100)
    fake.now += 10
    clock.compiled(10, 1)
    step, random_ = 1, np.random.default_rng(0)
    while step < clock.total:
        step += 1
        fake.now += 0.02 * random_.uniform(0.5, 1.5)
        clock.lap(step)
        if step % 10 == 0 or clock.open:
            before = clock.total
            clock.fit(step)
            if 500 < step < 0.8 * clock.total:
                assert abs(clock.total - before) < 0.05 * clock.total
        for kind, every, cost in (("evaluation", 500, 1.0), ("save", 300, 0.3)):
            if step % every == 0 or step == clock.total:
                with clock.pause(kind):
                    fake.now += cost
    assert 0.96 * 120 < clock.used <= 120.5


def test_clock_ends_at_once_when_time_is_up(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTime(monkeypatch)
    clock = Clock(tiny(text, steps=None, minutes=0.1), fake.now)
    fake.now += 60
    clock.compiled(60, 1)
    fake.now += 1
    clock.lap(2)
    clock.fit(2)
    assert not clock.open
    assert clock.total == 3


def test_the_model_must_know_every_token(text: str, tmp_path: Path) -> None:
    experiment = tiny(text, model=tiny_model(vocab_size=248), run_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="data.tokenizer: 'bytes' has 256 tokens; need at most"):
        train(experiment, "tiny")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("message", "data"),
    [
        ("data.path=.*: no such|data.path.*missing", {"path": "/no/such/text"}),
        ("data.path=.*needed with data.length", {"length": 8000}),
        ("data.validation_fraction|tokens for validation", {"validation_fraction": 1e-6}),
    ],
)
def test_unusable_data_is_refused(message: str, data: dict, text: str, tmp_path: Path) -> None:
    fields = {"path": text, "length": 16, "batch_size": 8} | data
    with pytest.raises(ValueError, match=message):
        train(tiny(text, data=Data(**fields), run_dir=str(tmp_path / "run")), "tiny")
    assert not (tmp_path / "run").exists()


def test_no_validation_split(text: str, tmp_path: Path) -> None:
    data = Data(path=text, length=16, batch_size=8, validation_fraction=0.0)
    train(tiny(text, data=data, run_dir=str(tmp_path), steps=8), "tiny")
    assert not any("validation_loss" in line for line in read_metrics(tmp_path))
    assert saved_steps(tmp_path) == [8]


def test_every_parameter_learns(text: str) -> None:
    states, _ = steps(tiny(text), [1, 1])
    for path, (before, after) in flatten(
        jax.tree.map(lambda a, b: (a, b), states[0]["params"], states[2]["params"])
    ):
        assert float(jnp.abs(before - after).max()) > 0, path
    assert len(params_of(tiny_model().declare())) == len(jax.tree.leaves(states[0]["params"]))
