"""Latent experts: parity with the formulas, conversion of mixtures of experts, gradients, costs."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import draw

from bestiary.__main__ import main
from bestiary.layers import (
    DEFAULT_RULES,
    GLU,
    MLP,
    Attention,
    Context,
    Gelu,
    LatentExperts,
    Layer,
    MoE,
    Relu,
    Repeat,
    RMSNorm,
    Router,
    Silu,
    use_rules,
)
from bestiary.layers.base import Count, flatten
from bestiary.layers.mole import convert, factorise
from bestiary.train.checkpoint import load_run, save_run
from bestiary.train.experiment import load_experiment
from bestiary.zoo import ling, llama, mixtures
from bestiary.zoo import mole as zoo
from bestiary.zoo.decoder import Block

DIM, HIDDEN, EXPERTS, GROUP = 12, 10, 6, 3
ROUTER = Router(dim=DIM, num_experts=EXPERTS, top_k=2, balance=0.1)
GLU_EXPERT = GLU(dim=DIM, hidden=HIDDEN, activation=Silu())
MIXTURE = MoE(router=ROUTER, expert=GLU_EXPERT, shared=GLU(dim=DIM, hidden=4, activation=Silu()))
LATENT = LatentExperts(router=ROUTER, group_size=GROUP, latent=6, hidden=HIDDEN)
X = np.random.default_rng(0).normal(size=(2, 9, DIM)).astype(np.float32)


def close(actual: Any, expected: Any, name: str = "", rtol: float = 1e-5) -> None:
    expected = np.asarray(expected)
    atol = rtol * float(np.abs(expected).max(initial=0))
    np.testing.assert_allclose(
        np.asarray(actual).reshape(expected.shape), expected, rtol=rtol, atol=atol, err_msg=name
    )


def output(layer: Layer, params: Any, x: jax.Array) -> jax.Array:
    return jax.jit(layer.apply)(params, x)[0]


@pytest.mark.golden("mole")
def test_equals_the_formulas(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    assert not hp["factorize_down"]
    activation = {"silu": Silu, "gelu": Gelu, "relu": Relu}[hp["hidden_act"]]()
    dim, hidden = hp["hidden_size"], hp["moe_intermediate_size"]
    router = Router(
        dim=dim,
        num_experts=hp["num_experts"],
        top_k=hp["top_k"],
        score=hp["router_score"],
        normalize=hp["norm_topk_prob"],
    )
    moe = MoE(router=router, expert=GLU(dim=dim, hidden=hidden, activation=activation))
    names = {"gate": "W_gate", "up": "W_up", "down": "W_down"}
    experts: Any = {name: jnp.asarray(a[w].swapaxes(1, 2)) for name, w in names.items()}
    params = {
        "router": {"weight": jnp.asarray(a["W_router"].T)},
        "experts": experts | {"activation": {}},
    }
    x = jnp.asarray(a["x"])[None]
    routing, _ = jax.jit(router.apply)(params["router"], x)
    order = np.argsort(routing.experts[0], -1), np.argsort(a["topk_idx"], -1)
    for ours, theirs in ((routing.experts[0], a["topk_idx"]), (routing.weights[0], a["topk_w"])):
        close(np.take_along_axis(ours, order[0], -1), np.take_along_axis(theirs, order[1], -1))
    close(output(moe, params, x), a["y_moe"], "y_moe")

    size, rank = hp["group_size"], hp["latent_dim"]
    layer, converted, factors = convert(moe, params, size, rank)
    assert layer.groups == hp["num_groups"]
    close(output(layer, converted, x), a["y_mole"], "y_mole")
    for name, f in factors.items():
        close(product(f), a[f"recon_{name}"].swapaxes(1, 2), f"recon_{name}")
        close(f.error.sum(), a[f"err_{name}"], f"err_{name}")

    moment, eps = a["calib_gram"], hp["calib_eps"]
    f = factorise(params["experts"]["up"], size, rank, moment=moment, eps=eps)
    close(product(f), a["recon_up_calib"].swapaxes(1, 2), "recon_up_calib")
    close(f.error.sum(), a["err_up_calib"], "err_up_calib")
    missed = np.asarray(params["experts"]["up"]) - product(factors["up"])
    second = moment + eps * np.eye(dim)
    plain = np.einsum("edf,dc,ecf->", missed, second, missed)
    close(plain, a["err_up_plain_in_calib_norm"], "err_up_plain_in_calib_norm")


def product(f: Any) -> np.ndarray:
    """B A of every expert: [experts, dim, hidden]."""
    size = len(f.own) // f.shared.shape[1]
    return np.stack([f.shared[:, e // size] @ a for e, a in enumerate(f.own)])


# --- conversion -----------------------------------------------------------------------------------


def test_experts_that_read_from_one_space_convert_exactly() -> None:
    params = draw(MIXTURE, 5)
    rng = np.random.default_rng(1)
    for name in ("gate", "up"):
        shared, own = rng.normal(size=(2, DIM, 4)), rng.normal(size=(EXPERTS, 4, HIDDEN))
        made = np.repeat(shared, GROUP, 0) @ own / 6
        params["experts"][name] = jnp.asarray(made, jnp.float32)
    layer, converted, factors = convert(MIXTURE, params, GROUP, 4)
    for f in factors.values():
        assert f.exact.all() and (f.ranks == 4).all() and (f.lost < 1e-12).all()
    x, ctx = jnp.asarray(X), Context(segment_ids=jnp.asarray([[1] * 9, [1] * 5 + [0] * 4]))
    y, aux = jax.jit(MIXTURE.apply)(params, x, ctx)
    z, latent_aux = jax.jit(layer.apply)(converted, x, ctx)
    close(z, y)
    close(latent_aux.losses["load_balance"], aux.losses["load_balance"])
    assert jax.tree.structure(layer.abstract()) == jax.tree.structure(converted)
    assert not convert(MIXTURE, params, GROUP, 3)[2]["up"].exact.any()


def test_no_other_factors_are_nearer() -> None:
    """Error: the discarded singular values; less with rank, and 0 at full rank."""
    w = np.random.default_rng(2).normal(size=(EXPERTS, DIM, HIDDEN))
    before = np.full(2, np.inf)
    for rank in (2, 7, 12):
        f = factorise(w, GROUP, rank)
        missed = np.square(w - product(f)).sum((1, 2)).reshape(2, GROUP).sum(1)
        close(f.error + 1, missed + 1)
        for j in range(2):
            stack = np.concatenate(w[j * GROUP : (j + 1) * GROUP], 1)
            s = np.linalg.svd(stack, compute_uv=False)
            close(f.error[j] + 1, np.square(s[rank:]).sum() + 1)
            close(f.energy[j], np.square(s).sum())
        assert (f.error < before).all()
        before = f.error


def test_a_moment_makes_the_outputs_nearer() -> None:
    rng = np.random.default_rng(3)
    w = rng.normal(size=(EXPERTS, DIM, HIDDEN))
    x = rng.normal(size=(400, DIM)) * np.geomspace(0.05, 3, DIM)
    plain = factorise(w, GROUP, 4)
    moment = x.T @ x / len(x)
    aware = factorise(w, GROUP, 4, moment=moment)

    def missed(f: Any) -> float:
        return np.square(np.einsum("nd,edf->enf", x, w - product(f))).sum() / len(x)

    close(missed(aware), aware.error.sum(), rtol=1e-4)
    assert missed(aware) < 0.5 * missed(plain)


def test_lower_ranks_of_the_experts_bring_the_group_nearer_to_the_latent_space() -> None:
    w = np.random.default_rng(4).normal(size=(EXPERTS, DIM, HIDDEN))
    assert (factorise(w, GROUP, 6).ranks == 12).all()
    f = factorise(w, GROUP, 6, expert_rank=2)
    assert (f.ranks == 6).all()
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    close(product(f), (u[..., :2] * s[:, None, :2]) @ vt[:, :2])
    assert (f.error > factorise(w, GROUP, 6).error).all()


def test_a_model_converts_layer_by_layer() -> None:
    """At full rank nothing is lost; below, the report says what and where."""
    ffn = mixtures.olmoe_ffn(DIM, EXPERTS, 2, GLU_EXPERT)
    model = mixtures.olmoe(2, DIM, 2, ffn, vocab_size=31)
    params, ids = draw(model, 5), jnp.arange(30).reshape(2, 15)
    full, converted, report = zoo.convert(model, params, GROUP, DIM)
    close(output(full, converted, ids), output(model, params, ids), rtol=1e-4)
    assert list(report) == ["blocks/0", "blocks/1"]
    assert list(zoo.lines(report))[0] == "blocks/0 gate: 0.00% lost (exact)"
    small, converted, report = zoo.convert(model, params, GROUP, 7)
    assert jax.tree.map(jnp.shape, converted) == jax.tree.map(lambda s: s.shape, small.abstract())
    assert list(zoo.lines(report))[3].endswith("% lost (ranks up to 12, kept 7)")
    dense = llama.llama(
        vocab_size=31, num_layers=2, attention=llama.multi_head(DIM, 2), ffn=GLU_EXPERT
    )
    with pytest.raises(ValueError, match="blocks: no mixture of experts"):
        zoo.convert(dense, draw(dense, 5), GROUP, 4)


def test_models() -> None:
    """Section 6.3's ratio of the experts' parameters, 1/3 + 2 m / (3 D) + 2 m / (3 G f)."""
    tiny, small = 3 * 4 * 16 * 128 * 80, 3 * 20 * 64 * 768 * 384
    for latent, whole, experts, ratio in (
        (zoo.mole_tiny(), mixtures.olmoe_tiny(), tiny, 1 / 3 + 96 / 384 + 96 / 960),
        (zoo.latent_olmoe_small(), mixtures.olmoe_227m(), small, 1 / 3 + 768 / 2304 + 768 / 9216),
    ):
        saved = whole.count().total - latent.count().total
        assert saved == pytest.approx((1 - ratio) * experts, rel=1e-9)


# --- the command ----------------------------------------------------------------------------------

LING = ling.ling(
    vocab_size=256,
    num_layers=3,
    num_dense=1,
    dim=DIM,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    dense_hidden=7,
    ffn=ling.ling_ffn(DIM, 5, num_experts=EXPERTS, top_k=2, num_groups=1, top_groups=1),
)
MODELS = {
    "olmoe": mixtures.olmoe(
        2, DIM, 2, mixtures.olmoe_ffn(DIM, EXPERTS, 2, GLU_EXPERT), vocab_size=256
    ),
    "ling": LING.with_mtp(),
    "switch": llama.byte_llama(2, 32, mixtures.switch_ffn(32, 9, EXPERTS)),
    "dense": llama.byte_llama(2, 32, llama.swiglu(32, 9)),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every model, by its name."""
    folder = tmp_path_factory.mktemp("runs")
    for name, model in MODELS.items():
        save_run(folder / name, replace(load_experiment("tiny"), model=model), draw(model, 5))
    return folder


def command(*argv: Any) -> int:
    return main([str(arg) for arg in argv])


@pytest.mark.parametrize(
    "name, places", [("olmoe", ["blocks/0", "blocks/1"]), ("ling", ["blocks/1/0", "blocks/1/1"])]
)
def test_the_command_makes_a_run_that_evaluates_alike(
    name: str, places: list[str], runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With as many latents as the width nothing is lost; with fewer, the lines say how much."""
    sizes = ["--to", "latent-experts", "--group-size", GROUP]
    full, small = tmp_path / "full", tmp_path / "small"
    assert command("convert", runs / name, *sizes, "--latent", DIM, "--out", full) == 0
    said = capsys.readouterr().out.splitlines()
    exact = [f"{place} {w}: 0.00% lost (exact)" for place in places for w in ("gate", "up")]
    assert said[: len(exact)] == exact
    losses = []
    for run in (runs / name, full):
        assert command("eval", run, "--steps", 2, "--json") == 0
        losses.append(json.loads(capsys.readouterr().out)["nats_per_token"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    assert command("convert", runs / name, *sizes, "--latent", 3, "--out", small) == 0
    said = capsys.readouterr().out
    assert f"{places[0]} gate: " in said and "ranks up to 12, kept 3" in said
    experiment, params = load_run(small)
    assert experiment.run_dir == str(small)
    assert f"{small}: {experiment.model.count().total:,} parameters of " in said
    kinds = {type(layer) for layer in (stack.block.ffn for stack in experiment.model.stacks)}  # type: ignore[attr-defined]
    assert LatentExperts in kinds and MoE not in kinds
    record = json.loads((small / "convert.json").read_text())
    assert 0 < record["lost"][places[0]]["gate"] < 1 and record["latent"] == 3
    if name == "ling":
        assert "mtp/block gate: " in said and "latents" in params["mtp"]["block"]["ffn"]


@pytest.mark.parametrize(
    "argv, message",
    [
        ("dense --group-size 3 --latent 4", "blocks: no mixture of experts"),
        ("switch --group-size 3 --latent 4", "expert: MLP; only a GLU can be converted"),
        ("olmoe --group-size 4 --latent 4", "group_size: 4; need a divisor of the router's num_e"),
        ("olmoe --group-size 0 --latent 4", "group_size: 0; need at least 1"),
        ("olmoe --group-size 3 --latent 13", "latent: 13; need at most 12"),
        ("olmoe --group-size 3 --latent 0", "latent: 0; need at least 1"),
        ("olmoe --group-size 3 --latent 4 --expert-rank 0", "expert_rank: 0; need at least 1"),
        ("olmoe --group-size 3 --latent 4 --step 7", "step: 7; olmoe has checkpoints of 0"),
        ("olmoe --group-size 3 --latent 4 --to mixture", "'mixture'"),
        ("olmoe --group-size 3 --latent 4 --out dense", "out: dense exists already; need a new"),
        ("olmoe --group-size 3", "latent"),
        ("none --group-size 3 --latent 4", "none"),
    ],
)
def test_bad_input_is_one_line(
    argv: str,
    message: str,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(runs)
    before = sorted(path.name for path in runs.iterdir())
    assert command("convert", *argv.split()) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert sorted(path.name for path in runs.iterdir()) == before


# --- the layer ------------------------------------------------------------------------------------


def test_every_parameter_learns_through_scan_and_remat() -> None:
    mixer = Attention(dim=DIM, num_heads=2, num_kv_heads=2, head_dim=6)
    stack = Repeat(block=Block(mixer=mixer, ffn=LATENT, norm=RMSNorm(dim=DIM)), n=2, remat="full")

    @jax.jit
    def gradient(params: Any) -> Any:
        return jax.grad(lambda params: (stack.apply(params, jnp.asarray(X))[0] ** 2).sum())(params)

    for path, g in flatten(gradient(draw(stack, 5))):
        assert np.all(np.any(g, axis=tuple(range(1, g.ndim)))), path


def test_sharded_equals_unsharded(mesh: jax.sharding.Mesh) -> None:
    """Latents travel to experts on other devices; values and gradients."""
    params, x = draw(LATENT, 5), jnp.tile(X, (2, 1, 1))

    def run(params: Any, x: jax.Array) -> tuple:
        def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y, aux = LATENT.apply(params, x)
            return (y**2).sum() + aux.losses["load_balance"], y

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    expected = jax.jit(run)(params, x)
    with jax.set_mesh(mesh), use_rules(DEFAULT_RULES):
        placed = jax.device_put(params, jax.tree.map(lambda s: s.sharding, LATENT.abstract(mesh)))
        actual = jax.jit(run)(placed, x)
    jax.tree.map(lambda ours, theirs: close(ours, theirs, rtol=2e-5), actual, expected)


def test_parameters_and_costs() -> None:
    """Section 6.3: 2 m D + G (2 f m + D f) a group; a token uses top_k experts."""
    m, router = LATENT.latent, DIM * EXPERTS
    shared, own = 2 * m * DIM, 2 * HIDDEN * m + DIM * HIDDEN
    total = router + 2 * (shared + GROUP * own)
    assert LATENT.count() == Count(total, router + 2 * shared + 2 * own)
    cost = LATENT.cost(7)
    assert cost.flops == cost.active_flops == 2 * (router + 2 * shared + 2 * own)


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: LatentExperts(router=ROUTER, group_size=4, latent=3, hidden=5),
            "group_size: 4; need a divisor of the router's num_experts 6",
        ),
        (lambda: factorise(np.ones((6, 4, 3)), 4, 2), "group_size: 4; need a divisor of the 6"),
        (lambda: factorise(np.ones((6, 4, 3)), 3, 5), "latent: 5; need at most 4"),
        (
            lambda: factorise(np.ones((6, 4, 3)), 3, 2, moment=np.eye(3)),
            r"moment: shape \(3, 3\); need \(4, 4\)",
        ),
        (
            lambda: convert(
                MoE(router=ROUTER, expert=MLP(dim=DIM, hidden=4, activation=Silu())), {}, 3, 2
            ),
            "expert: MLP; only a GLU can be converted",
        ),
    ],
)
def test_impossible_requests_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
