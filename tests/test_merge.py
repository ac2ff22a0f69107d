"""Merging: against PEFT's and mergekit's numbers, the averages WSM stands for, and the command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestiary.__main__ import main
from bestiary.layers.base import Param, Precision, flatten
from bestiary.train.checkpoint import load_run, save_run
from bestiary.train.experiment import Experiment, load_experiment
from bestiary.train.merge_tensors import (
    Decay,
    agree,
    checkpoint_weights,
    drop,
    merge_trees,
    slerp,
    trim,
    update_weights,
    weighted_sum,
)


def close(actual: Any, expected: np.ndarray, name: str = "") -> None:
    atol = 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=atol, err_msg=name)


# --- tensors --------------------------------------------------------------------------------------


@pytest.mark.golden("model_merging")
def test_tensors_equal_the_published_programs(golden: SimpleNamespace) -> None:
    a, hp = {name: jnp.asarray(x) for name, x in golden.arrays.items()}, golden.hp
    numbers = range(1, hp["num_models"] + 1)
    deltas, weights = jnp.stack([a[f"delta{i}"] for i in numbers]), jnp.asarray(hp["weights"])
    models, base, density = a["base"] + deltas, a["base"], hp["density"]

    norms = {"parallel": hp["slerp_dot_threshold"], "eps": hp["slerp_norm_eps"]}
    close(slerp(models[0], models[1], hp["t"], **norms), golden.arrays["slerp"], "slerp")
    close(weighted_sum(models, weights / weights.sum()), golden.arrays["linear"], "linear")
    added = base + jnp.tensordot(weights, deltas, 1)
    close(added, golden.arrays["task_arithmetic"], "task_arithmetic")

    pruned = jnp.stack([trim(delta, density) for delta in deltas])
    close(pruned[0], golden.arrays["magnitude_pruned_delta1"], "magnitude_pruned_delta1")
    for sign in hp["majority_sign_methods"]:
        merged = agree(pruned, weights, sign, sign_weighted=hp["ties_sign_weighted"])
        close(base + merged, golden.arrays[f"ties_{sign}"], f"ties_{sign}")
    keep = jnp.stack([a[f"dare_mask{i}"] for i in numbers]) > 0
    dropped = drop(deltas, keep, density)
    close(base + jnp.tensordot(weights, dropped, 1), golden.arrays["dare_linear"], "dare_linear")
    close(base + agree(dropped, weights), golden.arrays["dare_ties"], "dare_ties")


def test_slerp_keeps_to_the_arc_and_its_ends():
    a, b = jnp.array([[2.0, 0.0, 0.0]]), jnp.array([[0.0, 2.0, 0.0]])
    half = 2 * np.sin(np.pi / 4)
    close(slerp(a, b, 0.0), np.asarray(a))
    close(slerp(a, b, 1.0), np.asarray(b))
    close(slerp(a, b, 0.5), np.array([[half, half, 0]]))
    close(slerp(a, 3 * a, 0.25), 1.5 * np.asarray(a))  # parallel: linear
    close(slerp(a, jnp.zeros_like(a), 0.5), np.asarray(a) * np.sin(np.pi / 4))


def test_trim_keeps_the_stated_number():
    delta = jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0, 2.0], (7, 5)))
    for density, kept in ((0.001, 1), (0.3, 10), (1.0, 35)):
        trimmed = np.asarray(trim(delta, density))
        assert (trimmed != 0).sum() == kept
        np.testing.assert_array_equal(trimmed, np.where(trimmed != 0, delta, 0))
        assert np.abs(trimmed).sum() == np.sort(np.abs(np.ravel(delta)))[-kept:].sum()


def test_mergekit_elects_and_divides_by_weight():
    deltas = jnp.array([[1.0, 2.0, 0.0], [-1.5, 1.0, 0.0], [-0.1, -4.0, 0.0]])
    weights = jnp.array([2.0, 1.0, 0.5])
    peft = [(-1.5 - 0.05) / 2, -2.0 / 1, 0.0]
    mergekit = [2.0 / 2, (4.0 + 1.0) / 3, 0.0]
    close(agree(deltas, weights), np.array(peft))
    options = {"sign_weighted": True, "normalize": True}
    close(agree(deltas, weights, **options), np.array(mergekit))
    by_number = [(-1.5 - 0.05) / 1.5, (4.0 + 1.0) / 3, 0.0]
    close(agree(deltas, weights, "frequency", normalize=True), np.array(by_number))


# --- WSM ------------------------------------------------------------------------------------------

falling = st.lists(st.floats(0, 1), min_size=1, max_size=9).map(lambda w: sorted(w, reverse=True))


@given(falling, st.integers(0, 2**31))
def test_averaged_checkpoints_are_a_decayed_sum_of_updates(w: list[float], seed: int) -> None:
    updates = np.random.default_rng(seed).normal(size=(len(w), 3))
    start = np.random.default_rng(seed + 1).normal(size=3)
    checkpoints = np.cumsum([start, *updates], 0)
    c = checkpoint_weights(w)
    assert min(c) >= 0 and abs(sum(c) - 1) < 1e-12
    np.testing.assert_allclose(c @ checkpoints, start + w @ updates, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decay", get_args(Decay))
@pytest.mark.parametrize("steps", [(0, 10, 20, 30), (100, 107), (5, 6, 30, 31, 90)])
def test_every_decay_falls_and_gives_an_average(decay: Decay, steps: tuple[int, ...]) -> None:
    w = update_weights(decay, steps)
    assert len(w) == len(steps) - 1 and 1 > w[0] and w[-1] > 0
    c = checkpoint_weights(w)
    assert min(c) >= 0 and abs(sum(c) - 1) < 1e-12
    if decay == "mean":
        np.testing.assert_allclose(c, 1 / len(steps))


def test_decays_at_the_middle_of_their_blocks():
    steps = (0, 2, 8)  # middles at 1/8 and 5/8 of the way
    expected = {
        "linear": [7 / 8, 3 / 8],
        "cosine": [(1 + np.cos(np.pi / 8)) / 2, (1 + np.cos(5 * np.pi / 8)) / 2],
        "inverse_sqrt": [1 - np.sqrt(1 / 8), 1 - np.sqrt(5 / 8)],
        "exponential": [10 ** (-1 / 8), 10 ** (-5 / 8)],
    }
    for decay, w in expected.items():
        np.testing.assert_allclose(update_weights(decay, steps), w)


@pytest.mark.parametrize("w", [[1.1], [0.2, 0.3], [0.5, -0.1], [float("nan")]])
def test_weights_that_are_no_decay_are_refused(w: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^w: .*; need weights that fall"):
        checkpoint_weights(w)


# --- trees ----------------------------------------------------------------------------------------


def test_every_layer_and_expert_is_a_tensor_of_its_own():
    declared = {
        "w": Param((2, 3, 4, 5), ("layers", "experts", "embed", "mlp"), dtype=jnp.bfloat16),
        "b": Param((4,), (None,)),
        "n": Param((2,), ("layers",), dtype=jnp.int32, trainable=False),
    }
    rng = np.random.default_rng(0)

    def tree() -> dict[str, jax.Array]:
        return {k: jnp.asarray(10 * rng.normal(size=p.shape), p.dtype) for k, p in declared.items()}

    trees = [tree() for _ in range(2)]
    merged = merge_trees(declared, trees, lambda xs, _: xs[0] + trim(xs[1] - xs[0], 0.2))
    assert {k: x.dtype for k, x in merged.items()} == {k: p.dtype for k, p in declared.items()}
    np.testing.assert_array_equal(merged["n"], trees[0]["n"])
    a, b = (np.asarray(t["w"], np.float32) for t in trees)
    changed = np.asarray(merged["w"], np.float32) != a
    np.testing.assert_array_equal(changed.sum((-1, -2)), np.full((2, 3), 4))
    threshold = np.sort(np.abs(b - a).reshape(2, 3, -1))[..., -4]
    assert (np.abs(b - a)[changed] >= np.repeat(threshold.ravel(), 4)).all()
    assert (np.asarray(merged["b"]) == np.asarray(trees[0]["b"])).sum() == 3

    uniform = merge_trees(declared, trees, lambda xs, key: jax.random.uniform(key, xs[0].shape))
    draws = np.asarray(uniform["w"][:, :, 0, 0], np.float32).ravel()
    assert len(np.unique(draws)) == 6  # a key of its own


def test_sums_are_float32_and_other_types_come_from_the_last():
    trees = [
        {"w": jnp.full(3, x, jnp.bfloat16), "n": jnp.int32(i)}
        for i, x in enumerate((256.0, 1.0, 1.0))
    ]
    total = weighted_sum(iter(trees), (0.5, 0.5, 0.5))
    assert total["w"].dtype == jnp.bfloat16 and total["n"] == 2
    np.testing.assert_array_equal(np.asarray(total["w"], np.float32), 129)


# --- the command ----------------------------------------------------------------------------------


def changed(params: Any, seed: int, scale: float = 0.1) -> Any:
    rng = np.random.default_rng(seed)

    def one(x: jax.Array) -> jax.Array:
        return (x + scale * rng.normal(size=x.shape)).astype(x.dtype)

    return jax.tree.map(one, params)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs "base", "a", "b" of one model, "unlike", and "wsm" with checkpoints of 10, 20 and 40."""
    folder = tmp_path_factory.mktemp("runs")
    experiment = load_experiment("tiny")
    model = replace(experiment.model, precision=Precision(params="bfloat16"))
    experiment = replace(experiment, model=model)
    params = model.init(jax.random.key(0))
    save_run(folder / "base", experiment, params)
    for seed, name in enumerate(("a", "b", "c")):
        save_run(folder / name, experiment, changed(params, seed))
    wide = replace(model.blocks.block, ffn=replace(model.blocks.block.ffn, hidden=50))
    unlike = replace(experiment, model=replace(model, blocks=replace(model.blocks, block=wide)))
    save_run(folder / "unlike", unlike, unlike.model.init(jax.random.key(0)))
    shutil.copytree(folder / "a", folder / "wsm")
    (folder / "wsm" / "checkpoints" / "0").rename(folder / "wsm" / "checkpoints" / "10")
    for step, name in ((20, "b"), (40, "c")):
        source = folder / name / "checkpoints" / "0"
        shutil.copytree(source, folder / "wsm" / "checkpoints" / str(step))
    return folder


def leaves(run: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(x, np.float32) for path, x in flatten(load_run(run)[1])}


METHODS = {
    "wsm": "wsm wsm --decay linear",
    "wsm_weights": "wsm wsm --weights 0.25 0.75 --steps 20 40",
    "wsm_last": "wsm wsm --last 2",
    "linear": "linear a b --weights 3 1",
    "slerp": "slerp a b --t 0",
    "task": "task-arithmetic a b --base base --weights 0.5 0.5",
    "ties": "ties a b --base base --density 1",
    "dare": "dare a --base base --density 0.5 --seed 3",
}


@pytest.mark.parametrize("name", METHODS)
def test_the_command_makes_a_run(
    name: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    out = tmp_path / "out"
    assert main(["merge", *METHODS[name].split(), "--out", str(out)]) == 0
    merged, base, a, b, c = leaves(out), *(leaves(runs / x) for x in ("base", "a", "b", "c"))
    expected = {
        "wsm": lambda p: (a[p] + 3 * b[p] + 2 * c[p]) / 6,  # w = 5/6, 1/3
        "wsm_weights": lambda p: 0.25 * b[p] + 0.75 * c[p],
        "wsm_last": lambda p: (b[p] + c[p]) / 2,
        "linear": lambda p: (3 * a[p] + b[p]) / 4,
        "slerp": lambda p: a[p],
        "task": lambda p: (a[p] + b[p]) / 2,
        "ties": lambda p: base[p] + np.asarray(agree(jnp.stack([a[p], b[p]]) - base[p], ONES)),
        "dare": lambda p: np.where(
            np.abs(merged[p] - base[p]) > np.abs(a[p] - base[p]) / 2, 2 * a[p] - base[p], base[p]
        ),
    }[name]
    for path, value in merged.items():
        rounding = 2**-8 * np.abs(value).max()  # the runs' type is bfloat16
        np.testing.assert_allclose(value, expected(path), atol=rounding, err_msg=path)
    if name == "dare":
        share = np.mean(np.concatenate([np.ravel(merged[p] != base[p]) for p in merged]))
        assert 0.45 < share < 0.55
    experiment: Experiment = load_run(out)[0]
    assert experiment.run_dir == str(out)
    assert experiment.model == load_run(runs / "a")[0].model
    assert json.loads((out / "merge.json").read_text())["out"] == str(out)


ONES = jnp.ones(2)

REFUSED = {
    "'a' is no subcommand; need one of wsm, linear, slerp, task-arithmetic, ties, dare": "a",
    "steps: 7; ": "wsm wsm --steps 7 20",
    "steps: (20, 10); need": "wsm wsm --steps 20 10",
    "run: wsm has checkpoints of 10, 20, 40; need 4": "wsm wsm --last 4",
    "last: 1; need": "wsm wsm --last 1",
    "run: a has checkpoints of 0; need 2": "wsm a",
    "weights: (0.5, 0.6); need": "wsm wsm --weights 0.5 0.6",
    "need one for each of 3 checkpoints": "wsm wsm --weights 0.5 0.5",
    "with decay linear": "wsm wsm --weights 0.5 0.5 --decay linear",
    "none/experiment.json": "wsm none",
    "unlike has model.blocks.block.ffn.hidden 50, a has 48": "linear a unlike",
    "runs: 1; need": "linear a",
    "need one for each of 2 runs": "linear a b --weights 1",
    "need more than 0 together": "linear a b --weights 1 -1",
    "'none' is no run": "slerp a none",
    "Expected 2 values": "slerp a",
    "t: 1.5; need": "slerp a b --t 1.5",
    "base": "ties a b",
    "density: 0.0; need": "ties a b --base base --density 0",
    "density: 1.5; need": "dare a b --base base --density 1.5",
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_one_line(
    message: str,
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(runs)
    assert main(["merge", *REFUSED[message].split(), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    assert main(["merge", "linear", "a", "b", "--out", "base"]) == 2
    assert "out: base exists already" in capsys.readouterr().err
