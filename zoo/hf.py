"""Weights in and out of Hugging Face folders: `config.json` and safetensors files.

Tensors are streamed one by one, without torch or transformers: the host holds one stacked parameter
at a time (the parts of one tensor together). The families declare what corresponds to what.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bestiary.layers.base import Param, Tree, flatten, init, is_param
from bestiary.zoo import shards
from bestiary.zoo.decoder import Decoder
from bestiary.zoo.hf_config import Fields
from bestiary.zoo.hf_families import LAYER, Adapter
from bestiary.zoo.hf_model import config_from_model, express
from bestiary.zoo.hf_model import model_from_config as model_from_config
from bestiary.zoo.hf_tensors import (
    MTP_BLOCK,
    Tensor,
    copied_names,
    family_tensors,
    layers_of,
)

# older checkpoints store what the configuration says
_REDUNDANT = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The folder's `config.json`; ValueError when it is missing or malformed.

    transformers leaves the layer for multi-token prediction out and counts it all the same: where
    its weights are missing, `num_nextn_predict_layers` is 0.
    """
    config = shards.read_json(Path(folder) / "config.json")
    if config.get("num_nextn_predict_layers") and shards.exist(folder):
        further = LAYER.format(config.get("num_hidden_layers"))
        with shards.open_tensors(folder) as stored:
            if not any(name.startswith(further) for name in stored):
                config["num_nextn_predict_layers"] = 0
    return config


def tokenizer_file(folder: str | os.PathLike) -> Path | None:
    """The folder's `tokenizer.json`, if it has one."""
    path = Path(folder) / "tokenizer.json"
    return path if path.is_file() else None


def read(folder: str | os.PathLike, model: Decoder, mesh: Mesh | None = None) -> Tree:
    """The folder's weights as parameters of `model`, in its declared types, sharded if on a mesh.

    All names, shapes and types are compared before anything is read. Raises ValueError for tensors
    that are missing, unexpected or of another shape or type, and for unreadable files.
    """
    adapters = _adapters(folder, model)

    def get(name: str) -> np.ndarray:
        value = stored[name].read()
        return adapters[name].apply(value) if name in adapters else value

    with shards.open_tensors(folder) as stored:
        _compare(folder, model, stored, adapters)
        return params_from_tensors(model, get, mesh)


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

    tensors = [*tensors_of(model), *_copies_of(model)]

    def arrays() -> Iterator[np.ndarray]:
        for paths, group in groupby(tensors, lambda tensor: tensor.paths):
            # copies, because an array keeps every host value it once gave
            stacked = [np.asarray(leaves[path].copy()) for path in paths]
            for tensor in group:
                yield _cast(tensor.name, tensor.join(stacked), tensor.dtype)

    with new_folder(folder) as partial:
        text = json.dumps(config | tokens | extra, indent=2)
        (partial / "config.json").write_text(text + "\n")
        layout = {tensor.name: (tensor.shape, tensor.dtype) for tensor in tensors}
        shards.write_tensors(partial, layout, arrays(), shard_bytes)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, partial / "tokenizer.json")


@contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Context manager: a folder to fill, which takes its name when it is complete.

    Raises ValueError when there is one with that name that is not empty, or none can be made.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder}: exists already; need a new or an empty folder")
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be made: {error.strerror}") from None
    try:
        yield partial
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
        for path in tensor.paths:
            tensors.setdefault(path, []).append(tensor)

    def gather(keys: tuple, param: Param) -> jax.Array:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if path not in tensors:
            return init({path: param}, jax.random.key(0), mesh)[path]
        stacked = np.empty(param.shape, param.dtype)
        for tensor in tensors[path]:
            value = get(tensor.name)
            if value.shape != tensor.shape:
                raise ValueError(f"{tensor.name}: shape {value.shape}; need {tensor.shape}")
            tensor.part(path, stacked)[...] = _cast(
                tensor.name, tensor.part_of(path, value), stacked.dtype
            )
        sharding = param.abstract(mesh).sharding
        if sharding is None:
            return jnp.asarray(stacked)
        return jax.make_array_from_callback(param.shape, sharding, lambda index: stacked[index])

    return jax.tree_util.tree_map_with_path(gather, model.declare(), is_leaf=is_param)


def tensors_from_params(model: Decoder, params: Tree) -> dict[str, np.ndarray]:
    """All tensors by Hugging Face name, in the types of `params`; gradients do as well."""
    leaves = dict(flatten(params))
    return {
        tensor.name: np.array(tensor.join([np.asarray(leaves[path]) for path in tensor.paths]))
        for tensor in tensors_of(model)
    }


def tensors_of(model: Decoder) -> Iterator[Tensor]:
    """Every tensor of the model's folder, parameter by parameter."""
    return family_tensors(express(model)[0], model)


def _copies_of(model: Decoder) -> Iterator[Tensor]:
    """Tensors of the folder that repeat others."""
    by_name = {tensor.name: tensor for tensor in tensors_of(model)}
    for copy, name in copied_names(express(model)[0], model).items():
        yield replace(by_name[name], name=copy)


def _adapters(folder: str | os.PathLike, model: Decoder) -> dict[str, Adapter]:
    family, _ = express(model)
    if family.adapters is None:
        return {}
    adapters = family.adapters(Fields(read_config(folder)))
    layers = range(layers_of(model)[MTP_BLOCK][0])
    return {name.format(i): adapter for name, adapter in adapters.items() for i in layers}


def _cast(name: str, x: np.ndarray, dtype: Any) -> np.ndarray:
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):
        y = x.astype(dtype)
    if np.isinf(y).sum() > np.isinf(x).sum():
        raise ValueError(f"{name}: values beyond the range of {np.dtype(dtype)}")
    return y


def _compare(
    folder: str | os.PathLike,
    model: Decoder,
    stored: Mapping[str, shards.Stored],
    adapters: Mapping[str, Adapter],
) -> None:
    """ValueError for the first difference between the folder's tensors and the model's."""
    wanted = {tensor.name: tensor.shape for tensor in tensors_of(model)}
    wanted |= {name: adapter.shape for name, adapter in adapters.items()}
    if missing := [name for name in wanted if name not in stored]:
        raise ValueError(
            f"{folder}: {missing[0]}: missing, need shape {wanted[missing[0]]}; "
            f"{len(missing)} of {len(wanted)} tensors are missing"
        )
    for name, tensor in stored.items():
        if name in wanted:
            tensor.check(wanted[name])
        elif not _REDUNDANT.fullmatch(name):
            _check_surplus(model, stored, name)


def _check_surplus(model: Decoder, stored: Mapping[str, shards.Stored], name: str) -> None:
    """A tensor beside the declared ones may only repeat another one, such as the embedding as the
    tied head, or be what the family leaves unread."""
    family, _ = express(model)
    after, names = layers_of(model)[MTP_BLOCK][0], family.names(model)
    if model.mtp is None and family.unread and name.startswith(family.unread.format(after)):
        return
    copies = copied_names(family, model)
    if model.head is None:
        copies[str(names["head/weight"])] = str(names["embedding/table"])
    if name not in copies:
        raise ValueError(f"{stored[name].file}: {name!r}: unexpected; the model has no such tensor")
    if not np.array_equal(stored[name].read(), stored[copies[name]].read()):
        need = "equal tensors"
        if name == names["head/weight"]:
            need += " or tie_word_embeddings false"
        raise ValueError(f"{stored[name].file}: {name}: differs from {copies[name]}; need {need}")
