"""The comparison: budgets, statistics, skewed routers, and the command from start to stop."""

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.__main__ import main
from bestiary.eval import compare_runs
from bestiary.eval.accounting import account
from bestiary.eval.compare_members import _TABLES, MEMBERS, NAMES, sized
from bestiary.eval.compare_mixers import MIXERS, Size, mixing
from bestiary.eval.compare_report import tables
from bestiary.eval.compare_statistics import paired, spread, t975
from bestiary.eval.routing import skewed
from bestiary.layers.router import Router
from bestiary.train.data import Text
from bestiary.train.experiment import load_experiment, read_experiment
from bestiary.train.log import read_metrics
from bestiary.train.run import Interrupted
from bestiary.train.tree_json import difference
from bestiary.zoo.decoder import Block, Decoder
from bestiary.zoo.llama import swiglu
from bestiary.zoo.mixtures import olmoe_tiny, switch_ffn

MATCHES: tuple[Any, ...] = ("active_params", "total_params", "train_flops")


def measure(model: Decoder, match: str) -> float:
    """By another way than the comparison's."""
    if match == "total_params":
        return sum(leaf.size for leaf in jax.tree.leaves(model.abstract()))
    if match == "active_params":
        return model.count().active
    return 3 * account(model, 100).forward_flops_total


def mixer_member(name: str, dim: int, num_layers: int, width: int) -> Decoder:
    return mixing(name, dim, num_layers, swiglu(dim, width), 16)


@pytest.mark.parametrize("match", MATCHES)
def test_every_member_is_as_near_to_the_budget_as_it_can_be(match: Any) -> None:
    members = sized(list(NAMES), dim=128, num_layers=4, length=100, match=match, span=16)
    assert [member.name for member in members] == list(NAMES)
    assert set(NAMES) == {*MEMBERS, *MIXERS} - {"full"}
    dense = measure(members[0].model, match)
    assert measure(members[0].model, "total_params") == 787584  # llama_tiny
    for member in members:
        achieved = measure(member.model, match)
        assert member.achieved == achieved and member.budget == dense, member.name
        assert abs(member.off) < 0.02, member.name
        assert member.off == pytest.approx(achieved / dense - 1)
        build = MEMBERS.get(member.name, partial(mixer_member, member.name))
        if match == "total_params":
            build = _TABLES.get(member.name, build)
        for width in (member.width - 1, member.width + 1):
            other = measure(build(128, 4, width), match)
            assert abs(other - dense) >= abs(achieved - dense), member.name


def test_full_attention_is_that_of_the_dense_member() -> None:
    assert mixing("full", 64, 3, swiglu(64, 40), 16) == MEMBERS["dense"](64, 3, 40)


def test_every_fourth_layer_of_the_hybrid_is_attention() -> None:
    model = mixing("hybrid", 64, 10, swiglu(64, 40), 16)
    expected = ["Attention" if i in (1, 5, 9) else "Mamba2" for i in range(10)]
    blocks = [block for stack in model.stacks for block in [stack.block] * stack.n]
    assert [type(b.mixer).__name__ for b in blocks if isinstance(b, Block)] == expected


def test_which_mixers_cost_the_same_per_token_at_any_length() -> None:
    constant = {*("window", "streaming", "longformer", "bigbird", "mamba", "mamba2")}
    constant |= {*("performer", "gla", "gated_delta")}
    for name, build in MIXERS.items():
        mixer = build(Size(dim=64, span=32), 1)
        growth = mixer.cost(16384).active_flops / mixer.cost(4096).active_flops
        assert (growth < 1.01) == (name in constant), name


@pytest.mark.parametrize("n", [1, 2, 5, 9, 10, 11, 30, 1000])
def test_quantiles_of_t(n: int) -> None:
    """The distribution function at the quantile is 0.975."""
    with jax.enable_x64(True):
        t = t975(n)
        tail = jax.scipy.special.betainc(n / 2, 0.5, n / (n + t * t)) / 2
        assert float(tail) == pytest.approx(0.025, rel=4e-4)


def test_paired_difference() -> None:
    found = paired({0: 1.5, 1: 1.25, 2: 2.5, 4: 9.0}, {0: 1.0, 1: 1.0, 2: 1.0, 3: 5.0})
    differences = np.array([0.5, 0.25, 1.5])
    assert found is not None and found["seeds"] == 3
    assert found["mean"] == pytest.approx(differences.mean())
    assert found["half"] == pytest.approx(4.302653 * differences.std(ddof=1) / 3**0.5, rel=1e-4)
    assert paired({0: 3.0}, {0: 1.0}) == {"mean": 2.0, "half": None, "seeds": 1}
    assert paired({0: 3.0}, {1: 1.0}) is None
    assert spread([4.0]) == {"mean": 4.0, "std": None, "values": [4.0]}


def loads(router: Router, x: jax.Array) -> tuple[np.ndarray, dict[str, Any]]:
    routing, aux = router.apply(router.init(jax.random.key(0)), x)
    return np.bincount(np.ravel(routing.experts), minlength=router.num_experts), aux.metrics


@pytest.mark.parametrize("score", ["softmax", "topk_softmax", "sigmoid"])
def test_adversarial_routing_sends_all_tokens_to_the_same_experts(score: Any) -> None:
    router = Router(dim=128, num_experts=12, top_k=3, score=score, bias="sign")
    x = jax.random.normal(jax.random.key(1), (2, 37, 128))
    load, metrics = loads(skewed(router, "adversarial"), x)
    np.testing.assert_array_equal(load, [74] * 3 + [0] * 9)
    assert float(metrics["load_max"]) == pytest.approx(12 / 3)
    assert float(metrics["load_entropy"]) == pytest.approx(math.log(3) / math.log(12))


def test_adversarial_routing_drops_all_beyond_one_capacity() -> None:
    moe = skewed(switch_ffn(128, 24, 8), "adversarial")
    x = jax.random.normal(jax.random.key(1), (3, 64, 128))
    _, aux = jax.jit(moe.apply)(moe.init(jax.random.key(0)), x)
    # 192 tokens want one expert, which takes ceil(192 / 8 * 1.25)
    assert float(aux.metrics["router"]["dropped"]) == pytest.approx(1 - 30 / 192)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_zipf_routing_of_random_logits_follows_the_law(score: Any) -> None:
    """Gumbel logits choose expert e with probability exp(bias_e) / sum exp(bias)."""
    n, tokens = 6, 60_000
    router = skewed(Router(dim=n, num_experts=n, top_k=1, score=score), "zipf")
    logits = jax.random.gumbel(jax.random.key(2), (1, tokens, n))
    scores = jax.nn.sigmoid(logits) if score == "sigmoid" else jax.nn.softmax(logits)
    load = np.bincount(np.ravel(router.select(scores, {})), minlength=n)
    law = 1 / np.arange(1, n + 1)
    np.testing.assert_allclose(load / tokens, law / law.sum(), atol=0.01)


def test_skew_spares_the_weights_and_models_without_routers() -> None:
    router = Router(dim=128, num_experts=4, top_k=4)
    x = jax.random.normal(jax.random.key(1), (1, 5, 128))
    params = router.init(jax.random.key(0))
    routing, _ = skewed(router, "zipf").apply(params, x)
    weights = jax.nn.softmax(router.logits(params, x))
    chosen = jnp.take_along_axis(weights, routing.experts, -1)
    np.testing.assert_allclose(routing.weights, chosen, rtol=1e-6)
    assert skewed(olmoe_tiny(), "balanced") == olmoe_tiny()
    dense = MEMBERS["dense"](32, 1, 8)
    assert skewed(dense, "adversarial") == dense


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    random = np.random.default_rng(0)
    path.write_text("".join(random.choice(list("abcd efg\n"), 3000)))
    return str(path)


def words(members: str, text: str, out: Path, *more: str) -> list[str]:
    sizes = ["--dim", "32", "--num-layers", "1", "--data.length", "16"]
    return ["compare", members, *sizes, "--data.path", text, "--out", str(out), *more]


@pytest.fixture(scope="module")
def finished(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two members, one of which drops tokens, two seeds, as many steps as fit into no time."""
    out = tmp_path_factory.mktemp("compare") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "finish", lambda *a: None)  # takes longest, and is tested elsewhere
        assert main(words("switch,dense", text, out, "--minutes", "1e-5", "--seeds", "2")) == 0
    return out


def test_report(finished: Path) -> None:
    comparison = json.loads((finished / "comparison.json").read_text())
    assert comparison["steps"] >= 1 and comparison["tokens_per_step"] == 128
    dense, switch = comparison["members"]
    assert (dense["name"], switch["name"]) == ("dense", "switch")
    assert dense["active_params"] == dense["budget"] == 18528
    assert switch["total_params"] > 3 * dense["total_params"]
    for member in (dense, switch):
        for name in ("validation_loss", "accuracy", "exact_rows", "tokens_per_second", "seconds"):
            assert len(member[name]["values"]) == 2
        assert (
            member["step_bytes"] > 12 * member["total_params"]
        )  # a step holds parameters, moments
        assert member["cache_bytes"] > 16 * 2 * 32 * 4  # keys and values, and where they are
        # what the run itself measured after its last step
        logged = [read_metrics(finished / path)[-1]["validation_loss"] for path in member["runs"]]
        np.testing.assert_allclose(member["validation_loss"]["values"], logged, rtol=1e-5)
    differences = np.subtract(
        switch["validation_loss"]["values"], dense["validation_loss"]["values"]
    )
    assert switch["loss_difference"]["mean"] == pytest.approx(differences.mean())
    assert "loss_difference" not in dense and "routing" not in dense
    assert switch["routing"]["load_max"] >= 1 and 0 < switch["routing"]["load_entropy"] <= 1
    assert 0 <= switch["routing"]["dropped"] < 1 and dense["nonzero"]["mean"] == 1
    document = (finished / "comparison.md").read_text()
    command = re.search(r"bestiary (compare .*)", document)
    assert command is not None and command[1].startswith("compare switch,dense --minutes 1e-05")
    assert (finished / "comparison.png").stat().st_size > 10_000


def test_modelled_times_are_shown_and_what_failed_is_said(finished: Path) -> None:
    comparison = json.loads((finished / "comparison.json").read_text()) | {"topology": "v5e:2x2"}
    dense, switch = comparison["members"]
    dense["modelled_step_seconds"], switch["modelled_step_seconds"] = 0.0125, "ValueError: no"
    _, cost, routing, failed = tables(comparison)
    assert cost.columns[-1] == "ms on v5e:2x2"
    assert [row[-1] for row in cost.rows] == ["12.500", "-"]
    assert [row[0] for row in routing.rows] == ["switch"]
    assert failed.rows == [["switch", "v5e:2x2", "ValueError: no"]]


def test_members_differ_in_nothing_but_the_model(finished: Path) -> None:
    for seed in ("seed-0", "seed-1"):
        dense, switch = (
            read_experiment(finished / name / seed / "experiment.json")
            for name in ("dense", "switch")
        )
        assert {path.split(".")[0] for path in difference(dense, switch)} == {"model", "run_dir"}


def test_a_finished_comparison_is_only_reported_again(
    finished: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (finished / "comparison.json").read_text()
    monkeypatch.setattr(compare_runs, "train", lambda *a: pytest.fail("trained again"))
    assert main(words("switch,dense", text, finished, "--minutes", "1e-5", "--seeds", "2")) == 0
    assert (finished / "comparison.json").read_text() == before


def test_runs_begin_with_those_of_another_comparison(
    finished: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Text, "finish", lambda *a: None)
    more = ["--steps", "1", "--seeds", "1", "--initial", str(finished), "--rate", "0.5"]
    assert main(words("dense", text, tmp_path / "out", *more)) == 0
    experiment = read_experiment(tmp_path / "out/dense/seed-0/experiment.json")
    assert experiment.initial == str(finished / "dense/seed-0")
    slower, usual = experiment.optimizer, load_experiment("quickstart").optimizer
    assert slower.learning_rate == usual.learning_rate / 2
    assert slower.adam_learning_rate == usual.adam_learning_rate / 2


def test_stopped_goes_on_and_a_failing_member_is_reported(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out, real, made = tmp_path / "out", compare_runs.train, []

    def train(experiment: Any, name: str) -> Path:
        made.append((name, experiment.seed))
        if name == "switch":
            raise FloatingPointError("step 1: loss or gradient\nis not finite")
        if len(made) == 1:
            raise Interrupted(15, "stopped by SIGTERM")
        return real(experiment, name)

    monkeypatch.setattr(compare_runs, "train", train)
    monkeypatch.setattr(Text, "finish", lambda *a: None)
    command = words("dense,switch", text, out, "--steps", "2", "--seeds", "1")
    assert main(command) == 128 + 15
    assert capsys.readouterr().err == "stopped by SIGTERM\n"

    assert main(command) == 1
    dense, switch = json.loads((out / "comparison.json").read_text())["members"]
    assert dense["runs"] == ["dense/seed-0"] and dense["failed"] == {}
    said = "FloatingPointError: step 1: loss or gradient is not finite"
    assert switch["failed"] == {"0": said} and switch["runs"] == []
    assert said in (out / "comparison.md").read_text()

    assert main(command) == 1  # what failed is tried again, what is finished is not
    assert made == [("dense", 0), ("dense", 0), ("switch", 0), ("switch", 0)]

    other = words("dense", text, out, "--steps", "3")
    assert main(other) == 2
    assert "holds another comparison, with given_steps 2" in capsys.readouterr().err


def test_lengths(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixer and the dense member, at two lengths of equal tokens; one of the runs fails."""
    real = compare_runs.train

    def train(experiment: Any, name: str) -> Path:
        if name == "window" and experiment.data.length == 32:
            raise FloatingPointError("not finite")
        return real(experiment, name)

    monkeypatch.setattr(compare_runs, "train", train)
    monkeypatch.setattr(Text, "finish", lambda *a: None)
    out = tmp_path / "out"
    more = ["--steps", "2", "--seeds", "1", "--lengths", "32,16", "--span", "8"]
    more += ["--data.batch-size", "16"]  # 8 devices take 8 rows or more
    assert main(words("dense,window", text, out, *more)) == 1
    found = json.loads((out / "lengths.json").read_text())
    assert "--lengths 32,16" in found["command"]
    short, long = found["comparisons"]
    for length, comparison in ((16, short), (32, long)):
        assert comparison["length"] == length and comparison["tokens_per_step"] == 256
        experiment = read_experiment(out / f"length-{length}/dense/seed-0/experiment.json")
        assert (experiment.data.length, experiment.data.batch_size) == (length, 256 // length)
        dense, window = comparison["members"]
        assert dense["cache_bytes"] > length * 2 * 32 * 4 > window["cache_bytes"] > 8 * 2 * 32 * 4
    assert long["members"][1]["failed"] == {"0": "FloatingPointError: not finite"}
    document = (out / "lengths.md").read_text()
    loss = short["members"][1]["validation_loss"]["mean"]
    assert f"| window | {loss:.4f} | - |" in document and "| member | 16 | 32 |" in document
    assert (out / "lengths.png").stat().st_size > 10_000
    monkeypatch.setattr(compare_runs, "train", lambda *a: pytest.fail("trained again"))
    assert main(words("dense", text, out, *more)) == 0
    assert main(words("dense", text, out, "--steps", "2")) == 2


@pytest.mark.parametrize(
    "given, said",
    [
        (["dense,nothing"], "members: unknown 'nothing'; known: dense, polycom"),
        (["dense,moe,moe"], "members: 'moe' is there twice; need each once"),
        (["moe"], "members: no 'dense'"),
        (["dense,nsa", "--span", "7"], "span: 7; need an even number"),
        (["dense", "--initial", "nowhere"], "initial: 'nowhere' holds no comparison at one"),
        (["dense", "--lengths", "16"], "lengths: '16'; need two or more"),
        (["dense", "--lengths", "16,16"], "lengths: '16,16'; need two or more"),
        (["dense", "--lengths", "16,x"], "lengths: '16,x'; need two or more"),
        (["dense", "--lengths", "16,24"], "lengths: 24 does not divide the 128 tokens of a step"),
        (["dense", "--minutes", "1"], "need exactly one of the two"),
        (["dense", "--steps", "0"], "steps: 0; need at least 1"),
        (["dense", "--seeds", "0"], "seeds: 0; need at least 1"),
        (["dense", "--rate", "0"], "rate: 0.0; need more than 0"),
        (["dense", "--dim", "48"], "dim: 48; need a multiple of 32"),
        (["dense", "--num-layers", "0"], "num_layers: 0; need at least 1"),
        (["dense", "--match", "speed"], "invalid choice"),
        (["dense,peer", "--match", "total_params"], "match: the smallest peer has"),
        (["dense,spark", "--routing", "zipf"], "routing: 'zipf', but no member has routers"),
        (["dense", "--task", "recall"], "task: recall with data.path"),
        (["dense", "--data.path", "recall:facts=0"], "exactly one of facts and pairs"),
        (["dense", "--data.validation-fraction", "0"], "data.validation_fraction: 0"),
        (["dense", "--data.batch-size", "7"], "data.batch_size: 7"),
        (["dense", "--topology", "v5e:9"], "v5e:9"),
    ],
    ids=str,
)
def test_refusals_are_one_line_and_come_first(
    given: list[str], said: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    steps = [] if "--steps" in given else ["--steps", "2"]
    assert main(words(given[0], text, tmp_path / "out", *steps, *given[1:])) == 2
    heard = capsys.readouterr().err
    assert said in heard and heard.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "mine.txt").write_text("")
    assert main(words("dense", text, tmp_path, "--steps", "1")) == 2
    assert "holds no comparison; need a new or empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
