"""Sparsing Law: thresholds and masks of the released program, definitions in NumPy, a model."""

import functools
import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.eval import evaluate as evaluation
from bestiary.eval.evaluate import Evaluate, evaluate
from bestiary.eval.probes import Cett, Curve, Fat, Survey, TopK, feedforwards, with_probes
from bestiary.eval.sparsity import candidate_range, sparsity, threshold
from bestiary.layers import (
    GLU,
    MLP,
    Attention,
    Chain,
    Context,
    GaussianGLU,
    Layer,
    MoE,
    Relu,
    Repeat,
    RMSNorm,
    Router,
    Silu,
    SparkFFN,
)
from bestiary.train.corpus import Corpus
from bestiary.train.data import Data, validation_batches
from bestiary.zoo.decoder import Block, Decoder
from bestiary.zoo.llama import llama

ACTIVATIONS = {"relu": Relu, "silu": Silu}


@pytest.mark.golden("sparsing_law_cett")
def test_thresholds_and_masks_equal_the_released_program(golden: SimpleNamespace) -> None:
    a, hp = golden.arrays, golden.hp
    dim, hidden = hp["hidden_size"], hp["intermediate_size"]
    ffn = GLU(dim=dim, hidden=hidden, activation=ACTIVATIONS[hp["activation"]]())
    real, count = a["attention_mask"] > 0, hp["num_candidates"]
    stride = max(1, int(real.sum()) * hidden // count)

    @jax.jit
    def run(params: Any, probe: Any, x: jax.Array) -> tuple:
        y, aux = ffn.apply(params | {"activation": {}, "probe": probe}, x)
        return y, aux.metrics

    def kept(probe: Any, h: jax.Array, gate: jax.Array, w: jax.Array) -> np.ndarray:
        """Which activations a probe keeps, exact zeros among them."""
        return np.asarray(probe(jnp.ones_like(h), gate, w, Context())[0]) != 0

    for i in range(hp["num_layers"]):
        names = {"gate": "W_gate", "up": "W_up", "down": "W_down"}
        params = {ours: jnp.asarray(a[theirs][i].T) for ours, theirs in names.items()}
        x = jnp.asarray(a["x"][i])
        seen = jnp.asarray(a["x"][i][real][None])
        survey = run(params, Survey(stride), seen)[1]
        survey = jax.device_get({name: survey[name] for name in ("least", "sizes")})
        least, most = candidate_range([survey], hp["candidate_max_quantile"])
        increments = run(params, Curve(least, most, count), seen)[1]["cett"]
        curve = np.cumsum(np.asarray(increments, np.float64)) / real.sum()
        for target in hp["cett_targets"]:
            tag = target["tag"]
            t = threshold(curve, least, most, target["cett"])
            step = 1.01 * (most - least) / (count - 1)
            assert abs(t - a[f"{tag}_threshold"][i]) <= step, tag
            exactly = Cett(a[f"{tag}_threshold"][i])
            y = run(params, exactly, x)[0]
            np.testing.assert_allclose(y, a[f"{tag}_y"][i], rtol=1e-5, atol=1e-5)
            thinned, _ = exactly(jnp.asarray(a["intermediate"][i]), x, params["down"], Context())
            ratio = (np.asarray(thinned) != 0).mean(-1)
            np.testing.assert_allclose(ratio, a[f"{tag}_active_ratio"][i], rtol=1e-5)
        gate = ffn.activation.apply({}, x @ params["gate"])
        h, w = gate * (x @ params["up"]), params["down"]
        np.testing.assert_allclose(h, a["intermediate"][i], rtol=1e-4, atol=1e-5)
        fat = f"fat{hp['fat_eps']}_mask"
        np.testing.assert_array_equal(~kept(Fat(hp["fat_eps"]), h, gate, w), a[fat][i])
        topk, share = f"topk{hp['topk_keep_ratio']}_mask", hp["topk_keep_ratio"]
        # exact zeros count as left out
        left_out = ~kept(TopK(share), h, gate, w) | (np.asarray(gate) == 0)
        np.testing.assert_array_equal(left_out, a[topk][i])


# --- definitions ----------------------------------------------------------------------------------

B, T, D, F = 2, 5, 7, 11


def layer_arrays() -> tuple[np.ndarray, np.ndarray, Context]:
    rng = np.random.default_rng(0)
    h, w = rng.normal(size=(B, T, F)), rng.normal(size=(F, D))
    h[0, 1] = 0  # a token without any activation
    return h.astype(np.float32), w.astype(np.float32), Context(segment_ids=SEGMENTS)


SEGMENTS = jnp.array([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]])


def test_the_curve_is_cett_at_every_candidate():
    h, w, ctx = layer_arrays()
    sizes = np.abs(h) * np.linalg.norm(w, axis=-1)
    real = np.asarray(SEGMENTS) > 0
    least, most, count = np.float32(0), np.float32(sizes.max() / 2), 40
    report = Curve(least, most, count)(jnp.asarray(h), jnp.asarray(h), jnp.asarray(w), ctx)[1]
    curve = np.cumsum(np.asarray(report["cett"], np.float64))
    for candidate, cett in zip(np.linspace(least, most, count), curve, strict=True):
        part = np.linalg.norm(np.where(sizes <= candidate, h, 0) @ w, axis=-1)
        whole = np.linalg.norm(h @ w, axis=-1)
        expected = (part / np.where(whole > 0, whole, 1))[real].sum()
        np.testing.assert_allclose(cett, expected, rtol=1e-5, atol=1e-6)


def test_a_survey_leaves_padding_out():
    h, w, ctx = layer_arrays()
    report = Survey(3)(jnp.asarray(h), jnp.asarray(-h), jnp.asarray(w), ctx)[1]
    real = np.broadcast_to(np.asarray(SEGMENTS)[..., None] > 0, h.shape).ravel()[::3]
    sizes = (np.abs(h) * np.linalg.norm(w, axis=-1)).ravel()[::3]
    np.testing.assert_allclose(report["sizes"], np.where(real, sizes, np.nan), rtol=1e-6)
    np.testing.assert_allclose(
        report["gates"], np.where(real, np.abs(h).ravel()[::3], np.nan), rtol=1e-6
    )
    assert report["least"] == 0


def test_a_threshold_is_the_candidate_before_the_first_above():
    curve = np.array([[0, 0.1, 0.2, 0.3, 0.9], [0.5, 0.6, 0.7, 0.8, 0.9]])
    least, most = np.float32([0, 1]), np.float32([4, 5])
    np.testing.assert_array_equal(threshold(curve, least, most, 0.25), [2, 1])
    np.testing.assert_array_equal(threshold(curve, least, most, 0.65), [3, 2])
    assert threshold(curve[0], 0.0, 4.0, 0.05) == 0  # without leading axes


# --- layers and models ----------------------------------------------------------------------------

DIM, HIDDEN, VOCAB = 16, 24, 256
ATTENTION = Attention(dim=DIM, num_heads=2, num_kv_heads=1, head_dim=8)
FFNS: dict[str, Layer] = {
    "glu": GLU(dim=DIM, hidden=HIDDEN, activation=Silu(), bias=True),
    "mlp": MLP(dim=DIM, hidden=HIDDEN, activation=Relu(), bias=True),
    "spark": SparkFFN(dim=DIM, hidden=HIDDEN, predictor_dim=6, top_k=9),
    "gaussian": GaussianGLU(dim=DIM, hidden=HIDDEN, sparsity=0.4),
}


@pytest.mark.parametrize("name", FFNS)
def test_every_feedforward_shows_its_activations_and_gate(name: str) -> None:
    ffn = FFNS[name]
    params = ffn.init(jax.random.key(0))
    [(path, down)] = feedforwards({"x": ffn.declare()}).items()
    assert path == "x" and down.shape == (HIDDEN, DIM)
    x = jax.random.normal(jax.random.key(1), (B, T, DIM))
    seen = {}

    def probe(h: jax.Array, gate: jax.Array, w: jax.Array, ctx: Context) -> tuple:
        seen.update(h=h, gate=gate, w=w)
        return h.at[..., 3:].set(0), {"some": jnp.float32(5)}

    y, aux = ffn.apply(params | {"probe": probe}, x)
    h, gate = seen["h"], seen["gate"]
    whole = ffn.apply(params, x)[0]
    bias = params.get("down_bias", 0)
    np.testing.assert_allclose(h @ seen["w"] + bias, whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(h[..., :3] @ seen["w"][:3] + bias, y, rtol=1e-4, atol=1e-5)
    assert aux.metrics["some"] == 5 and aux.metrics["nonzero"] <= 3 / HIDDEN
    gated = {"glu": "up", "gaussian": "up", "spark": "value"}
    if name in gated:
        values = x[..., -params[gated[name]].shape[0] :] @ params[gated[name]]
        values += params.get("up_bias", 0)
        np.testing.assert_allclose(gate * values, h, rtol=1e-4, atol=1e-5)
    else:
        assert gate is h


def decoder(*ffns: Layer, n: int = 2) -> Decoder:
    norm = RMSNorm(dim=DIM)
    blocks = tuple(Block(mixer=ATTENTION, ffn=ffn, norm=norm) for ffn in ffns)
    small = llama(vocab_size=VOCAB, num_layers=n, attention=ATTENTION, ffn=ffns[0], tied=True)
    block = blocks[0] if len(blocks) == 1 else Chain(layers=blocks)
    first = Repeat(block=Block(mixer=ATTENTION, ffn=FFNS["mlp"], norm=norm), n=1)
    stacks = Chain(layers=(first, Repeat(block=block, n=n)))
    return Decoder(embedding=small.embedding, blocks=stacks, norm=norm)


MODEL = decoder(FFNS["glu"], FFNS["spark"])


@functools.cache
def weights() -> Any:
    """Away from the start, where all tokens are alike: the loss depends on the feed-forwards."""
    params = MODEL.init(jax.random.key(0))
    return jax.tree.map(lambda x: 2.0 * x, params)


@functools.cache
def batches() -> list:
    rng = np.random.default_rng(0)
    tokens = np.cumsum(rng.integers(0, 3, 140)).astype(np.uint8)
    data = Data(length=16, batch_size=3)
    return list(validation_batches(Corpus(tokens, np.array([0, 60])), data))


def test_feedforwards_of_a_model_are_found_by_declaration():
    found = feedforwards(MODEL.declare())
    paths = ["blocks/0/ffn", "blocks/1/0/ffn", "blocks/1/1/ffn"]
    assert list(found) == paths
    assert [p.shape for p in found.values()] == [(1, 24, 16), (2, 24, 16), (2, 24, 16)]
    probed = with_probes(weights(), dict.fromkeys(paths, Survey(1)))
    assert probed["blocks"]["1"]["1"]["ffn"]["probe"] == Survey(1)
    assert "probe" not in weights()["blocks"]["0"]["ffn"]


@functools.cache
def measured() -> Any:
    return sparsity(MODEL, weights(), batches(), np.zeros(VOCAB), 0.02)


def test_the_target_is_the_largest_that_the_perplexity_allows():
    result = measured()
    dense = evaluate(MODEL, weights(), batches(), np.zeros(VOCAB))
    assert result.zeros.perplexity == dense.perplexity
    assert 0 < result.cett.setting < 1
    assert dense.perplexity < result.cett.perplexity < 1.02 * dense.perplexity
    assert result.cett.perplexity > 1.01 * dense.perplexity
    assert result.cett.activation_ratio < result.zeros.activation_ratio
    probes = {p: Cett(jnp.asarray(t)) for p, t in result.thresholds.items()}
    again = evaluate(MODEL, with_probes(weights(), probes), batches(), np.zeros(VOCAB))
    np.testing.assert_allclose(again.perplexity, result.cett.perplexity, rtol=1e-6)
    for path, shares in result.cett.layers.items():
        np.testing.assert_allclose(again.nonzero[f"{path}/nonzero"], shares)
    shares = np.concatenate(list(result.cett.layers.values()))
    assert len(shares) == 5
    np.testing.assert_allclose(shares.mean(), result.cett.activation_ratio)


def test_thresholds_reach_their_cett_in_every_layer():
    """By dense forward passes that leave out what a threshold does, layer by layer."""
    result = measured()
    batch = batches()[0]
    ctx = Context(
        positions=jnp.asarray(batch["positions"]), segment_ids=jnp.asarray(batch["segment_ids"])
    )
    errors: list[float] = []

    def probe(t: float) -> Any:
        def see(h: jax.Array, gate: jax.Array, w: jax.Array, ctx: Context) -> tuple:
            part = Cett(t)(h, gate, w, ctx)[0]
            norms = [jnp.linalg.norm(x @ w, axis=-1) for x in (h - part, h)]
            errors.append(float(jnp.mean(norms[0] / norms[1])))
            return h, {}

        return see

    ffn, [t] = MODEL.stacks[0].block, result.thresholds["blocks/0/ffn"]
    params = jax.tree.map(lambda x: x[0], weights()["blocks"]["0"])
    params["ffn"]["probe"] = probe(t)
    x = MODEL.embedding.apply(weights()["embedding"], jnp.asarray(batch["inputs"]))
    ffn.apply(params, x, ctx)
    np.testing.assert_allclose(errors, result.cett.setting, rtol=0.3)  # one batch of several


def test_baselines_have_the_same_ratio():
    result = measured()
    for rule in (result.fat, result.topk):
        np.testing.assert_allclose(rule.activation_ratio, result.cett.activation_ratio, rtol=0.15)
        assert rule.perplexity > result.zeros.perplexity
    assert result.topk.setting == result.cett.activation_ratio


def test_a_model_that_shows_nothing_is_refused():
    class Silent(GLU):
        def apply(self, params: Any, x: jax.Array, ctx: Any = None) -> Any:
            shown = {name: value for name, value in params.items() if name != "probe"}
            return super().apply(shown, x, ctx)

    silent = jax.tree_util.register_static(Silent)
    ffn = silent(dim=DIM, hidden=HIDDEN, activation=Silu())
    model = llama(vocab_size=VOCAB, num_layers=1, attention=ATTENTION, ffn=ffn, tied=True)
    with pytest.raises(ValueError, match="^run: its model has no feed-forward that shows"):
        sparsity(model, model.init(jax.random.key(0)), batches()[:1], np.zeros(VOCAB))


# --- mixtures of experts --------------------------------------------------------------------------

EXPERTS, USED = 5, 2
MIXTURE = MoE(
    router=Router(dim=DIM, num_experts=EXPERTS, top_k=USED),
    expert=GLU(dim=DIM, hidden=HIDDEN, activation=Silu()),
    shared=GLU(dim=DIM, hidden=9, activation=Silu()),
)


def mixture_arrays() -> tuple[Any, jax.Array, np.ndarray, np.ndarray, np.ndarray]:
    """Parameters, x, and by NumPy of every token: its experts' activations, times the routing
    weights, and gates [B, T, USED, HIDDEN], and the rows of theirs [B, T, USED, HIDDEN, DIM]."""
    params = MIXTURE.init(jax.random.key(0))
    x = np.random.default_rng(1).normal(size=(B, T, DIM)).astype(np.float32)
    logits = x @ np.asarray(params["router"]["weight"])
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-weights, -1)[..., :USED]
    gate, up, rows = (np.asarray(params["experts"][n])[chosen] for n in ("gate", "up", "down"))
    z = np.einsum("btd,btkdf->btkf", x, gate)
    z = z / (1 + np.exp(-z))
    weights = np.take_along_axis(weights, chosen, -1)[..., None]
    h = weights * z * np.einsum("btd,btkdf->btkf", x, up)
    return params, jnp.asarray(x), h, z, rows


def test_a_mixture_shows_the_units_of_each_tokens_experts():
    params, x, h, gate, rows = mixture_arrays()
    seen = {}

    def probe(h: jax.Array, gate: jax.Array, w: Any, ctx: Context) -> tuple:
        seen.update(h=h, gate=gate, w=w)
        return h, {}

    probed = with_probes(params, {"experts": probe})
    whole, aux = MIXTURE.apply(probed, x)
    np.testing.assert_allclose(whole, MIXTURE.apply(params, x)[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen["h"], h.reshape(B, T, -1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(seen["gate"], gate.reshape(B, T, -1), rtol=1e-4, atol=1e-6)
    at = seen["w"].rows[seen["w"].units]
    np.testing.assert_array_equal(at, rows.reshape(B, T, -1, DIM))
    assert aux.metrics["experts"]["nonzero"] == 1
    shared = MIXTURE.shared.apply(params["shared"], x)[0]
    sizes = np.abs(h) * np.linalg.norm(rows, axis=-1)
    t = np.median(sizes)
    expected = np.einsum("btkf,btkfd->btd", np.where(sizes < t, 0, h), rows)
    thinned, aux = MIXTURE.apply(with_probes(params, {"experts": Cett(t)}), x)
    np.testing.assert_allclose(thinned - shared, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(aux.metrics["experts"]["nonzero"], (sizes >= t).mean(), 1e-6)


def test_the_curve_of_a_mixture_is_cett_of_the_sum_over_its_experts():
    params, x, h, _, rows = mixture_arrays()
    sizes, ctx = np.abs(h) * np.linalg.norm(rows, axis=-1), Context(segment_ids=SEGMENTS)
    least, most, count = np.float32(0), np.float32(sizes.max() / 2), 40
    probed = with_probes(params, {"experts": Curve(least, most, count)})
    increments = MIXTURE.apply(probed, x, ctx)[1].metrics["experts"]["cett"]
    curve = np.cumsum(np.asarray(increments, np.float64))
    whole = np.linalg.norm(np.einsum("btkf,btkfd->btd", h, rows), axis=-1)
    for candidate, cett in zip(np.linspace(least, most, count), curve, strict=True):
        part = np.einsum("btkf,btkfd->btd", np.where(sizes <= candidate, h, 0), rows)
        error = np.linalg.norm(part, axis=-1) / whole
        np.testing.assert_allclose(cett, error[np.asarray(SEGMENTS) > 0].sum(), rtol=1e-3)


def test_one_expert_that_all_tokens_use_is_a_feedforward():
    """As wide as the model's own: thresholds, ratios and perplexities are the same."""
    alone = FFNS["gaussian"]
    ffn = MoE(router=Router(dim=DIM, num_experts=1, top_k=1), expert=alone)
    dense, mixture = decoder(alone, n=1), decoder(ffn, n=1)
    params = jax.tree.map(lambda x: 2.0 * x, dense.init(jax.random.key(0)))
    layers = params["blocks"]["1"]
    experts = jax.tree.map(lambda w: w[:, None], layers["ffn"])
    ffn_params = {"router": {"weight": jnp.zeros((1, DIM, 1))}, "experts": experts}
    other = params | {"blocks": params["blocks"] | {"1": layers | {"ffn": ffn_params}}}
    a, b = (
        sparsity(model, p, batches(), np.zeros(VOCAB), 0.05)
        for model, p in ((dense, params), (mixture, other))
    )
    paths = {"blocks/0/ffn": "blocks/0/ffn", "blocks/1/ffn": "blocks/1/ffn/experts"}
    assert list(b.thresholds) == list(paths.values())
    for rule in ("zeros", "cett", "fat", "topk"):
        one, two = getattr(a, rule), getattr(b, rule)
        np.testing.assert_allclose(two.perplexity, one.perplexity, rtol=1e-4, err_msg=rule)
        for path, its in paths.items():
            np.testing.assert_allclose(two.layers[its], one.layers[path], atol=5e-3, err_msg=rule)
    assert 0 < b.cett.activation_ratio < b.zeros.activation_ratio
    assert b.cett.perplexity < 1.05 * b.zeros.perplexity


# --- the command ----------------------------------------------------------------------------------


def test_the_command_reports_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    (tmp_path / "text.txt").write_text("0123456789" * 30)
    data = Data(path=str(tmp_path / "text.txt"), length=16, batch_size=3, validation_fraction=0.4)
    loaded = SimpleNamespace(model=MODEL, data=data), weights()
    monkeypatch.setattr("bestiary.train.checkpoint.load_run", lambda path: loaded)
    evaluation.run(Evaluate(run_dir="x", sparsity=True, ppl_increase=0.02, json=True))
    found = json.loads(capsys.readouterr().out)["sparsity"]
    assert found["cett"]["perplexity"] <= 1.02 * found["zeros"]["perplexity"]
    assert set(found["thresholds"]) == {"blocks/0/ffn", "blocks/1/0/ffn", "blocks/1/1/ffn"}
    evaluation.run(Evaluate(run_dir="x", sparsity=True, steps=1))
    said = capsys.readouterr().out
    for word in ("exact zeros", "CETT", "FAT-eps", "top-k", "blocks/1/0/ffn"):
        assert word in said


def test_an_increase_that_is_none_is_refused():
    with pytest.raises(ValueError, match="^ppl_increase: 0; need more than 0$"):
        Evaluate(run_dir="x", ppl_increase=0)
