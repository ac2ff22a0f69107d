"""Experiments as data: to JSON and back, and what malformed ones are told."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestiary import zoo
from bestiary.train.data import Data
from bestiary.train.experiment import (
    Checkpoints,
    Evaluation,
    Experiment,
    experiments,
    load_experiment,
    read_experiment,
    save_experiment,
)
from bestiary.train.mesh import Mesh
from bestiary.train.objective import NextToken
from bestiary.train.optimizer import Optimizer, Schedule
from bestiary.train.tree_json import difference, from_json, to_json
from bestiary.zoo.model import Model


def models() -> dict[str, Model]:
    """Every configuration by name."""
    return {name: make() for name, make in zoo.models().items()}


MODELS = models()


@pytest.mark.parametrize("name", MODELS)
def test_every_model_survives_json(name: str) -> None:
    experiment = replace(load_experiment("tiny"), model=MODELS[name])
    again = from_json(json.loads(json.dumps(to_json(experiment))))
    assert again == experiment and hash(again.model) == hash(experiment.model)


@pytest.mark.parametrize("name", experiments())
def test_every_experiment_says_what_it_is(name: str, tmp_path: Path) -> None:
    experiment = load_experiment(name)
    save_experiment(experiment, tmp_path / "experiment.json")
    assert read_experiment(tmp_path / "experiment.json") == experiment
    assert experiments()[name]


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="experiment: unknown 'nope'; known: .*quickstart"):
        load_experiment("nope")


def test_difference_names_fields() -> None:
    one = load_experiment("tiny")
    other = replace(one, seed=3, data=replace(one.data, length=32))
    assert difference(one, other) == {"data.length": (16, 32), "seed": (0, 3)}
    assert difference(one, one) == {}


def changed(**changes: Any) -> Any:
    return lambda: replace(load_experiment("tiny"), **changes)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("steps: None with minutes None; need exactly one", changed(steps=None)),
        ("steps: 200 with minutes 1.0; need exactly one", changed(minutes=1.0)),
        ("steps: 0; need at least 1", changed(steps=0)),
        ("minutes: 0.0; need more than 0", changed(steps=None, minutes=0.0)),
        ("minutes: nan; need more than 0", changed(steps=None, minutes=float("nan"))),
        ("log_every: 0; need at least 1", changed(log_every=0)),
        ("seed: -1; need 0 or more", changed(seed=-1)),
        ("accumulate: 3; need a divisor of data.batch_size 8", changed(accumulate=3)),
        ("accumulate: 0; need a divisor", changed(accumulate=0)),
        ("nonfinite: 'ignore'; need", changed(nonfinite="ignore")),
        ("objective.chunks: 5; need a divisor of data.length 16",
         changed(objective=NextToken(chunks=5))),
        ("objective.chunks: 0; need at least 1", lambda: NextToken(chunks=0)),
        ("objective.z_loss: -1; need 0 or more", lambda: NextToken(z_loss=-1)),
        ("optimizer.name: 'sgd'; need", lambda: Optimizer(name="sgd")),  # type: ignore[arg-type]
        ("optimizer.learning_rate: 0; need more than 0", lambda: Optimizer(learning_rate=0)),
        ("optimizer.learning_rate: nan; ", lambda: Optimizer(learning_rate=float("nan"))),
        ("optimizer.b1: 1; need 0 <= b1 < 1", lambda: Optimizer(b1=1)),
        ("optimizer.b2: -0.1; need 0 <= b2 < 1", lambda: Optimizer(b2=-0.1)),
        ("optimizer.eps: 0; need more than 0", lambda: Optimizer(eps=0)),
        ("optimizer.clip: -1; need 0 or more", lambda: Optimizer(clip=-1)),
        ("optimizer.weight_decay: -1; need 0 or more", lambda: Optimizer(weight_decay=-1)),
        ("optimizer.adam_learning_rate: 0.1 with adamw; only muon",
         lambda: Optimizer(adam_learning_rate=0.1)),
        ("optimizer.adam_learning_rate: -1; need more than 0",
         lambda: Optimizer(name="muon", adam_learning_rate=-1)),
        ("schedule.decay: 'step'; need", lambda: Schedule(decay="step")),  # type: ignore[arg-type]
        ("schedule.warmup: 2; need 0 <= warmup <= 1", lambda: Schedule(warmup=2)),
        ("schedule.final: -1; need", lambda: Schedule(final=-1)),
        ("schedule.cooldown: 0.9 with warmup 0.2; need at most 1 together",
         lambda: Schedule(decay="wsd", cooldown=0.9, warmup=0.2)),
        ("mesh.fsdp: 0; need at least 1", lambda: Mesh(fsdp=0)),
        ("mesh.tensor: -2; need at least 1", lambda: Mesh(tensor=-2)),
        ("mesh.data: -1; need 1 or more", lambda: Mesh(data=-1)),
        ("mesh.rules: unknown axis 'width'; known: batch", lambda: Mesh(rules={"width": "data"})),
        ("mesh.rules.mlp: 'model' is not a mesh axis", lambda: Mesh(rules={"mlp": "model"})),
        ("checkpoints.every: 0; need at least 1", lambda: Checkpoints(every=0)),
        ("checkpoints.keep: 1; need at least 2", lambda: Checkpoints(keep=1)),
        ("checkpoints.keep_best: -1; need at least 0", lambda: Checkpoints(keep_best=-1)),
        ("evaluation.every: -1; need 0 or more", lambda: Evaluation(every=-1)),
        ("evaluation.batches: -1; need 0 or more", lambda: Evaluation(batches=-1)),
        ("data.length=0 must be at least 1", lambda: Data(length=0)),
        ("data.path='' must name", lambda: Data(path="")),
    ],
)  # fmt: skip
def test_impossible_values_are_refused(message: str, make: Any) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


GOOD = to_json(load_experiment("tiny"))


def spoilt(path: str, value: Any) -> str:
    """The experiment with the value at a dotted path replaced."""
    tree = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    node: Any = tree
    for name in parents:
        node = node[name]
    node[last] = value
    return json.dumps(tree)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        '"experiment"',
        "{}",
        '{"class": "bestiary.train.experiment.Experiment"}',
        '{"class": "bestiary.train.experiment.Nothing"}',
        '{"class": "os.system"}',
        '{"class": 7}',
        '{"class": ""}',
        '{"class": "bestiary.train.run.train"}',
        '{"class": "bestiary.train.data.Data"}',
        '{"class": "bestiary.train.experiment.json.loads"}',
        spoilt("class", "bestiary.train.experiment.Checkpoints"),
        spoilt("steps", 0),
        spoilt("steps", "many"),
        spoilt("steps", [3]),
        spoilt("steps", True),
        spoilt("seed", None),
        spoilt("seed", 0.5),
        spoilt("run_dir", 3),
        spoilt("nonfinite", "maybe"),
        spoilt("extra", 1),
        spoilt("data", None),
        spoilt("data", {}),
        spoilt("data", GOOD["mesh"]),
        spoilt("data.length", "x"),
        spoilt("data.length", -4),
        spoilt("data.isolate_documents", "no"),
        spoilt("model", None),
        spoilt("model", GOOD["data"]),
        spoilt("model.class", "bestiary.zoo.decoder.Encoder"),
        spoilt("model.blocks.n", 0),
        spoilt("model.blocks.n", "two"),
        spoilt("model.blocks.remat", "some"),
        spoilt("model.precision.compute", "int4"),
        spoilt("mesh.rules", {"mlp": 3}),
        spoilt("mesh.rules", []),
        spoilt("mesh.tensor", 1.5),
        spoilt("optimizer.learning_rate", "fast"),
        "\ud800",
    ],
)
def test_malformed_files_name_themselves(text: str, tmp_path: Path) -> None:
    file = tmp_path / "experiment.json"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError) as error:
        read_experiment(file)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match="not a run's experiment"):
            read_experiment(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(["class", *GOOD, *GOOD["data"], "bestiary"]), children, max_size=4
        )
    ),
    max_leaves=8,
)


@given(field=st.sampled_from(sorted(GOOD)), value=json_values)
def test_anything_else_is_a_value_error(field: str, value: Any) -> None:
    tree = GOOD | {field: value}
    try:
        experiment = from_json(tree)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        if isinstance(experiment, Experiment):
            assert to_json(from_json(to_json(experiment))) == to_json(experiment) or value != value
