"""Hugging Face folders of mixtures: logits against transformers both ways, Ling against its golden
vector, refusals."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from bestiary.__main__ import main
from bestiary.layers.base import flatten
from bestiary.layers.moe import MoE
from bestiary.zoo import hf, hf_gemma3n
from bestiary.zoo.decoder import Block, Decoder
from bestiary.zoo.hf_families import part
from bestiary.zoo.ling import ling_1t, ling_flash_2, ling_mini_2, ling_tiny
from bestiary.zoo.mixtures import mixtral_8x7b, olmoe_1b7b, olmoe_227m, olmoe_tiny, switch_tiny
from bestiary.zoo.pangu import pangu_tiny

TOKENS = np.random.default_rng(0).integers(0, 37, (2, 11))

SIZES = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OLMOE = SIZES | {
    "model_type": "olmoe",
    "num_hidden_layers": 2,
    "intermediate_size": 14,
    "num_experts": 6,
    "num_experts_per_tok": 3,
}
MIXTRAL = SIZES | {
    "model_type": "mixtral",
    "num_hidden_layers": 2,
    "intermediate_size": 28,
    "head_dim": 10,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
}
DEEPSEEK = SIZES | {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 9,
    "kv_lora_rank": 7,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "intermediate_size": 28,
    "moe_intermediate_size": 10,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "n_group": 3,
    "topk_group": 2,
    "n_shared_experts": 2,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 1.1,
    "beta_fast": 3.0,
    "beta_slow": 0.5,
}
LING = SIZES | {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "head_dim": 12,
    "intermediate_size": 28,
    "moe_intermediate_size": 10,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "n_group": 3,
    "topk_group": 2,
    "num_shared_experts": 2,
    "partial_rotary_factor": 0.5,
    "num_nextn_predict_layers": 1,
}
MINICPM = SIZES | {
    "model_type": "minicpm",
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "attention_type": "mla",
    "q_lora_rank": 9,
    "kv_lora_rank": 7,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "ffn_type": "block",
    "router_act": "relu",
    "norm_after_router": "rms",
    "num_experts": 7,
    "expert_size": 5,
    "tie_word_embeddings": False,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "olmoe": OLMOE,
    "olmoe_normalized": OLMOE
    | {"norm_topk_prob": True, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "mixtral": MIXTRAL,
    "deepseek": DEEPSEEK,
    "deepseek_yarn": DEEPSEEK
    | {
        "first_k_dense_replace": 0,
        "num_hidden_layers": 2,
        "q_lora_rank": None,
        "attention_bias": True,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "rope_interleave": False,
        "rope_theta": 300.0,
        "rope_scaling": YARN,
    },
}
ELSEWHERE = {
    "deepseek_mtp": DEEPSEEK | {"num_nextn_predict_layers": 1},
    "ling": LING,
    "minicpm": MINICPM,
    "minicpm_grouped": MINICPM | {"attention_type": "vanilla", "num_key_value_heads": 2},
}
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


@pytest.fixture(scope="session")
def transformers() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def same(a: Any, b: Any) -> None:
    a, b = dict(flatten(a)), dict(flatten(b))
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def refused(*words: str) -> Any:
    """One line of ValueError that holds all `words`, in this order."""
    return pytest.raises(ValueError, match="^.*" + ".*".join(map(re.escape, words)) + ".*$")


@jax.jit
def logits(model: Decoder, params: Any) -> jax.Array:
    return model.apply(params, TOKENS)[0]


def random_params(model: Decoder) -> Any:
    """About the size of trained parameters, different everywhere; no load, as between steps."""
    rng = np.random.default_rng(1)

    def draw(path: tuple, p: jax.ShapeDtypeStruct) -> jax.Array:
        scale = 0.0 if "load" in jax.tree_util.keystr(path) else 0.3
        return jnp.asarray(scale * rng.standard_normal(p.shape), p.dtype)

    return jax.tree_util.tree_map_with_path(draw, model.abstract())


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_theirs_both_ways(name: str, transformers: Any, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**CONFIGS[name])
    theirs = transformers.AutoModelForCausalLM.from_config(config, **EAGER)
    with torch.no_grad():
        for x in theirs.state_dict().values():
            x += 0.2 * torch.randn_like(x)
        expected = theirs.eval()(torch.tensor(TOKENS)).logits.numpy()
    theirs.save_pretrained(tmp_path / "in")
    model = hf.model_from_config(hf.read_config(tmp_path / "in"))
    assert model == hf.model_from_config(CONFIGS[name])
    close(logits(model, hf.read(tmp_path / "in", model)), expected)

    params = random_params(model)
    extra = {"max_position_embeddings": 64}
    hf.write(tmp_path / "out", model, params, shard_bytes=9000, extra=extra)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, **EAGER
    )
    assert not any(report.values()), report
    with torch.no_grad():
        close(logits(model, params), again(torch.tensor(TOKENS)).logits.numpy())
    assert hf.model_from_config(hf.read_config(tmp_path / "out")) == model
    same(hf.read(tmp_path / "out", model), params)


FURTHER = "model.layers.3."
COPIES = {
    f"{FURTHER}embed_tokens.weight": "model.embed_tokens.weight",
    f"{FURTHER}shared_head.head.weight": "lm_head.weight",
}


def test_deepseeks_further_layer_is_as_theirs(transformers: Any, tmp_path: Path) -> None:
    """The block by transformers, as a fourth layer; what is around it by hand."""
    import torch

    torch.manual_seed(0)
    four = transformers.AutoConfig.for_model(**DEEPSEEK | {"num_hidden_layers": 4})
    theirs = transformers.AutoModelForCausalLM.from_config(four, **EAGER).eval()
    with torch.no_grad():
        for x in theirs.state_dict().values():
            x += 0.2 * torch.randn_like(x)
    theirs.save_pretrained(tmp_path / "four")
    tensors = dict(load_file(tmp_path / "four" / "model.safetensors"))
    around: dict[str, Any] = {
        name: 0.5 + 0.2 * torch.randn(24) for name in ("enorm", "hnorm", "shared_head.norm")
    }
    around["eh_proj"] = 0.3 * torch.randn(24, 48)
    tensors |= {f"{FURTHER}{name}.weight": x.numpy() for name, x in around.items()}
    tensors |= {copy: tensors[name].copy() for copy, name in COPIES.items()}
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    config = DEEPSEEK | {"num_nextn_predict_layers": 1}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))

    def norm(x: Any, name: str) -> Any:
        return around[name] * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    tokens, following = torch.tensor(TOKENS), torch.tensor(np.roll(TOKENS, -1, 1))
    further, theirs.model.layers = theirs.model.layers[3], theirs.model.layers[:3]
    theirs.config.num_hidden_layers = 3
    with torch.no_grad():
        hidden = theirs.model(tokens).last_hidden_state
        embedded = theirs.model.embed_tokens(following)
        x = torch.cat((norm(embedded, "enorm"), norm(hidden, "hnorm")), -1) @ around["eh_proj"].T
        angles = theirs.model.rotary_emb(x, torch.arange(11)[None])
        mask = torch.full((11, 11), -torch.inf).triu(1)[None, None]
        x = further(x, attention_mask=mask, position_embeddings=angles)
        expected = theirs.lm_head(norm(x, "shared_head.norm")).numpy()

    model = hf.model_from_config(hf.read_config(tmp_path / "in"))
    params = hf.read(tmp_path / "in", model)

    @jax.jit
    def run(params: Any) -> jax.Array:
        x, _, _ = model.hidden(params, TOKENS)
        return model.logits(params, model.further(params, x, jnp.asarray(following))[0])

    close(run(params), expected)
    hf.write(tmp_path / "out", model, params)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    assert hf.model_from_config(hf.read_config(tmp_path / "out")) == model


def test_copies_in_deepseeks_further_layer_may_be_missing_but_not_differ(tmp_path: Path) -> None:
    model = edited(tmp_path / "in", DEEPSEEK | {"num_nextn_predict_layers": 1})
    same(hf.read(tmp_path / "in", model), random_params(model))
    for i, (copy, name) in enumerate(COPIES.items()):
        folder = tmp_path / str(i)
        edited(folder, DEEPSEEK | {"num_nextn_predict_layers": 1}, **{copy: np.zeros((37, 24))})
        with refused(str(folder), f"{copy}: differs from {name}; need equal tensors"):
            hf.read(folder, model)


def test_a_further_layer_that_is_counted_but_not_there(tmp_path: Path) -> None:
    """As transformers saves it."""
    model = edited(tmp_path / "in", DEEPSEEK)
    config = json.dumps(DEEPSEEK | {"num_nextn_predict_layers": 1})
    (tmp_path / "in" / "config.json").write_text(config)
    assert hf.model_from_config(hf.read_config(tmp_path / "in")) == model
    (tmp_path / "in" / "model.safetensors").unlink()  # the configuration alone
    assert hf.model_from_config(hf.read_config(tmp_path / "in")).mtp is not None


def ling_folder(folder: Path, golden: SimpleNamespace) -> dict[str, np.ndarray]:
    """The golden vector's weights under the released names, one tensor per expert."""
    prefix, tensors = golden.hp["weight_prefix"], {}
    for name, array in golden.arrays.items():
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix)
        stem, experts, matrix = name.partition(".experts.")
        if experts:
            each = {f"{stem}.experts.{e}.{matrix}.weight": w for e, w in enumerate(array)}
            tensors |= {name: np.ascontiguousarray(w) for name, w in each.items()}
        else:
            tensors[name] = array
    save_file(tensors, folder / "model.safetensors")
    config = golden.hp | {k: LING[k] for k in ("model_type", "architectures")}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.golden("ling_model")
def test_ling_has_their_logits_and_goes_back(golden: SimpleNamespace, tmp_path: Path) -> None:
    tensors = ling_folder(tmp_path, golden)
    model = hf.model_from_config(hf.read_config(tmp_path))
    params = hf.read(tmp_path, model)
    ids = jnp.asarray(golden.arrays["input_ids"], jnp.int32)

    @jax.jit
    def run(params: Any) -> tuple[jax.Array, jax.Array]:
        x, _, _ = model.hidden(params, ids)
        further, _ = model.further(params, x, jnp.roll(ids, -1, 1).at[:, -1].set(0))
        return model.logits(params, x), model.logits(params, further)

    for ours, name in zip(run(params), ("logits", "mtp_logits"), strict=True):
        close(ours, golden.arrays[name])
    hf.write(tmp_path / "out", model, params)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    assert hf.model_from_config(hf.read_config(tmp_path / "out")) == model
    same(hf.read(tmp_path / "out", model), params)


def test_where_ling_keeps_its_parameters() -> None:
    """Dense layers, then mixtures, then the MTP layer; queries, keys and values in one tensor."""
    model = hf.model_from_config(LING)
    params = random_params(model)
    tensors = hf.tensors_from_params(model, params)
    same(hf.params_from_tensors(model, tensors.__getitem__), params)
    (dense, mixtures), mtp = params["blocks"].values(), params["mtp"]["block"]
    for layer, block in enumerate((dense, mixtures, mixtures, mtp)):
        at = max(layer - 1, 0)
        mine = block if layer == 3 else jax.tree.map(lambda w, at=at: w[at], block)
        name = f"model.layers.{layer}."
        qkv = tensors[f"{name}attention.query_key_value.weight"].reshape(4 + 2 + 2, 12, 24)
        for i, part_of in ((1, "query"), (5, "key"), (7, "value")):
            np.testing.assert_array_equal(qkv[i], mine["mixer"][part_of][:, 1].T)
        if layer:
            up = tensors[f"{name}mlp.experts.4.up_proj.weight"]
            np.testing.assert_array_equal(up, mine["ffn"]["experts"]["up"][4].T)
            bias = tensors[f"{name}mlp.gate.expert_bias"]
            np.testing.assert_array_equal(bias, mine["ffn"]["router"]["bias"])
    assert not any("load" in name for name in tensors)


@pytest.mark.parametrize("kind", ["block", "block_linear"])
def test_blockffn_has_the_released_layout_and_factors(kind: str, tmp_path: Path) -> None:
    """Experts apart or side by side; residual branches times 1.4 / sqrt(2), the head's input times
    8 / 24: here both are part of the weights."""
    model = hf.model_from_config(MINICPM | {"ffn_type": kind})
    rng = np.random.default_rng(0)
    tensors = {
        name: 0.4 * rng.standard_normal(x.shape).astype(np.float32)
        for name, x in hf.tensors_from_params(model, random_params(model)).items()
    }
    mlp = "model.layers.1.mlp."
    up = 0.4 * rng.standard_normal((7, 5, 24)).astype(np.float32)
    down = 0.4 * rng.standard_normal((7, 24, 5)).astype(np.float32)
    stored = {"up_proj": up, "down_proj": down}
    if kind == "block_linear":
        stored = {"up_proj": up.reshape(35, 24), "down_proj": np.hstack(list(down))}
    else:
        for name in ("up_proj", "down_proj"):
            tensors[f"model.layers.0.mlp.{name}"] = stored[name]
    tensors |= {mlp + name: np.ascontiguousarray(x) for name, x in stored.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(MINICPM | {"ffn_type": kind}))
    params = hf.read(tmp_path, model)

    x = rng.standard_normal((2, 5, 24))
    scores = np.maximum(x @ tensors[f"{mlp}router_proj.weight"].T, 0)
    scores /= np.sqrt((scores**2).mean(-1, keepdims=True) + 1e-6)
    scores *= tensors[f"{mlp}router_norm.weight"]
    y = 0
    for expert in range(7):
        h = x @ up[expert].T
        y += scores[..., expert, None] * (h / (1 + np.exp(-h)) @ down[expert].T)
    block = part(model, "blocks.block", Block)
    mine = jax.tree.map(lambda w: w[1], params["blocks"]["ffn"])
    close(block.ffn.apply(mine, jnp.asarray(x, jnp.float32))[0], y * 1.4 / 2**0.5)
    out = tensors["model.layers.1.self_attn.o_proj.weight"] * 1.4 / 2**0.5
    close(params["blocks"]["mixer"]["out"][1].reshape(24, 24).T, out)
    close(params["norm"]["weight"], tensors["model.norm.weight"] * 8 / 24)
    assert model.embedding.scale == 12

    hf.write(tmp_path / "out", model, params)
    assert hf.model_from_config(hf.read_config(tmp_path / "out")) == model
    same(hf.read(tmp_path / "out", model), params)


def test_a_state_keeps_its_type_and_forgets_its_load(tmp_path: Path) -> None:
    model = hf.model_from_config(LING | {"dtype": "bfloat16"})
    params = random_params(model)
    loaded = jax.tree_util.tree_map_with_path(
        lambda path, p: p + 3 if "load" in jax.tree_util.keystr(path) else p, params
    )
    hf.write(tmp_path / "out", model, loaded)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["model.layers.1.mlp.gate.expert_bias"].dtype == np.float32
    assert written["model.layers.1.mlp.gate.weight"].dtype == jnp.bfloat16
    same(hf.read(tmp_path / "out", model), params)


@pytest.mark.parametrize(
    "model",
    [
        olmoe_1b7b(),
        olmoe_227m(),
        mixtral_8x7b(),
        ling_tiny(),
        ling_mini_2(),
        ling_flash_2(),
        ling_1t().with_mtp(),
    ],
)
def test_published_models_survive_their_config(model: Decoder) -> None:
    config = json.loads(json.dumps(hf.config_from_model(model)))
    again = hf.model_from_config(config)
    assert hf.config_from_model(again) == config
    assert again.count() == model.count()


@pytest.mark.parametrize("name", [*CONFIGS, *ELSEWHERE])
def test_configs_are_told_in_full(name: str) -> None:
    model = hf.model_from_config((CONFIGS | ELSEWHERE)[name])
    assert hf.model_from_config(hf.config_from_model(model)) == model


def test_deepseeks_released_yarn() -> None:
    """mscale = mscale_all_dim = 1: cosines stay, queries and keys grow."""
    scaling = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    scaling |= {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}
    model = hf.model_from_config(DEEPSEEK | {"rope_scaling": scaling})
    mixer = model.stacks[0].block.mixer  # type: ignore[attr-defined]
    assert mixer.rope.scaling.attention_factor == 1
    np.testing.assert_allclose(mixer.scale, 10**-0.5 * (1 + 0.1 * np.log(40)) ** 2, rtol=1e-12)
    assert hf.model_from_config(hf.config_from_model(model)) == model


@pytest.mark.parametrize(
    "kind, total", [("olmoe", 6.92e9), ("mixtral", 46.7e9), ("deepseek_v3", 671e9)]
)
def test_absent_entries_mean_what_transformers_assumes(
    kind: str, total: float, transformers: Any
) -> None:
    """Which are the published sizes, but for OLMoE's width of an expert."""
    full = transformers.AutoConfig.for_model(kind).to_dict() | {"num_nextn_predict_layers": 0}
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    least = {name: full[name] for name in (*sizes, "num_hidden_layers", "model_type")}
    least |= {name: full[name] for name in ("moe_intermediate_size",) if name in full}
    assert hf.model_from_config(least) == hf.model_from_config(full)
    published = full | {"intermediate_size": 1024} if kind == "olmoe" else full
    count = hf.model_from_config(published).count().total
    np.testing.assert_allclose(count, total, rtol=1e-3)


def without_bias(model: Decoder) -> Decoder:
    block = part(model.stacks[-1], "block", Block)
    ffn = part(block, "ffn", MoE)
    ffn = replace(ffn, router=replace(ffn.router, bias="none"))
    stacks = (*model.stacks[:-1], replace(model.stacks[-1], block=replace(block, ffn=ffn)))
    return replace(model, blocks=replace(model.blocks, layers=stacks))


@pytest.mark.parametrize(
    "model, culprit",
    [
        (olmoe_tiny(), "olmoe (blocks.block.mixer.query_norm: None, not RMSNorm)"),
        (switch_tiny(), "mixtral (expert: MLP, not GLU)"),
        (pangu_tiny(), "deepseek_v3 (blocks.layers.0.block.placement: 'sandwich', not 'pre')"),
        (without_bias(ling_tiny()), "bailing_moe (model.layers.{}.mlp.gate.expert_bias: no param"),
    ],
)
def test_what_no_family_expresses_is_refused(model: Decoder, culprit: str) -> None:
    with refused("no Hugging Face family", culprit):
        hf.config_from_model(model)


@pytest.mark.parametrize(
    "base, change, culprit",
    [
        (OLMOE, {"clip_qkv": 8.0}, "clip_qkv: 8.0; need None"),
        (OLMOE, {"num_experts_per_tok": 7}, "num_experts_per_tok: 7; need at most num_experts 6"),
        (OLMOE, {"norm_topk_prob": 1}, "norm_topk_prob: 1; need one of True, False"),
        (OLMOE, {"head_dim": 8}, "head_dim: 8; need 6"),
        (OLMOE, {"hidden_size": 26}, "hidden_size: 26; need a multiple of num_attention_heads 4"),
        (MIXTRAL, {"num_experts_per_tok": 1}, "num_experts_per_tok: 1; need 2 or more"),
        (MIXTRAL, {"sliding_window": 0}, "sliding_window: 0"),
        (DEEPSEEK, {"scoring_func": "softmax"}, "scoring_func: 'softmax'; need 'sigmoid'"),
        (DEEPSEEK, {"n_group": 4}, "n_group: 4; need a divisor of the 6 experts"),
        (DEEPSEEK, {"topk_group": 1}, "topk_group: 1; need at most n_group 3, with 3 experts"),
        (DEEPSEEK, {"first_k_dense_replace": 3}, "first_k_dense_replace: 3; need less than"),
        (DEEPSEEK, {"first_k_dense_replace": -1}, "first_k_dense_replace: -1; need 0 or more"),
        (DEEPSEEK, {"num_experts_per_tok": 1}, "num_experts_per_tok: 1; need 2 or more"),
        (DEEPSEEK, {"qk_rope_head_dim": 3}, "qk_rope_head_dim: 3; need an even number"),
        (DEEPSEEK, {"q_lora_rank": 0}, "q_lora_rank: 0"),
        (DEEPSEEK, {"num_key_value_heads": 2}, "num_key_value_heads: 2; need 4"),
        (DEEPSEEK, {"rope_scaling": YARN | {"mscale": "1"}}, "rope_scaling: mscale: '1'"),
        (
            DEEPSEEK,
            {"num_nextn_predict_layers": 2},
            "num_nextn_predict_layers: 2; need one of 0, 1",
        ),
        (DEEPSEEK, {"n_shared_experts": 0}, "n_shared_experts: 0; need a positive integer"),
        (MINICPM, {"ffn_type": "vanilla"}, "ffn_type: 'vanilla'; need one of 'block_linear', 'blo"),
        (MINICPM, {"ffn_type": None}, "ffn_type: None"),
        (MINICPM, {"norm_after_router": "sum"}, "norm_after_router: 'sum'; need one of 'rms'"),
        (MINICPM, {"v_head_dim": 7}, "v_head_dim: 7; need 6"),
        (MINICPM, {"hidden_size": 26}, "hidden_size: 26; need a multiple of num_attention_heads"),
        (MINICPM, {"qk_rope_head_dim": 5}, "qk_rope_head_dim: 5; need an even number"),
        (LING, {"architectures": ["BailingMoeForCausalLM"]}, "architectures: ['BailingMoeForC"),
        (LING, {"score_function": "softmax"}, "score_function: 'softmax'; need 'sigmoid'"),
        (LING, {"use_qkv_bias": True}, "use_qkv_bias: True; need False"),
        (LING, {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers: 2; need one of 0, 1"),
        (LING, {"partial_rotary_factor": 1.5}, "partial_rotary_factor: 1.5; need at most 1"),
        (LING, {"partial_rotary_factor": 0.3}, "head_dim: 12; need an even number to rotate"),
        (LING, {"moe_shared_expert_intermediate_size": 9}, "moe_shared_expert_intermediate_size"),
    ],
)
def test_unsupported_configs_are_refused(base: dict, change: dict, culprit: str) -> None:
    with refused("config.json", culprit):
        hf.model_from_config(base | change)


JUNK = st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=3)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_config_is_a_model_or_one_line(data: Any) -> None:
    base = data.draw(st.sampled_from([OLMOE, MIXTRAL, DEEPSEEK, LING, MINICPM]))
    names = st.sampled_from(sorted({*base, "norm_topk_prob", "rope_theta", "rope_scaling"}))
    change = data.draw(st.dictionaries(names, JUNK, max_size=4))
    try:
        model = hf.model_from_config(base | change)
    except ValueError as error:
        assert "\n" not in str(error) and "config.json: " in str(error)
    else:
        assert hf.model_from_config(hf.config_from_model(model)) == model


def edited(folder: Path, base: dict, **changes: Any) -> Decoder:
    """A folder of random weights with some tensors changed, or taken away (None)."""
    model = hf.model_from_config(base)
    tensors: dict = hf.tensors_from_params(model, random_params(model)) | changes
    folder.mkdir()
    kept = {name: np.ascontiguousarray(x) for name, x in tensors.items() if x is not None}
    save_file(kept, folder / "model.safetensors")
    return model


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
FUSED = "model.layers.0.self_attn.kv_b_proj.weight"
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize(
    "changes, culprits",
    [
        ({EXPERT: None}, [EXPERT, "missing, need shape (10, 24); 1 of 79"]),
        ({EXPERT: np.zeros((24, 10))}, [EXPERT, "shape (24, 10); need (10, 24)"]),
        ({FUSED: np.zeros((43, 7))}, [FUSED, "shape (43, 7); need (44, 7)"]),
        ({BIAS: np.zeros(5)}, [BIAS, "shape (5,); need (6,)"]),
        ({"model.layers.4.eh_proj.weight": np.zeros(2)}, ["model.layers.4.eh", "unexpected"]),
        ({"model.layers.1.mlp.gate.bias": np.zeros(6)}, ["mlp.gate.bias", "unexpected"]),
    ],
)
def test_wrong_tensors_are_named(changes: dict, culprits: list, tmp_path: Path) -> None:
    model = edited(tmp_path / "in", DEEPSEEK, **changes)
    with refused(str(tmp_path), *culprits):
        hf.read(tmp_path / "in", model)


def test_deepseeks_further_layer_is_read_past(tmp_path: Path) -> None:
    model = edited(tmp_path / "in", DEEPSEEK, **{"model.layers.3.eh_proj.weight": np.zeros(2)})
    same(hf.read(tmp_path / "in", model), random_params(model))


GEMMA3N = {
    "model_type": "gemma3n_text",
    "vocab_size": 37,
    "vocab_size_per_layer_input": 37,
    "hidden_size": 24,
    "hidden_size_per_layer_input": 5,
    "num_hidden_layers": 5,
    "intermediate_size": [40, 28, 40, 28, 28],
    "activation_sparsity_pattern": [0.9, 0.5, 0.0, 0.7, 0.0],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_kv_shared_layers": 0,
    "altup_num_inputs": 2,
    "laurel_rank": 3,
}


def test_gemma3n_feed_forwards_both_ways(transformers: Any, tmp_path: Path) -> None:
    """Sparse and dense ones of unlike widths; what else the folder holds is copied."""
    import torch

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**GEMMA3N)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(tmp_path / "in")
    layers, params = hf_gemma3n.read_feed_forwards(tmp_path / "in")
    assert [layer.sparsity for layer in layers] == GEMMA3N["activation_sparsity_pattern"]
    x = np.random.default_rng(0).standard_normal((2, 5, 24)).astype(np.float32)

    def agree(theirs: Any, params: Any) -> None:
        for layer, mine, block in zip(layers, params, theirs.model.layers, strict=True):
            with torch.no_grad():
                close(layer.apply(mine, jnp.asarray(x))[0], block.mlp(torch.tensor(x)).numpy())

    agree(theirs, params)
    changed = jax.tree.map(lambda w: 1.5 * w + 0.01, params)
    hf_gemma3n.write_feed_forwards(tmp_path / "out", tmp_path / "in", changed, shard_bytes=9000)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()), report
    agree(again, changed)
    before, after = theirs.state_dict(), again.state_dict()
    for name in before:
        assert torch.equal(before[name], after[name]) == (".mlp." not in name), name


@pytest.mark.parametrize(
    "change, culprit",
    [
        ({"model_type": "gemma3"}, "model_type: 'gemma3'; need one of 'gemma3n_text', 'gemma3n'"),
        ({"model_type": "gemma3n"}, "text_config: None; need an object"),
        ({"intermediate_size": [40]}, "intermediate_size: [40]; need a positive integer, or 5"),
        ({"intermediate_size": -1}, "intermediate_size"),
        ({"activation_sparsity_pattern": [1.0] * 5}, "need 5 numbers from 0 to less than 1"),
        ({"activation_sparsity_pattern": [True] * 5}, "activation_sparsity_pattern: [True"),
        ({"hidden_activation": "silu"}, "hidden_activation: 'silu'"),
    ],
)
def test_unsupported_gemma3n_configs_are_refused(change: dict, culprit: str) -> None:
    with refused("config.json", culprit):
        hf_gemma3n.layers_from_config(GEMMA3N | change)


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma3n"])
def test_feed_forwards_alone_are_no_run(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA3N | {"model_type": kind}))
    assert main(["import", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert f"model_type: {kind!r}; a run needs the whole model" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_gemma3n_params_of_another_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA3N))
    layers = hf_gemma3n.layers_from_config(GEMMA3N)
    params = [
        {name: np.zeros(p.shape, np.float32) for name, p in layer.declare().items()}
        for layer in layers
    ]
    stored = {
        f"model.layers.{i}.mlp.{name}_proj.weight": np.ascontiguousarray(x.T)
        for i, mine in enumerate(params)
        for name, x in mine.items()
    }
    save_file(stored, tmp_path / "model.safetensors")
    with refused("params: of 4 layers; need 5"):
        hf_gemma3n.write_feed_forwards(tmp_path / "out", tmp_path, params[:4])
    with refused("params: layer 0: shapes {", "(24, 28)", "need {", "(24, 40)"):
        hf_gemma3n.write_feed_forwards(tmp_path / "out", tmp_path, params[::-1])
    with refused("model.layers.4.mlp.up_proj.weight: missing, need shape (28, 24)"):
        del stored["model.layers.4.mlp.up_proj.weight"]
        save_file(stored, tmp_path / "model.safetensors")
        hf_gemma3n.read_feed_forwards(tmp_path)
    assert not (tmp_path / "out").exists()
