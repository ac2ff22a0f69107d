"""Weights in and out of Hugging Face folders: `config.json` and safetensors files.

Tensors are streamed one by one, without torch or transformers: the host holds one stacked parameter
at a time. `zoo/hf_families.py` declares what corresponds to what.
"""

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bestiary.layers.attention import Attention
from bestiary.layers.base import DTypeName, Param, Precision, Tree, flatten, is_param
from bestiary.layers.feedforward import GLU
from bestiary.layers.linear import Embedding, Linear
from bestiary.layers.repeat import Chain, Repeat
from bestiary.zoo import shards
from bestiary.zoo.decoder import Decoder
from bestiary.zoo.hf_config import Fields
from bestiary.zoo.hf_families import FAMILIES, Family

# older checkpoints store what the configuration says
_REDUNDANT = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
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
    _, config = _express(model)
    return config


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The folder's `config.json`; ValueError when it is missing or malformed."""
    return shards.read_json(Path(folder) / "config.json")


def tokenizer_file(folder: str | os.PathLike) -> Path | None:
    """The folder's `tokenizer.json`, if it has one."""
    path = Path(folder) / "tokenizer.json"
    return path if path.is_file() else None


def read(folder: str | os.PathLike, model: Decoder, mesh: Mesh | None = None) -> Tree:
    """The folder's weights as parameters of `model`, in its declared types, sharded if on a mesh.

    All names, shapes and types are compared before anything is read. Raises ValueError for tensors
    that are missing, unexpected or of another shape or type, and for unreadable files.
    """
    with shards.open_tensors(folder) as stored:
        _compare(folder, model, stored)
        return params_from_tensors(model, lambda name: stored[name].read(), mesh)


def write(
    folder: str | os.PathLike,
    model: Decoder,
    params: Tree,
    *,
    shard_bytes: float = 5e9,
    tokenizer: str | os.PathLike | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes `config.json`, the weights in the declared types and a copy of `tokenizer`.

    More than `shard_bytes` are split into several files with an index. `extra` are entries of
    `config.json` that the model does not hold (`max_position_embeddings`, `eos_token_id`). The
    folder appears when it is complete. Raises ValueError when it exists and is not empty, when no
    family expresses the model, and when `params` are not the model's.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder}: exists already; need a new or an empty folder")
    if tokenizer is not None and not Path(tokenizer).is_file():
        raise ValueError(f"{tokenizer}: no such file; need a tokenizer.json")
    config, extra = config_from_model(model), dict(extra or {})
    for name in sorted(extra.keys() & config.keys()):
        raise ValueError(f"extra: {name}: {extra[name]!r}; the model says {config[name]!r}")
    # the defaults of transformers belong to the published vocabulary
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    leaves, declared = dict(flatten(params)), dict(flatten(model.declare()))
    for path in sorted(leaves.keys() ^ declared.keys()):
        what = "missing" if path in declared else "not the model's"
        raise ValueError(f"params: {path}: {what}")
    for path, param in declared.items():
        if leaves[path].shape != param.shape:
            raise ValueError(f"params: {path}: shape {leaves[path].shape}; need {param.shape}")

    def arrays() -> Iterator[np.ndarray]:
        for path, tensors in groupby(tensors_of(model), lambda tensor: tensor.path):
            # a copy, because an array keeps every host value it once gave
            stacked = np.asarray(leaves[path].copy())
            for tensor in tensors:
                yield _cast(tensor.name, tensor.view(stacked), tensor.param.dtype)

    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be made: {error.strerror}") from None
    try:
        text = json.dumps(config | tokens | extra, indent=2)
        (partial / "config.json").write_text(text + "\n")
        layout = {t.name: (t.shape, np.dtype(t.param.dtype)) for t in tensors_of(model)}
        shards.write_tensors(partial, layout, arrays(), shard_bytes)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, partial / "tokenizer.json")
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def params_from_tensors(
    model: Decoder, get: Callable[[str], np.ndarray], mesh: Mesh | None = None
) -> Tree:
    """The parameters of `model` from tensors by Hugging Face name, sharded if on a mesh.

    They take the declared types (`precision.params`). Raises ValueError for a wrong shape and for
    values beyond the type's range.
    """
    tensors: dict[str, list[Tensor]] = {}
    for tensor in tensors_of(model):
        tensors.setdefault(tensor.path, []).append(tensor)

    def gather(path: tuple, param: Param) -> jax.Array:
        stacked = np.empty(param.shape, param.dtype)
        for tensor in tensors[jax.tree_util.keystr(path, simple=True, separator="/")]:
            value = get(tensor.name)
            if value.shape != tensor.shape:
                raise ValueError(f"{tensor.name}: shape {value.shape}; need {tensor.shape}")
            tensor.view(stacked)[...] = _cast(tensor.name, value, stacked.dtype)
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

    @property
    def shape(self) -> tuple[int, ...]:
        """In torch's layout: matrices are [outputs, inputs]."""
        shape, inputs = self.param.shape[len(self.index) :], self.param.inputs
        if inputs is None:
            return shape
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])

    def view(self, stacked: np.ndarray) -> np.ndarray:
        """The tensor inside the parameter: read from it, or assign to it."""
        part = stacked[(*self.index, ...)]
        return part if self.param.inputs is None else part.reshape(self.shape[::-1]).T


def tensors_of(model: Decoder) -> Iterator[Tensor]:
    """Every tensor of the model's folder, ordered by parameter."""
    family, _ = _express(model)
    block = model.stacks[0].block
    period = len(block.layers) if isinstance(block, Chain) else 1
    for path, param in flatten(model.declare()):
        position = re.match(r"blocks/(\d+)/", path)
        name = family.names[re.sub(r"^blocks/\d+/", "blocks/", path)]
        for index in np.ndindex(param.shape[: param.batch_ndim]):
            offset = int(position[1]) if position else 0
            numbers = (index[0] * period + offset, *index[1:]) if index else ()
            yield Tensor(name.format(*numbers), path, index, param)


def _cast(name: str, x: np.ndarray, dtype: Any) -> np.ndarray:
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):
        y = x.astype(dtype)
    if np.isinf(y).sum() > np.isinf(x).sum():
        raise ValueError(f"{name}: values beyond the range of {np.dtype(dtype)}")
    return y


def _compare(
    folder: str | os.PathLike, model: Decoder, stored: Mapping[str, shards.Stored]
) -> None:
    """ValueError for the first difference between the folder's tensors and the model's."""
    wanted = {tensor.name: tensor.shape for tensor in tensors_of(model)}
    if missing := [name for name in wanted if name not in stored]:
        raise ValueError(
            f"{folder}: {missing[0]}: missing, need shape {wanted[missing[0]]}; "
            f"{len(missing)} of {len(wanted)} tensors are missing"
        )
    for name, tensor in stored.items():
        if name in wanted:
            tensor.check(wanted[name])
        elif not _REDUNDANT.fullmatch(name):
            _check_tied(model, stored, name)


def _check_tied(model: Decoder, stored: Mapping[str, shards.Stored], name: str) -> None:
    """A tensor beside the declared ones may only repeat the embedding as the tied head."""
    names = _express(model)[0].names
    if model.head is not None or name != names["head/weight"]:
        raise ValueError(f"{stored[name].file}: {name!r}: unexpected; the model has no such tensor")
    if not np.array_equal(stored[name].read(), stored[names["embedding/table"]].read()):
        raise ValueError(
            f"{stored[name].file}: {name}: differs from {names['embedding/table']}; "
            "need equal tensors or tie_word_embeddings false"
        )


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
