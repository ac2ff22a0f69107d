"""Weights in and out of Hugging Face folders: `config.json` and safetensors files.

Tensors are streamed one by one, without torch or transformers: the host holds one stacked parameter
at a time. What corresponds to what is declared in `zoo/hf_families.py`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bestiary.layers.attention import Attention
from bestiary.layers.base import DTypeName, Param, Precision, Tree, flatten, is_param
from bestiary.layers.feedforward import GLU
from bestiary.layers.linear import Embedding, Linear
from bestiary.layers.repeat import Chain, Repeat
from bestiary.zoo.decoder import Decoder
from bestiary.zoo.hf_families import FAMILIES, Family, Fields

DTYPES: dict[str, DTypeName] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}

# fields that say how a model is trained or run, not what it computes
_UNTOLD = {
    (Attention, "out_gain"),
    (Decoder, "precision"),
    (Embedding, "std"),
    (GLU, "out_gain"),
    (Linear, "axes"),
    (Linear, "gain"),
    (Repeat, "remat"),
    (Repeat, "unroll"),
}


def model_from_config(config: Mapping[str, Any]) -> Decoder:
    """The model that a `config.json` describes, in the precision that it names.

    Raises ValueError for an unknown `model_type` and for every entry that is missing, malformed or
    not supported.
    """
    fields = Fields(config)
    family = fields.choice("model_type", FAMILIES, None)
    name = "torch_dtype" if config.get("dtype") is None else "dtype"
    dtype = fields.choice(name, DTYPES, "float32")
    precision = Precision(params=dtype, compute=dtype)
    return dataclasses.replace(family.decoder(fields), precision=precision)


def config_from_model(model: Decoder) -> dict[str, Any]:
    """The `config.json` that describes `model`; ValueError when no family can express it.

    It names `precision.params` as the type. Not told: how the model is initialised, computed and
    rematerialised; the longest sequence and special tokens, which a model does not know.
    """
    _, config = _express(model)
    return config


def params_from_tensors(
    model: Decoder, get: Callable[[str], np.ndarray], mesh: Mesh | None = None
) -> Tree:
    """The parameters of `model` from tensors by Hugging Face name, sharded if on a mesh.

    They take the declared types (`precision.params`). Raises ValueError for a wrong shape.
    """
    tensors: dict[str, list[Tensor]] = {}
    for tensor in tensors_of(model):
        tensors.setdefault(tensor.path, []).append(tensor)

    def gather(path: tuple, param: Param) -> jax.Array:
        stacked = np.empty(param.shape, param.dtype)
        for tensor in tensors[jax.tree_util.keystr(path, simple=True, separator="/")]:
            value, view = get(tensor.name), tensor.view(stacked)
            if value.shape != view.shape:
                raise ValueError(f"{tensor.name}: shape {value.shape}; need {view.shape}")
            view[...] = value
        sharding = param.abstract(mesh).sharding
        if sharding is None:
            return jnp.asarray(stacked)
        return jax.make_array_from_callback(param.shape, sharding, lambda index: stacked[index])

    return jax.tree_util.tree_map_with_path(gather, model.declare(), is_leaf=is_param)


def tensors_from_params(model: Decoder, params: Tree) -> dict[str, np.ndarray]:
    """All tensors by Hugging Face name, in the types of `params`; gradients do as well."""
    leaves = dict(flatten(params))
    return {t.name: np.array(t.view(np.asarray(leaves[t.path]))) for t in tensors_of(model)}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a folder and its place in the parameters."""

    name: str
    path: str
    """Of the parameter that holds it."""
    index: tuple[int, ...]
    """On the parameter's leading stacked axes."""
    param: Param

    def view(self, stacked: np.ndarray) -> np.ndarray:
        """The part of the parameter in torch's layout: matrices are [outputs, inputs]."""
        x = stacked[(*self.index, ...)]
        if self.param.inputs is None:
            return x
        return x.reshape(math.prod(x.shape[: self.param.inputs]), -1).T


def tensors_of(model: Decoder) -> Iterator[Tensor]:
    """Every tensor of the model's folder, ordered by parameter."""
    family, _ = _express(model)
    block = model.blocks.block
    period = len(block.layers) if isinstance(block, Chain) else 1
    for path, param in flatten(model.declare()):
        position = re.match(r"blocks/(\d+)/", path)
        name = family.names[re.sub(r"^blocks/\d+/", "blocks/", path)]
        for index in np.ndindex(param.shape[: param.batch_ndim]):
            offset = int(position[1]) if position else 0
            numbers = (index[0] * period + offset, *index[1:]) if index else ()
            yield Tensor(name.format(*numbers), path, index, param)


def _express(model: Decoder) -> tuple[Family, dict[str, Any]]:
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
            if difference := _difference(model, model_from_config(config)):
                raise ValueError(difference)
            return family, config
        except ValueError as error:
            reasons.append(f"{family.model_type} ({error})")
    raise ValueError(f"model: no Hugging Face family expresses it: {', '.join(reasons)}")


def _difference(ours: Any, theirs: Any, path: str = "") -> str | None:
    """Where two models first differ in what they compute."""
    if type(ours) is not type(theirs):
        return f"{path}: {type(ours).__name__}, not {type(theirs).__name__}"
    if dataclasses.is_dataclass(ours):
        names = [f.name for f in dataclasses.fields(ours) if (type(ours), f.name) not in _UNTOLD]
        parts = [(f".{n}", getattr(ours, n), getattr(theirs, n)) for n in names]
    elif isinstance(ours, tuple) and len(ours) == len(theirs):
        parts = [(f".{i}", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    else:
        return None if ours == theirs else f"{path}: {ours!r}, not {theirs!r}"
    differences = (_difference(a, b, (path + n).lstrip(".")) for n, a, b in parts)
    return next((d for d in differences if d), None)
