"""Whole models with mixtures of experts: golden vectors, published sizes, and training signals."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.layers import (
    DEFAULT_RULES,
    GLU,
    Attention,
    Embedding,
    Linear,
    MoE,
    Repeat,
    RMSNorm,
    Rope,
    Router,
    Silu,
    use_rules,
)
from bestiary.layers.base import Context, flatten
from bestiary.train.data import Data
from bestiary.train.experiment import Experiment
from bestiary.train.mesh import placed
from bestiary.train.objective import further_targets
from bestiary.train.step import init_state, make_step, merge
from bestiary.zoo import load_model
from bestiary.zoo.decoder import Block, Decoder
from bestiary.zoo.ling import ling, ling_ffn


def close(actual: Any, expected: Any, what: str = "", rtol: float = 2e-5) -> None:
    expected = np.asarray(expected)
    scale = np.abs(expected).max(initial=1e-30)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * scale, err_msg=what)


def tensors(golden: SimpleNamespace) -> dict[str, np.ndarray]:
    prefix = golden.hp["weight_prefix"]
    named = golden.arrays.items()
    return {k.removeprefix(prefix): v for k, v in named if k.startswith(prefix)}


def heads(w: np.ndarray, head_dim: int) -> jax.Array:
    """[heads * head_dim, dim] -> [dim, heads, head_dim]."""
    return jnp.asarray(w.T.reshape(w.shape[1], -1, head_dim))


def gated(w: dict[str, np.ndarray], prefix: str, suffix: str = ".weight") -> dict[str, Any]:
    names = {name: f"{prefix}.{name}_proj{suffix}" for name in ("gate", "up", "down")}
    return {k: jnp.asarray(w[v].swapaxes(-1, -2)) for k, v in names.items()} | {"activation": {}}


def stacked(layers: list[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


def next_token_loss(logits: jax.Array, ids: jax.Array, ahead: int = 1) -> jax.Array:
    """Mean negative log-likelihood of the token `ahead` of each position that has one."""
    log_p = jax.nn.log_softmax(logits[:, :-ahead])
    return -jnp.take_along_axis(log_p, ids[:, ahead:, None], -1).mean()


@pytest.mark.golden("moe_olmoe")
@pytest.mark.parametrize("path", ["masked", "sorted"])
def test_olmoe(golden: SimpleNamespace, path: Any) -> None:
    a, hp, w = golden.arrays, golden.hp, tensors(golden)
    assert hp["qk_norm"] == "full_width" and hp["hidden_act"] == "silu"
    dim, head_dim, n = hp["hidden_size"], hp["head_dim"], hp["num_experts"]
    num_heads, num_kv_heads = hp["num_attention_heads"], hp["num_key_value_heads"]
    norm = RMSNorm(dim=dim, eps=hp["rms_norm_eps"])
    attention = Attention(
        dim=dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        query_norm=dataclasses.replace(norm, dim=num_heads * head_dim),
        key_norm=dataclasses.replace(norm, dim=num_kv_heads * head_dim),
        rope=Rope(theta=hp["rope_theta"]),
    )
    router = Router(
        dim=dim,
        num_experts=n,
        top_k=hp["num_experts_per_tok"],
        score=hp["router_score"],
        normalize=hp["norm_topk_prob"],
    )
    expert = GLU(dim=dim, hidden=hp["intermediate_size"], activation=Silu())
    tied = hp["tie_word_embeddings"]
    head = Linear(inputs=dim, outputs=hp["vocab_size"], axes=("embed", "vocab"))
    block = Block(mixer=attention, ffn=MoE(router=router, expert=expert, path=path), norm=norm)
    model = Decoder(
        embedding=Embedding(vocab_size=hp["vocab_size"], dim=dim),
        blocks=Repeat(block=block, n=hp["num_hidden_layers"], remat="full"),
        norm=norm,
        head=None if tied else head,
    )

    def layer(w: dict[str, np.ndarray], i: int) -> Any:
        """One layer's parameters; what `w` does not have is left out."""
        p = f"model.layers.{i}."
        gate, up = np.split(w[p + "mlp.experts.gate_up_proj"], 2, 1)
        experts = {"gate": gate, "up": up, "down": w[p + "mlp.experts.down_proj"]}
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
        mixer = {k: heads(w[f"{p}self_attn.{v}.weight"], head_dim) for k, v in names.items()}
        return {
            "mixer": mixer
            | {
                "out": w[p + "self_attn.o_proj.weight"].T.reshape(num_heads, head_dim, dim),
                "query_norm": {"weight": w[p + "self_attn.q_norm.weight"]},
                "key_norm": {"weight": w[p + "self_attn.k_norm.weight"]},
            },
            "ffn": {
                "router": {"weight": w[p + "mlp.gate.weight"].T},
                "experts": {k: v.swapaxes(1, 2) for k, v in experts.items()} | {"activation": {}},
            },
            "mixer_norm": {"weight": w[p + "input_layernorm.weight"]},
            "ffn_norm": {"weight": w[p + "post_attention_layernorm.weight"]},
        }

    params = {
        "embedding": {"table": jnp.asarray(w["model.embed_tokens.weight"])},
        "blocks": stacked([layer(w, i) for i in range(hp["num_hidden_layers"])]),
        "norm": {"weight": jnp.asarray(w["model.norm.weight"])},
    }
    if not tied:
        params["head"] = {"weight": jnp.asarray(w["lm_head.weight"].T)}
    ids = jnp.asarray(a["input_ids"], jnp.int32)

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits, _, _ = model.apply(params, ids)
        return next_token_loss(logits, ids), logits

    (value, logits), g = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    close(logits, a["logits"], "logits")
    close(value, a["loss"], "loss")
    for name in [k for k in a if k.startswith(hp["gradient_prefix"])]:
        plain = name.removeprefix(hp["gradient_prefix"])
        if plain == "model.norm.weight":
            close(g["norm"]["weight"], a[name], name)
            continue
        _, _, i, *rest = plain.split(".")
        mine = jax.tree.map(lambda x, i=i: np.asarray(x[int(i)]), g["blocks"])
        experts = {
            k: v.swapaxes(-1, -2) for k, v in mine["ffn"]["experts"].items() if k != "activation"
        }
        ours = {
            "self_attn.q_norm.weight": lambda m=mine: m["mixer"]["query_norm"]["weight"],
            "self_attn.k_norm.weight": lambda m=mine: m["mixer"]["key_norm"]["weight"],
            "mlp.gate.weight": lambda m=mine: m["ffn"]["router"]["weight"].T,
            "mlp.experts.gate_up_proj": lambda e=experts: np.concatenate((e["gate"], e["up"]), 1),
            "mlp.experts.down_proj": lambda e=experts: e["down"],
            "input_layernorm.weight": lambda m=mine: m["mixer_norm"]["weight"],
            "post_attention_layernorm.weight": lambda m=mine: m["ffn_norm"]["weight"],
        }
        close(ours[".".join(rest)](), a[name], name)


@pytest.mark.golden("ling_model")
def test_ling(golden: SimpleNamespace) -> None:
    a, hp, w = golden.arrays, golden.hp, tensors(golden)
    assert hp["qk_norm"] == "per_head" and hp["hidden_act"] == "silu" and hp["norm_topk_prob"]
    assert hp["router_score"] == "sigmoid" and hp["group_score_top"] == 2
    assert not hp["attention_bias"] and hp["num_nextn_predict_layers"] == 1
    dim, head_dim, depth = hp["hidden_size"], hp["head_dim"], hp["num_hidden_layers"]
    num_heads, num_kv_heads = hp["num_attention_heads"], hp["num_key_value_heads"]
    num_dense, tied = hp["first_k_dense_replace"], hp["tie_word_embeddings"]
    ffn = ling_ffn(
        dim,
        hp["moe_intermediate_size"],
        num_experts=hp["num_experts"],
        top_k=hp["num_experts_per_tok"],
        num_shared=hp["num_shared_experts"],
        num_groups=hp["n_group"],
        top_groups=hp["topk_group"],
    )
    ffn = dataclasses.replace(
        ffn, router=dataclasses.replace(ffn.router, scale=hp["routed_scaling_factor"])
    )
    model = ling(
        vocab_size=hp["vocab_size"],
        num_layers=depth,
        num_dense=num_dense,
        dim=dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dense_hidden=hp["intermediate_size"],
        ffn=ffn,
        rope=Rope(theta=hp["rope_theta"], fraction=hp["partial_rotary_factor"]),
        eps=hp["rms_norm_eps"],
        tied=tied,
    ).with_mtp()
    assert model.mtp is not None

    def block(i: int) -> Any:
        p = f"model.layers.{i}."
        q, k, v = np.split(
            heads(w[p + "attention.query_key_value.weight"], head_dim),
            np.cumsum([num_heads, num_kv_heads]),
            axis=1,
        )
        if p + "mlp.gate.weight" in w:
            bias = jnp.asarray(w[p + "mlp.gate.expert_bias"])
            feed_forward = {
                "router": {
                    "weight": jnp.asarray(w[p + "mlp.gate.weight"].T),
                    "bias": bias,
                    "load": jnp.zeros_like(bias),
                },
                "experts": gated(w, p + "mlp.experts", ""),
                "shared": gated(w, p + "mlp.shared_experts"),
            }
        else:
            feed_forward = gated(w, p + "mlp")
        return {
            "mixer": {
                "query": q,
                "key": k,
                "value": v,
                "out": w[p + "attention.dense.weight"].T.reshape(num_heads, head_dim, dim),
                "query_norm": {"weight": w[p + "attention.query_layernorm.weight"]},
                "key_norm": {"weight": w[p + "attention.key_layernorm.weight"]},
            },
            "ffn": feed_forward,
            "mixer_norm": {"weight": w[p + "input_layernorm.weight"]},
            "ffn_norm": {"weight": w[p + "post_attention_layernorm.weight"]},
        }

    last = f"model.layers.{hp['mtp_layer_index']}."
    groups = [range(num_dense), range(num_dense, depth)]
    stacks = [stacked([block(i) for i in group]) for group in groups if group]
    params = {
        "embedding": {"table": jnp.asarray(w["model.word_embeddings.weight"])},
        "blocks": stacks[0] if len(stacks) == 1 else {str(i): s for i, s in enumerate(stacks)},
        "norm": {"weight": jnp.asarray(w["model.norm.weight"])},
        "mtp": {
            "embedding_norm": {"weight": w[last + "enorm.weight"]},
            "hidden_norm": {"weight": w[last + "hnorm.weight"]},
            "final_norm": {"weight": w[last + "final_layernorm.weight"]},
            "project": {"weight": w[last + "eh_proj.weight"].T},
            "block": block(hp["mtp_layer_index"]),
        },
    }
    if not tied:
        params["head"] = {"weight": jnp.asarray(w["lm_head.weight"].T)}
    params = jax.tree.map(jnp.asarray, params)
    assert jax.tree.structure(params) == jax.tree.structure(model.abstract())
    ids = jnp.asarray(a["input_ids"], jnp.int32)
    following = jnp.roll(ids, -1, 1).at[:, -1].set(0)

    @jax.jit
    def run(params: Any) -> Any:
        x, _, _ = model.hidden(params, ids)
        further, _ = model.further(params, x, following)
        return x, further, model.logits(params, x), model.logits(params, further)

    x, further, logits, mtp_logits = run(params)
    close(x, a[f"hidden_{depth}"], "final hidden states")
    close(further, a[f"hidden_{depth + 1}"], "MTP hidden states")
    close(logits, a["logits"], "logits")
    close(mtp_logits, a["mtp_logits"], "mtp_logits")
    close(next_token_loss(logits, ids), a["loss_next"], "loss_next")
    close(next_token_loss(mtp_logits, ids, 2), a["loss_mtp"], "loss_mtp")

    states, routings = by_layer(model, params, ids)
    mixtures = sum(isinstance(stack.block.ffn, MoE) * stack.n for stack in model.stacks)
    # the router of the MTP block comes after those of the stacks
    mtp, embedded = params["mtp"], model.embedding.apply(params["embedding"], following)
    e = model.norm.apply(mtp["embedding_norm"], embedded)
    h = model.norm.apply(mtp["hidden_norm"], states[-1])
    z = jnp.concatenate((e, h), -1) @ mtp["project"]["weight"]
    routings.append(through(model.mtp.block, mtp["block"], z)[1])
    assert len(routings) == mixtures + 1 == hp["num_moe_layers"]
    for i, x in enumerate(states):
        close(x, a[f"hidden_{i}"], f"hidden_{i}")
    for i, (logits, experts) in enumerate(routings):
        close(logits, a[f"router_logits_{i}"], f"router_logits_{i}")
        assert np.array_equal(np.sort(experts), np.sort(a[f"router_idx_{i}"]))


def through(block: Block, params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """A block's output, and (router logits, experts) if it has a router."""
    z = block.norm.apply(params["mixer_norm"], x)
    between = x + block.mixer.apply(params["mixer"], z)[0]
    z = block.norm.apply(params["ffn_norm"], between)
    routing = None
    if isinstance(block.ffn, MoE):
        router, mine = block.ffn.router, params["ffn"]["router"]
        routing = router.logits(mine, z), router.apply(mine, z)[0].experts
    return block.apply(params, x)[0], routing


def by_layer(model: Decoder, params: Any, ids: jax.Array) -> tuple[list[jax.Array], list[Any]]:
    """The input of every block and the final hidden states; router logits and experts."""
    x, routings = model.embedding.apply(params["embedding"], ids), []
    states = [x]
    for i, stack in enumerate(model.stacks):
        mine = params["blocks"][str(i)] if len(model.stacks) > 1 else params["blocks"]
        for j in range(stack.n):
            x, routing = through(stack.block, jax.tree.map(lambda w, j=j: w[j], mine), x)
            states.append(x)
            routings += [] if routing is None else [routing]
    states[-1] = model.norm.apply(params["norm"], x)
    return states, routings


PUBLISHED = {  # totals and active parameters in billions, as the papers round them
    "olmoe_1b7b": (6.92, 1.28),
    "olmoe_227m": (1.18, 0.227),
    "mixtral_8x7b": (46.7, 12.9),
    "glam_64b_64e": (1162, 96.6),
    "ling_mini_2": (16, 1.4),
    "ling_flash_2": (103, 6.1),
    "ling_1t": (1000, 51),
    "sigma_moe_tiny": (20, 0.77),  # 0.5 beside the vocabulary's
    "pangu_ultra_moe": (718, 39),
    "polycom_olmoe_1b7b": (6.92, 1.28),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    """To 4 %, 10 % for GLaM, whose positions and norms differ here."""
    count, rtol = load_model(name).count(), 0.1 if name.startswith("glam") else 0.04
    np.testing.assert_allclose(np.array(count) / 1e9, PUBLISHED[name], rtol=rtol)


# --- training -------------------------------------------------------------------------------------


def small(**options: Any) -> Decoder:
    """A dense block and two mixtures, with a selection bias."""
    ffn = ling_ffn(16, 12, num_experts=6, top_k=2, num_groups=1, top_groups=1)
    ffn = dataclasses.replace(ffn, router=dataclasses.replace(ffn.router, **options))
    return ling(
        vocab_size=256,
        num_layers=3,
        num_dense=1,
        dim=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        dense_hidden=24,
        ffn=ffn,
        tied=True,
        std=None,
    )


def batch(rows: int, length: int) -> dict[str, np.ndarray]:
    """Two documents in each row, the second one shorter than the rest of it."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 250, (rows, length + 1), dtype=np.int32)
    column = np.arange(length, dtype=np.int32)
    first, end = length // 2, length - 2
    segments = np.where(column < first, 1, np.where(column < end, 2, 0)).astype(np.int32)
    positions = np.where(column < first, column, np.where(column < end, column - first, 0))
    inside = (segments > 0) & (np.append(segments[1:], 0) == segments)
    grid = np.ones((rows, 1), np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": grid * positions.astype(np.int32),
        "segment_ids": grid * segments,
        "weights": (grid * inside).astype(np.float32),
    }


def after_a_step(model: Decoder, accumulate: int) -> tuple[Any, Any]:
    """The state before and after one training step on `batch(4, 10)`, and its metrics."""
    experiment = Experiment(
        model=model, data=Data(length=10, batch_size=4), steps=9, accumulate=accumulate
    )
    mesh = experiment.mesh.build()
    with placed(mesh, experiment.mesh.table):
        state = init_state(experiment, mesh)
        before = jax.device_get(merge(state["params"], state["frozen"]))
        step = make_step(experiment, mesh)
        state, metrics = step(state, jax.device_put(batch(4, 10)), jnp.int32(9))
    return (before, jax.device_get(merge(state["params"], state["frozen"]))), metrics


def test_the_bias_follows_the_load_of_the_whole_step() -> None:
    """Once per step, from the counts of all micro-batches, padding left out."""
    model = small()
    (before, once), _ = after_a_step(model, 1)
    (_, twice), _ = after_a_step(model, 2)
    data = batch(4, 10)
    ctx = Context(
        positions=jnp.asarray(data["positions"]), segment_ids=jnp.asarray(data["segment_ids"])
    )
    state = jax.jit(lambda p: model.hidden(p, data["inputs"], ctx)[2].state)(before)
    load = np.asarray(state["blocks"]["1"]["ffn"]["router"]["load"])
    assert load.shape == (2, 6) and (load.sum(1) == 4 * 8 * 2).all()
    sign = np.sign(load.mean(1, keepdims=True) - load)
    expected = 1e-3 * (sign - sign.mean(1, keepdims=True))
    for after in (once, twice):
        router = after["blocks"]["1"]["ffn"]["router"]
        close(router["bias"], expected)
        assert not router["load"].any()


def test_every_router_and_expert_path_learns_through_scan_and_remat() -> None:
    model = small(bias="none", balance=0.01, top1_balance=0.01).with_mtp()
    model = model.map_stacks(lambda stack: dataclasses.replace(stack, remat="full"))
    (before, after), metrics = after_a_step(model, 2)
    for (path, a), (_, b) in zip(flatten(before), flatten(after), strict=True):
        if np.ndim(a) == 0 or isinstance(a, dict):
            continue
        assert np.any(a != b), f"{path} did not move"
    assert metrics["mtp"] > 0 and metrics["load_balance"] > 0


def test_the_loss_of_the_step_counts_earlier_micro_batches() -> None:
    """Over the step, the last micro-batch's shares are those of the whole batch."""
    ones, totals = (
        after_a_step(small(balance=1.0, balance_over=over), 2)[1] for over in ("batch", "step")
    )
    assert ones["load_balance"] != totals["load_balance"]
    whole = after_a_step(small(balance=1.0, balance_over="step"), 1)[1]
    same = after_a_step(small(balance=1.0, balance_over="batch"), 1)[1]
    close(whole["load_balance"], same["load_balance"])


def test_mtp_predicts_within_a_document_only() -> None:
    data = {k: jnp.asarray(v) for k, v in batch(2, 10).items()}
    targets, weights = further_targets(data)
    tokens = np.concatenate((batch(2, 10)["inputs"], batch(2, 10)["targets"][:, -1:]), 1)
    expected = np.zeros((2, 10))
    expected[:, :3] = expected[:, 5:6] = 1  # documents of 5 and 3 tokens: 3 and 1 have two behind
    assert np.array_equal(weights, expected)
    row, column = np.nonzero(expected)
    assert np.array_equal(targets[row, column], tokens[row, column + 2])


def test_a_model_placed_over_more_experts_says_the_same(mesh: Any) -> None:
    """Unsharded, and with experts over 1 and 2 of 8 devices."""
    model = small()
    params = model.init(jax.random.key(0))
    tokens = batch(8, 10)["inputs"]
    expected = jax.jit(lambda p: model.apply(p, tokens)[0])(params)
    for sizes in ((8, 1, 1), (4, 2, 1)):
        placed_on = jax.make_mesh(
            sizes, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
        )
        with jax.set_mesh(placed_on), use_rules(DEFAULT_RULES):
            shardings = jax.tree.map(lambda s: s.sharding, model.abstract(placed_on))
            logits = jax.jit(lambda p: model.apply(p, tokens)[0])(jax.device_put(params, shardings))
        close(logits, expected)


def test_decoding_equals_the_full_forward() -> None:
    model = small()
    params = model.init(jax.random.key(0))
    tokens = jnp.asarray(batch(3, 10)["inputs"])
    full = jax.jit(lambda p: model.apply(p, tokens)[0])(params)
    step = jax.jit(lambda p, t, cache: model.apply(p, t, cache=cache)[:2])
    logits, cache = step(params, tokens[:, :6], model.init_cache(3, 10))
    parts = [logits]
    for t in range(6, 10):
        logits, cache = step(params, tokens[:, t : t + 1], cache)
        parts.append(logits)
    close(jnp.concatenate(parts, 1), full)
