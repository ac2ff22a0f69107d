"""Hugging Face folders: logits against transformers both ways, exact round trips, refusals."""

import json
import re
import tracemalloc
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from bestiary.layers.attention import Attention
from bestiary.layers.base import Precision, flatten
from bestiary.layers.sharding import DEFAULT_RULES, use_rules
from bestiary.zoo import hf
from bestiary.zoo.decoder import Block
from bestiary.zoo.gemma2 import gemma2_2b, gemma2_9b, gemma2_tiny
from bestiary.zoo.hf_families import part
from bestiary.zoo.llama import (
    llama2_7b,
    llama3_2_1b,
    llama3_2_3b,
    llama3_8b,
    llama_1b_24x2048,
    llama_tiny,
)
from bestiary.zoo.polycom import polycom_tiny
from bestiary.zoo.spark import spark_gemma2_2b, spark_tiny

TOKENS = np.random.default_rng(0).integers(0, 37, (2, 19))

LLAMA = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GEMMA2 = LLAMA | {
    "model_type": "gemma2",
    "num_hidden_layers": 4,
    "head_dim": 10,
    "sliding_window": 5,
    "query_pre_attn_scalar": 13,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
TUNED_YARN = YARN | {"attention_factor": 1.2, "beta_fast": 3.0, "beta_slow": 0.5}
CONFIGS = {
    "grouped_linear": LLAMA
    | {"head_dim": 10, "rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "tied_llama3": LLAMA
    | {"tie_word_embeddings": True, "rope_parameters": LLAMA3 | {"rope_theta": 100.0}},
    "gelu_yarn": LLAMA
    | {
        "num_key_value_heads": 4,
        "hidden_act": "gelu",
        "rope_theta": 100,
        "rope_scaling": TUNED_YARN,
    },
    "gemma2": GEMMA2,
}


@pytest.fixture(scope="session")
def transformers():
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="session", params=list(CONFIGS))
def theirs(request, transformers, tmp_path_factory):
    """A random torch model saved as one file and as many, with its logits on TOKENS."""
    import torch

    config = dict(CONFIGS[request.param])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        logits = model(torch.tensor(TOKENS)).logits.numpy()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "many", max_shard_size="9KB")
    return folder, logits


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def same(a, b):
    a, b = dict(flatten(a)), dict(flatten(b))
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@contextmanager
def refused(*words):
    """One line of ValueError that holds all `words`."""
    with pytest.raises(ValueError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@jax.jit
def logits(model, params):
    return model.apply(params, TOKENS)[0]


def random_params(model, seed=0):
    """About the size of trained parameters, different everywhere."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), p.dtype), model.abstract()
    )


def test_import_has_their_logits(theirs):
    folder, expected = theirs
    model = hf.model_from_config(hf.read_config(folder / "one"))
    params = hf.read(folder / "one", model)
    close(logits(model, params), expected)
    assert len(list((folder / "many").glob("*.safetensors"))) > 3
    same(hf.read(folder / "many", model), params)


@pytest.mark.parametrize("name", CONFIGS)
def test_export_has_our_logits_in_transformers(name, transformers, tmp_path):
    import torch

    model = hf.model_from_config(CONFIGS[name])
    params = random_params(model)
    extra = {"max_position_embeddings": 64, "eos_token_id": 3}
    hf.write(tmp_path / "out", model, params, shard_bytes=9000, extra=extra)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert theirs.config.bos_token_id is None and theirs.config.pad_token_id is None
    assert theirs.config.max_position_embeddings == 64 and theirs.config.eos_token_id == 3
    with torch.no_grad():
        close(logits(model, params), theirs(torch.tensor(TOKENS)).logits.numpy())


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_absent_entries_mean_what_transformers_assumes(kind, transformers):
    sizes = "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"
    least = {name: LLAMA[name] for name in sizes} | {"model_type": kind, "num_hidden_layers": 4}
    full = transformers.AutoConfig.for_model(**least).to_dict()
    assert hf.model_from_config(least) == hf.model_from_config(full)


def test_their_bfloat16_is_read_bit_by_bit(transformers, tmp_path):
    import torch

    config = transformers.AutoConfig.for_model(**LLAMA)
    theirs = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    model = hf.model_from_config(hf.read_config(tmp_path))
    assert model.precision == Precision(params="bfloat16", compute="bfloat16")
    ours = hf.tensors_from_params(model, hf.read(tmp_path, model))
    for name, tensor in theirs.state_dict().items():
        bits = tensor.view(torch.int16).numpy()
        np.testing.assert_array_equal(ours[name].view(np.int16), bits, err_msg=name)
    wide = replace(model, precision=Precision())
    for name, tensor in hf.tensors_from_params(wide, hf.read(tmp_path, wide)).items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, ours[name].astype(np.float32), err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard_bytes", [5e9, 4000])
@pytest.mark.parametrize("name", ["tied_llama3", "gemma2"])
def test_reading_what_was_written_is_exact(name, shard_bytes, dtype, tmp_path):
    model = hf.model_from_config(CONFIGS[name] | {"dtype": dtype})
    params = random_params(model)
    hf.write(tmp_path / "out", model, params, shard_bytes=shard_bytes)
    assert (tmp_path / "out" / "model.safetensors").exists() == (shard_bytes > 4000)
    assert hf.model_from_config(hf.read_config(tmp_path / "out")) == model
    same(hf.read(tmp_path / "out", model), params)
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0  # the format aligns data
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= shard_bytes


def test_tensors_and_params_are_inverse():
    model = hf.model_from_config(GEMMA2)
    params = random_params(model)
    tensors = hf.tensors_from_params(model, params)
    same(hf.params_from_tensors(model, tensors.__getitem__), params)
    # layers 2i and 2i + 1 alternate between the two stacks of the pattern
    for layer, (position, i) in enumerate([("0", 0), ("1", 0), ("0", 1), ("1", 1)]):
        down = params["blocks"][position]["ffn"]["down"][i]
        np.testing.assert_array_equal(tensors[f"model.layers.{layer}.mlp.down_proj.weight"], down.T)


def test_parameters_are_read_sharded(mesh, tmp_path):
    config = LLAMA | {"vocab_size": 38, "hidden_size": 24}
    model = hf.model_from_config(config)
    params = random_params(model)
    hf.write(tmp_path / "out", model, params)
    with use_rules(DEFAULT_RULES):
        read, declared = hf.read(tmp_path / "out", model, mesh), model.abstract(mesh)
    same(read, params)
    jax.tree.map(
        lambda p, d: None if p.sharding == d.sharding else pytest.fail(str(d)), read, declared
    )
    assert not read["blocks"]["ffn"]["gate"].is_fully_replicated


def test_writing_holds_one_parameter_at_a_time(tmp_path):
    model = hf.model_from_config(LLAMA | {"hidden_size": 64, "num_hidden_layers": 16})
    params = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), model.abstract())
    sizes = [p.nbytes for p in jax.tree.leaves(params)]
    tracemalloc.start()
    hf.write(tmp_path / "out", model, params)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.2 * max(sizes) + 1e5 < 0.5 * sum(sizes)


@pytest.mark.parametrize(
    "model",
    [
        llama_tiny,
        llama_1b_24x2048,
        llama2_7b,
        llama3_8b,
        llama3_2_1b,
        llama3_2_3b,
        gemma2_tiny,
        gemma2_2b,
        gemma2_9b,
    ],
)
def test_published_models_survive_their_config(model):
    model = model()
    config = json.loads(json.dumps(hf.config_from_model(model)))
    assert hf.config_from_model(hf.model_from_config(config)) == config
    again = hf.model_from_config(config)
    assert again.count() == model.count()
    assert [t.name for t in hf.tensors_of(again)] == [t.name for t in hf.tensors_of(model)]


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_told_in_full(name):
    """No entry of ours is lost; theirs says the same in the form of transformers 5."""
    model = hf.model_from_config(CONFIGS[name])
    assert hf.model_from_config(hf.config_from_model(model)) == model
    scaling = CONFIGS[name].get("rope_scaling") or {}
    scaling5 = scaling | {"rope_theta": CONFIGS[name].get("rope_theta", 1e4)}
    if scaling:
        moved = CONFIGS[name] | {"rope_scaling": None, "rope_parameters": scaling5, "rope_theta": 7}
        assert hf.model_from_config(moved) == model


def test_how_a_model_is_trained_is_not_told():
    model = llama_tiny()
    block = part(model, "blocks.block", Block)
    block = replace(block, mixer=replace(part(block, "mixer", Attention), out_gain=0.0))
    trained = replace(
        model,
        blocks=replace(model.blocks, block=block, remat="full", unroll=2),
        precision=Precision(compute="bfloat16"),
    )
    assert hf.config_from_model(trained) == hf.config_from_model(model)


@pytest.mark.parametrize(
    "model, culprit",
    [
        (spark_tiny(), "ffn: SparkFFN, not GLU"),
        (spark_gemma2_2b(), "mixer: SparkAttention, not Attention"),
        (polycom_tiny(), "ffn: MLP, not GLU"),
        (replace(llama_tiny(), softcap=7.0), "softcap: 7.0, not None"),
        (
            replace(gemma2_tiny(), embedding=replace(gemma2_tiny().embedding, scale=3.0)),
            "embedding.scale: 3.0, not 11.3",
        ),
    ],
)
def test_what_no_family_expresses_is_refused(model, culprit, tmp_path):
    for attempt in (
        lambda: hf.config_from_model(model),
        lambda: hf.params_from_tensors(model, {}.__getitem__),
        lambda: hf.write(tmp_path / "out", model, {}),
    ):
        with refused("no Hugging Face family", culprit):
            attempt()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "base, change, culprit",
    [
        (LLAMA, {"model_type": "mistral"}, "model_type: 'mistral'; need one of 'llama', 'gemma2'"),
        (LLAMA, {"model_type": None}, "model_type: None"),
        (LLAMA, {"model_type": ["llama"]}, "model_type: ['llama']"),
        (LLAMA, {"hidden_size": None}, "hidden_size: None; need a positive integer"),
        (LLAMA, {"hidden_size": "24"}, "hidden_size: '24'"),
        (LLAMA, {"hidden_size": 26}, "hidden_size: 26; need a multiple of num_attention_heads 4"),
        (LLAMA, {"vocab_size": 0}, "vocab_size: 0"),
        (LLAMA, {"vocab_size": 37.0}, "vocab_size: 37.0"),
        (LLAMA, {"intermediate_size": -1}, "intermediate_size: -1"),
        (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers: True"),
        (LLAMA, {"num_attention_heads": []}, "num_attention_heads: []"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads: 3; need a divisor"),
        (LLAMA, {"head_dim": 7}, "head_dim: 7; need an even number"),
        (LLAMA, {"attention_bias": True}, "attention_bias: True; need False"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias: True; need False"),
        (LLAMA, {"hidden_act": "mish"}, "hidden_act: 'mish'; need one of 'silu'"),
        (LLAMA, {"rms_norm_eps": 0}, "rms_norm_eps: 0; need a positive number"),
        (LLAMA, {"rms_norm_eps": float("nan")}, "rms_norm_eps: nan"),
        (LLAMA, {"tie_word_embeddings": "yes"}, "tie_word_embeddings: 'yes'"),
        (LLAMA, {"torch_dtype": "int8"}, "torch_dtype: 'int8'; need one of 'float32'"),
        (LLAMA, {"dtype": "float64"}, "dtype: 'float64'"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5; need 1.0"),
        (LLAMA, {"original_max_position_embeddings": 9}, "original_max_position_embeddings: 9"),
        (LLAMA, {"rope_theta": -1}, "rope_theta: -1"),
        (LLAMA, {"rope_scaling": 2.0}, "rope_scaling: 2.0; need one flat object"),
        (LLAMA, {"rope_parameters": {"full_attention": {}}}, "rope_parameters"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type: 'dynamic'"),
        (LLAMA, {"rope_parameters": {"rope_type": "longrope"}}, "rope_type: 'longrope'; need one"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "rope_scaling: factor: None"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor: '2'"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 9}}, "beta_fast: 9"),
        (LLAMA, {"rope_scaling": YARN | {"truncate": False}}, "truncate: False; need True"),
        (LLAMA, {"rope_scaling": YARN | {"mscale": 0.7}}, "mscale: 0.7"),
        (LLAMA, {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor: 4.0"),
        (
            LLAMA | {"max_position_embeddings": None},
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "original_max_position_embeddings: None",
        ),
        (GEMMA2, {"num_hidden_layers": 3}, "num_hidden_layers: 3; need an even number"),
        (GEMMA2, {"layer_types": ["full_attention"] * 4}, "layer_types: ['full_attention'"),
        (GEMMA2, {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        (GEMMA2, {"layer_types": 4}, "layer_types: 4"),
        (GEMMA2, {"sliding_window": 0}, "sliding_window: 0"),
        (GEMMA2, {"tie_word_embeddings": False}, "tie_word_embeddings: False; need True"),
        (GEMMA2, {"attn_logit_softcapping": -3.0}, "attn_logit_softcapping: -3.0"),
        (GEMMA2, {"final_logit_softcapping": "30"}, "final_logit_softcapping: '30'"),
        (GEMMA2, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: 0"),
        (GEMMA2, {"hidden_activation": "swiglu"}, "hidden_activation: 'swiglu'"),
        (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
    ],
    ids=lambda value: re.sub(r"\W+", "_", str(value))[:50] if isinstance(value, str) else "",
)
def test_unsupported_configs_are_refused(base, change, culprit):
    with refused("config.json", culprit):
        hf.model_from_config(base | change)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
ROPE_JUNK = st.dictionaries(st.sampled_from([*LLAMA3, *YARN, "type", "rope_theta"]), JUNK)


@settings(max_examples=150, deadline=None)
@given(
    base=st.sampled_from([LLAMA, GEMMA2]),
    change=st.dictionaries(st.sampled_from(sorted({*GEMMA2, "dtype", "rope_theta"})), JUNK),
    scaling=st.none() | ROPE_JUNK,
)
def test_any_config_is_a_model_or_one_line(base, change, scaling):
    try:
        model = hf.model_from_config(base | change | {"rope_scaling": scaling})
    except ValueError as error:
        assert "\n" not in str(error) and "config.json: " in str(error)
    else:
        assert hf.model_from_config(hf.config_from_model(model)) == model


def test_entries_that_change_nothing():
    plain = hf.model_from_config(LLAMA)
    rope5 = {"rope_type": "default", "rope_theta": 10000.0}
    assert hf.model_from_config(LLAMA | {"rope_parameters": rope5, "head_dim": 6}) == plain
    assert hf.model_from_config(LLAMA | {"rope_scaling": None, "mlp_bias": None}) == plain
    assert hf.model_from_config(LLAMA | {"hidden_act": "swish", "bos_token_id": 1}) == plain
    capped = hf.model_from_config(GEMMA2 | {"final_logit_softcapping": None, "hidden_act": "gelu"})
    assert capped == replace(hf.model_from_config(GEMMA2), softcap=None)


MODEL = hf.model_from_config(LLAMA | {"tie_word_embeddings": True})
PARAMS = random_params(MODEL)
QUERY = "model.layers.1.self_attn.q_proj.weight"
KEY = "model.layers.1.self_attn.k_proj.weight"
EMBED = "model.embed_tokens.weight"


def tensors(change):
    """Changes the tensors of every file."""

    def edit(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            held = load_file(file)
            if QUERY in held:
                change(held)
                save_file(held, file)

    return edit


def put(name, array):
    return tensors(lambda held: held.__setitem__(name, array))


def text(file, content):
    return lambda folder: (folder / file).write_text(content)


def data(file, change):
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def index(change):
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def shard(folder: Path, name: str = QUERY) -> Path:
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder / places[name]


ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "shard_bytes, edit, culprits",
    [
        (5e9, tensors(lambda held: held.pop(QUERY)), [QUERY, "missing, need shape (24, 24); 1 of"]),
        (5e9, tensors(dict.clear), ["missing", "29 of 29 tensors"]),
        (5e9, put(QUERY, np.zeros((24, 20), np.float32)), [ONE, QUERY, "(24, 20); need (24, 24)"]),
        (5e9, put(QUERY, np.zeros(576, np.float32)), [ONE, QUERY, "(576,); need (24, 24)"]),
        (5e9, put(QUERY, np.zeros((24, 24), np.int32)), [ONE, QUERY, "I32; need one of F32"]),
        (5e9, put(QUERY, np.zeros((24, 24))), [ONE, QUERY, "F64"]),
        (5e9, put("model.layers.3.mlp.up_proj.weight", np.zeros(2)), ["model.layers.3", "unexp"]),
        (5e9, put("lm_head.weight", np.zeros((37, 24), np.float32)), ["lm_head.weight", "differs"]),
        (5e9, put("model.layers.0.self_attn.q_proj.bias", np.zeros(24)), ["q_proj.bias", "unexp"]),
        (5e9, data(ONE, lambda raw: raw[:-1]), [ONE, "not a whole safetensors file"]),
        (5e9, data(ONE, lambda raw: raw + b"x"), [ONE, "not a whole safetensors file"]),
        (5e9, data(ONE, lambda raw: raw[:100]), [ONE, "not a whole safetensors file"]),
        (5e9, data(ONE, lambda raw: b""), [ONE, "not a whole safetensors file"]),
        (5e9, text(ONE, "version https://git-lfs"), [ONE, "not a whole safetensors file"]),
        (5e9, lambda folder: (folder / ONE).unlink(), ["no weights", ONE, INDEX]),
        (4000, text(INDEX, "{"), [INDEX, "not JSON"]),
        (4000, text(INDEX, "[]"), [INDEX, "list; need a JSON object"]),
        (4000, text(INDEX, "{}"), [INDEX, "weight_map: None"]),
        (4000, index(lambda c: c["weight_map"].update({QUERY: "../x"})), [INDEX, QUERY, "'../x'"]),
        (4000, index(lambda c: c["weight_map"].update({QUERY: 3})), [INDEX, QUERY, "3; need"]),
        (4000, index(lambda c: c["weight_map"].update({QUERY: "x.st"})), ["x.st", "No such file"]),
        (
            4000,
            index(lambda c: c["weight_map"].update({QUERY: c["weight_map"][EMBED]})),
            [INDEX, QUERY, "not in model-000"],
        ),
        (
            4000,  # a key shares its file with others, which is therefore open
            index(lambda c: c["weight_map"].update({KEY: c["weight_map"][EMBED]})),
            [INDEX, KEY, "not in model-000"],
        ),
        (4000, index(lambda c: c["weight_map"].update(other=c["weight_map"][EMBED])), ["other"]),
        (4000, lambda folder: shard(folder).unlink(), ["model-000", "No such file"]),
        (4000, lambda folder: shard(folder).write_bytes(b"12345678"), ["model-000", "not a whole"]),
        (
            4000,
            lambda folder: save_file({EMBED: np.zeros(2)}, shard(folder)),
            [EMBED, "also in model-000"],
        ),
        (4000, tensors(lambda held: held.update(extra=held.pop(QUERY))), [INDEX, QUERY, "not in"]),
    ],
)
def test_malformed_weights_are_refused(shard_bytes, edit, culprits, tmp_path):
    folder = tmp_path / "out"
    hf.write(folder, MODEL, PARAMS, shard_bytes=shard_bytes)
    edit(folder)
    with refused(str(folder), *culprits):
        hf.read(folder, MODEL)


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans())
def test_any_damage_to_a_header_is_one_line(place, byte, cut, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "out"
    hf.write(folder, MODEL, PARAMS)
    raw = bytearray((folder / ONE).read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    at = int(place * (header - 1))
    raw = raw[:at] + raw[at + 1 :] if cut else raw[:at] + bytes([byte]) + raw[at + 1 :]
    (folder / ONE).write_bytes(raw)
    try:
        hf.read(folder, MODEL)
    except ValueError as error:
        assert "\n" not in str(error) and str(folder) in str(error)


@pytest.mark.parametrize(
    "content, culprit",
    [
        (None, "No such file"),
        (b"", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"model_type": "llama",', "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'"llama"', "str; need a JSON object"),
    ],
)
def test_malformed_config_files_are_refused(content, culprit, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with refused(str(tmp_path / "config.json"), culprit):
        hf.read_config(tmp_path)


def test_missing_folder_is_refused(tmp_path):
    with refused("nowhere: no such folder"):
        hf.read(tmp_path / "nowhere", MODEL)


def test_harmless_surplus_is_read_past(tmp_path):
    hf.write(tmp_path / "out", MODEL, PARAMS)
    held = load_file(tmp_path / "out" / ONE)
    held["lm_head.weight"] = held[EMBED]
    held["model.layers.2.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    save_file(held, tmp_path / "out" / ONE)
    same(hf.read(tmp_path / "out", MODEL), PARAMS)


def test_wrong_shape_from_any_mapping_is_refused():
    held = hf.tensors_from_params(MODEL, PARAMS) | {QUERY: np.zeros((1, 24))}
    with refused(QUERY, "shape (1, 24); need (24, 24)"):
        hf.params_from_tensors(MODEL, held.__getitem__)


@pytest.mark.parametrize("wide", ["float32", "bfloat16"])
def test_values_beyond_the_type_are_refused(wide, tmp_path):
    narrow = replace(MODEL, precision=Precision(params="float16"))
    large = jax.tree.map(
        lambda p: p.astype(wide), PARAMS | {"norm": {"weight": 1e5 * jnp.ones(24)}}
    )
    with refused("model.norm.weight: values beyond the range of float16"):
        hf.write(tmp_path / "out", narrow, large)
    hf.write(tmp_path / "out", replace(MODEL, precision=Precision(params=wide)), large)
    with refused("model.norm.weight: values beyond the range of float16"):
        hf.read(tmp_path / "out", narrow)


def full(folder: Path) -> Path:
    folder.mkdir()
    (folder / "notes").write_text("keep")
    return folder


def no_query(params):
    mixer = {k: v for k, v in params["blocks"]["mixer"].items() if k != "query"}
    return params | {"blocks": params["blocks"] | {"mixer": mixer}}


@pytest.mark.parametrize(
    "target, params, options, culprits",
    [
        (full, PARAMS, {}, ["exists already; need a new or an empty folder"]),
        (lambda f: f.write_text("x") and f, PARAMS, {}, ["exists already"]),
        (lambda f: full(f) / "notes" / "out", PARAMS, {}, ["cannot be made: Not a directory"]),
        (lambda f: f, no_query(PARAMS), {}, ["params: blocks/mixer/query: missing"]),
        (lambda f: f, PARAMS | {"x": jnp.ones(2)}, {}, ["params: x: not the model's"]),
        (lambda f: f, PARAMS | {"norm": {"weight": jnp.ones(7)}}, {}, ["norm/weight: shape (7,)"]),
        (lambda f: f, PARAMS, {"shard_bytes": 0}, ["shard_bytes: 0; need a positive number"]),
        (lambda f: f, PARAMS, {"extra": {"vocab_size": 9}}, ["vocab_size: 9; the model says 37"]),
        (lambda f: f, PARAMS, {"tokenizer": "no/where.json"}, ["no/where.json: no such file"]),
    ],
)
def test_what_cannot_be_written_is_refused(target, params, options, culprits, tmp_path):
    folder = target(tmp_path / "out")
    before = sorted((p, p.is_file() and p.read_text()) for p in tmp_path.rglob("*"))
    with refused(*culprits):
        hf.write(folder, MODEL, params, **options)
    assert sorted((p, p.is_file() and p.read_text()) for p in tmp_path.rglob("*")) == before


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        hf.write(tmp_path / "out", MODEL, PARAMS)
    assert not any(tmp_path.iterdir())


def test_files_say_what_other_readers_ask(tmp_path):
    hf.write(tmp_path / "out", MODEL, PARAMS, shard_bytes=4000)
    content = json.loads((tmp_path / "out" / INDEX).read_text())
    assert content["metadata"]["total_size"] == sum(p.nbytes for p in jax.tree.leaves(PARAMS))
    with safe_open(tmp_path / "out" / content["weight_map"][QUERY], "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_tokenizer_is_found_and_copied(tmp_path):
    (tmp_path / "in").mkdir()
    assert hf.tokenizer_file(tmp_path / "in") is None
    (tmp_path / "in" / "tokenizer.json").write_text('{"version": "1.0"}')
    tokenizer = hf.tokenizer_file(tmp_path / "in")
    assert tokenizer == tmp_path / "in" / "tokenizer.json"
    (tmp_path / "empty").mkdir()
    hf.write(tmp_path / "empty", MODEL, PARAMS, tokenizer=tokenizer)
    assert (tmp_path / "empty" / "tokenizer.json").read_text() == '{"version": "1.0"}'
