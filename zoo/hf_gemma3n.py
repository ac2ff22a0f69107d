"""The feed-forwards of Gemma-3n folders: read as `GaussianGLU` layers with their parameters, and
put back into a copy of the folder.

The zoo lacks the rest of the model (AltUp, LAuReL, embeddings of every layer), without which these
weights make no language model: they are no run, and `bestiary import` says so.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bestiary.layers.base import Tree
from bestiary.layers.spark import GaussianGLU
from bestiary.zoo import shards
from bestiary.zoo.hf import new_folder, read_config
from bestiary.zoo.hf_config import Fields, or_default

MULTIMODAL = {"gemma3n_text": False, "gemma3n": True}
MATRICES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def layers_from_config(config: Mapping[str, Any]) -> tuple[GaussianGLU, ...]:
    """Every layer's feed-forward, from the `config.json` of a text model or a multimodal one.

    Raises ValueError for another `model_type` and for every entry that is malformed.
    """
    f = Fields(config)
    if f.choice("model_type", MULTIMODAL, None):
        if not isinstance(config.get("text_config"), dict):
            raise f.wrong("text_config", "an object")
        f = Fields(config["text_config"], f"{f.where}: text_config")
    f.fixed(hidden_activation="gelu_pytorch_tanh")
    dim, n = f.integer("hidden_size", 2048), f.integer("num_hidden_layers", 35)
    sparse = 10 if n > 10 else 0
    widths = or_default(f.entries.get("intermediate_size"), 16384)
    if type(widths) is int:
        widths = [widths] * n
    pattern = f.entries.get("activation_sparsity_pattern")
    pattern = or_default(pattern, [0.95] * sparse + [0.0] * (n - sparse))
    if not _numbers(widths, n, int, 1, 2**31):
        raise f.wrong("intermediate_size", f"a positive integer, or {n} of them")
    if not _numbers(pattern, n, int | float, 0, 1):
        raise f.wrong("activation_sparsity_pattern", f"{n} numbers from 0 to less than 1")
    return tuple(
        GaussianGLU(dim=dim, hidden=width, sparsity=float(sparsity))
        for width, sparsity in zip(widths, pattern, strict=True)
    )


def read_feed_forwards(
    folder: str | os.PathLike,
) -> tuple[tuple[GaussianGLU, ...], tuple[Tree, ...]]:
    """Every layer's feed-forward and its parameters, in the types of the folder.

    Raises ValueError for a malformed configuration, for tensors that are missing or of another
    shape, and for unreadable files.
    """
    config = read_config(folder)
    layers = layers_from_config(config)
    with shards.open_tensors(folder) as stored:
        names = _names(folder, config, layers, stored)
        params = tuple(
            {matrix: jnp.asarray(stored[name].read().T) for matrix, name in mine.items()}
            for mine in names
        )
    return layers, params


def write_feed_forwards(
    folder: str | os.PathLike,
    source: str | os.PathLike,
    params: Sequence[Tree],
    *,
    shard_bytes: float = 5e9,
) -> None:
    """A copy of the folder `source` whose feed-forwards have `params`, in the types of `source`.

    Raises ValueError as `read_feed_forwards`, when `folder` exists and is not empty, and when
    `params` are not those of the layers.
    """
    config = read_config(source)
    layers = layers_from_config(config)
    if len(params) != len(layers):
        raise ValueError(f"params: of {len(params)} layers; need {len(layers)}")
    for i, (layer, mine) in enumerate(zip(layers, params, strict=True)):
        shapes = {matrix: param.shape for matrix, param in layer.declare().items()}
        if (found := {matrix: x.shape for matrix, x in mine.items()}) != shapes:
            raise ValueError(f"params: layer {i}: shapes {found}; need {shapes}")
    with shards.open_tensors(source) as stored, new_folder(folder) as partial:
        names = _names(source, config, layers, stored)
        ours = {
            name: mine[matrix]
            for mine, named in zip(params, names, strict=True)
            for matrix, name in named.items()
        }
        layout = {name: _header(tensor) for name, tensor in stored.items()}

        def arrays() -> Iterator[np.ndarray]:
            for name, (_, dtype) in layout.items():
                if name in ours:
                    yield np.asarray(ours[name]).T.astype(dtype)
                else:
                    yield stored[name].read()

        shards.write_tensors(partial, layout, arrays(), shard_bytes)
        for file in Path(source).iterdir():
            if file.is_file() and file.suffix != ".safetensors" and file.name != shards.INDEX:
                shutil.copyfile(file, partial / file.name)


def _names(
    folder: str | os.PathLike,
    config: Mapping[str, Any],
    layers: Sequence[GaussianGLU],
    stored: Mapping[str, shards.Stored],
) -> list[dict[str, str]]:
    """Of every layer: matrix -> tensor name. ValueError for one that is missing or of another
    shape."""
    stem = "model.language_model" if MULTIMODAL[config["model_type"]] else "model"
    names = []
    for i, layer in enumerate(layers):
        declared = layer.declare()
        mine = {ours: f"{stem}.layers.{i}.mlp.{name}.weight" for ours, name in MATRICES.items()}
        for matrix, name in mine.items():
            shape = declared[matrix].shape[::-1]
            if name not in stored:
                raise ValueError(f"{folder}: {name}: missing, need shape {shape}")
            stored[name].check(shape)
        names.append(mine)
    return names


def _header(tensor: shards.Stored) -> tuple[tuple[int, ...], np.dtype]:
    header = tensor.reader.get_slice(tensor.name)
    shape = tuple(header.get_shape())
    tensor.check(shape)
    return shape, {name: dtype for dtype, name in shards.TYPES.items()}[header.get_dtype()]


def _numbers(x: Any, n: int, kind: Any, least: float, end: float) -> bool:
    return (
        isinstance(x, list)
        and len(x) == n
        and all(isinstance(v, kind) and not isinstance(v, bool) and least <= v < end for v in x)
    )
