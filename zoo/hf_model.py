"""A `config.json` and the model it describes, both ways."""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from bestiary.layers.attention import Attention
from bestiary.layers.base import DTypeName, Precision
from bestiary.layers.blockffn import BlockFFN
from bestiary.layers.feedforward import GLU
from bestiary.layers.linear import Embedding, Linear
from bestiary.layers.mamba import Mamba
from bestiary.layers.mamba2 import Mamba2
from bestiary.layers.mla import MLA
from bestiary.layers.moe import MoE
from bestiary.layers.repeat import Repeat
from bestiary.layers.router import Router
from bestiary.zoo.decoder import Decoder
from bestiary.zoo.hf_config import Fields
from bestiary.zoo.hf_deepseek import DEEPSEEK
from bestiary.zoo.hf_dense import GEMMA2, LLAMA
from bestiary.zoo.hf_families import Family
from bestiary.zoo.hf_ling import BAILING
from bestiary.zoo.hf_mamba import MAMBA, MAMBA2
from bestiary.zoo.hf_minicpm import MINICPM
from bestiary.zoo.hf_mixtures import MIXTRAL, OLMOE
from bestiary.zoo.hf_tensors import stored_params

FAMILIES = {
    family.model_type: family
    for family in (LLAMA, GEMMA2, OLMOE, MIXTRAL, DEEPSEEK, BAILING, MINICPM, MAMBA, MAMBA2)
}
# fields that say how a model is trained or run, not what it computes
_UNTOLD = {
    (Attention, "cache"),
    (Attention, "out_gain"),
    (BlockFFN, "chunk"),
    (BlockFFN, "density"),
    (BlockFFN, "detach_target"),
    (BlockFFN, "locality"),
    (BlockFFN, "out_gain"),
    (BlockFFN, "sharpness"),
    (BlockFFN, "sparsity"),
    (BlockFFN, "window"),
    (Decoder, "precision"),
    (Decoder, "std"),
    (Embedding, "std"),
    (GLU, "out_gain"),
    (Linear, "axes"),
    (Linear, "gain"),
    (MLA, "cache"),
    (MLA, "out_gain"),
    (Mamba, "chunk"),
    (Mamba, "method"),
    (Mamba, "out_gain"),
    (Mamba2, "chunk"),
    (Mamba2, "out_gain"),
    (MoE, "path"),
    (Repeat, "remat"),
    (Repeat, "unroll"),
    (Router, "balance"),
    (Router, "balance_groups"),
    (Router, "balance_over"),
    (Router, "bias"),  # which rule moves it; whether there is one, the tensors tell
    (Router, "bias_rate"),
    (Router, "gradient_scale"),
    (Router, "precision"),
    (Router, "std"),
    (Router, "top1_balance"),
    (Router, "top1_temperature"),
    (Router, "z_loss"),
}


def model_from_config(config: Mapping[str, Any]) -> Decoder:
    """The model that a `config.json` describes, in the precision that it names.

    Raises ValueError for an unknown `model_type` and for every entry that is missing, malformed or
    not supported.
    """
    fields = Fields(config)
    family = fields.choice("model_type", FAMILIES, None)
    fields.fixed(quantization_config=None)
    name = "torch_dtype" if config.get("dtype") is None else "dtype"
    dtype = fields.choice(name, {dtype: dtype for dtype in get_args(DTypeName)}, "float32")
    precision = Precision(params=dtype, compute=dtype)
    return dataclasses.replace(family.decoder(fields), precision=precision)


def config_from_model(model: Decoder) -> dict[str, Any]:
    """The `config.json` that describes `model`; ValueError when no family can express it.

    It names `precision.params` as the type. Not told: how the model is initialised, computed and
    rematerialised; the longest sequence and special tokens, which a model does not know.
    """
    _, config = express(model)
    return config


def express(model: Decoder) -> tuple[Family, dict[str, Any]]:
    """The family whose configuration leads back to the same model, and that configuration."""
    reasons = []
    for family in FAMILIES.values():
        try:
            config = {
                "architectures": [family.architecture],
                "model_type": family.model_type,
                "torch_dtype": model.precision.params,
                **family.config(model),
            }
            read = model_from_config(config)
            if difference := _difference(model, read):
                raise ValueError(difference)
            if missing := stored_params(family, read).keys() - stored_params(family, model).keys():
                raise ValueError(f"{min(name for name, _ in missing)}: no parameter stores it")
            return family, config
        except ValueError as error:
            reasons.append(f"{family.model_type} ({error})")
    raise ValueError(f"model: no Hugging Face family expresses it: {', '.join(reasons)}")


def _difference(ours: Any, theirs: Any, path: str = "") -> str | None:
    """Where two models first differ in what they compute."""
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        names = [f.name for f in dataclasses.fields(ours) if (type(ours), f.name) not in _UNTOLD]
        parts = [(f".{n}", getattr(ours, n), getattr(theirs, n)) for n in names]
    elif isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        parts = [(f".{i}", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    elif ours == theirs:
        return None
    else:
        a, b = (
            type(x).__name__ if dataclasses.is_dataclass(x) else repr(x) for x in (ours, theirs)
        )
        return f"{path}: {a}, not {b}"
    differences = (_difference(a, b, (path + n).lstrip(".")) for n, a, b in parts)
    return next((d for d in differences if d), None)
