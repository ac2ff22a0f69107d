"""Mamba and Mamba-2 folders: logits against transformers both ways, round trips, refusals."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bestiary.layers import Mamba2
from bestiary.layers.base import flatten
from bestiary.zoo import hf
from bestiary.zoo import mamba as zoo
from bestiary.zoo.decoder import Decoder

TOKENS = np.random.default_rng(0).integers(0, 37, (2, 19))
MAMBA = {
    "model_type": "mamba",
    "vocab_size": 37,
    "hidden_size": 24,
    "state_size": 5,
    "num_hidden_layers": 2,
    "time_step_rank": 3,
}
MAMBA2 = {
    "model_type": "mamba2",
    "vocab_size": 37,
    "hidden_size": 24,
    "state_size": 10,
    "num_hidden_layers": 2,
    "num_heads": 6,
    "head_dim": 8,
    "n_groups": 2,
    "chunk_size": 7,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mamba": MAMBA,
    "mamba_biases": MAMBA
    | {"use_bias": True, "use_conv_bias": False, "expand": 3}
    | {"time_step_rank": "auto", "conv_kernel": 3, "tie_word_embeddings": False},
    "mamba2": MAMBA2 | {"tie_word_embeddings": True},
    "mamba2_biases": MAMBA2 | {"use_bias": True, "time_step_limit": [0.01, 0.7]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_weights_both_ways(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch, transformers = (pytest.importorskip(m) for m in ("torch", "transformers"))
    config = transformers.AutoConfig.for_model(**CONFIGS[name])
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    theirs.save_pretrained(tmp_path / "theirs")

    model = hf.model_from_config(hf.read_config(tmp_path / "theirs"))
    params = hf.read(tmp_path / "theirs", model)
    ours = jax.jit(model.apply)(params, TOKENS)[0]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())

    hf.write(tmp_path / "ours", model, params)
    assert hf.model_from_config(hf.read_config(tmp_path / "ours")) == model
    again = dict(flatten(hf.read(tmp_path / "ours", model)))
    for path, value in flatten(params):
        np.testing.assert_array_equal(again[path], value, err_msg=path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for (path, a), b in zip(theirs.state_dict().items(), back.state_dict().values(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)


PUBLISHED = {  # by the released files
    "mamba_130m": 129135360,
    "mamba_370m": 371516416,
    "mamba_790m": 793204224,
    "mamba_1_4b": 1372178432,
    "mamba_2_8b": 2768345600,
    "mamba2_130m": 128989632,
    "mamba2_370m": 368346624,
    "mamba2_780m": 780161280,
    "mamba2_1_3b": 1343757312,
    "mamba2_2_7b": 2702599680,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    model = getattr(zoo, name)()
    assert model.count().total == PUBLISHED[name]
    torch, transformers = (pytest.importorskip(m) for m in ("torch", "transformers"))
    config = transformers.AutoConfig.for_model(**hf.config_from_model(model))
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in theirs.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 5}, "num_heads: 5; need 48 / head_dim 8"),
        ({"n_groups": 4}, "n_groups: 4; need a divisor of num_heads 6"),
        ({"time_step_limit": [0.5, 0.1]}, "time_step_limit: [0.5, 0.1]; need 0 <= lower < upper"),
        ({"time_step_limit": 3}, "time_step_limit: 3; need two numbers"),
        ({"hidden_act": "tanh"}, "hidden_act: 'tanh'; need one of"),
    ],
)
def test_impossible_entries_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        hf.model_from_config(MAMBA2 | change)


def test_models_without_a_family_are_refused() -> None:
    model = zoo.mamba2_tiny()
    (stack,) = model.stacks

    def with_mixer(**options: Any) -> Decoder:
        block: Any = stack.block
        assert isinstance(block.mixer, Mamba2)
        block = replace(block, mixer=replace(block.mixer, **options))
        return replace(model, blocks=replace(stack, block=block))

    for options in ({"mlp": 8}, {"norm_before_gate": True}):
        with pytest.raises(ValueError, match="no Hugging Face family expresses it"):
            hf.config_from_model(with_mixer(**options))
