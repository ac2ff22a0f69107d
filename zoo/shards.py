"""Folders of safetensors files: read lazily, written tensor by tensor.

Files are written here, not by the library, which would need all tensors of a file in memory: eight
bytes with the header's length, the header in JSON, then the tensors.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

TYPES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """One tensor of an open file."""

    name: str
    file: Path
    reader: Any

    def check(self, shape: tuple[int, ...]) -> None:
        """ValueError unless the header says this shape and a floating-point type."""
        header = self.reader.get_slice(self.name)
        found = tuple(header.get_shape())
        if found != shape:
            raise ValueError(f"{self.file}: {self.name}: shape {found}; need {shape}")
        if header.get_dtype() not in TYPES.values():
            raise ValueError(
                f"{self.file}: {self.name}: type {header.get_dtype()}; "
                f"need one of {', '.join(TYPES.values())}"
            )

    def read(self) -> np.ndarray:
        return self.reader.get_tensor(self.name)


def exist(folder: str | os.PathLike) -> bool:
    """Whether the folder says that it has weights."""
    return any((Path(folder) / name).exists() for name in (SINGLE, INDEX))


@contextmanager
def open_tensors(folder: str | os.PathLike) -> Iterator[dict[str, Stored]]:
    """Context manager: the folder's tensors by name, headers read, data not.

    Raises ValueError for files that are missing, torn or disagree with the index.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    single, index = folder / SINGLE, folder / INDEX
    if not exist(folder):
        raise ValueError(f"{folder}: no weights; need {SINGLE} or {INDEX}")
    places = {} if single.exists() else read_index(index)
    with ExitStack() as stack:
        stored: dict[str, Stored] = {}
        for file in sorted(set(places.values())) or [single]:
            try:
                reader = stack.enter_context(safe_open(file, "numpy"))
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file}: not a whole safetensors file: {error}") from None
            for name in reader.keys():
                if name in stored:
                    raise ValueError(f"{file}: {name!r}: also in {stored[name].file.name}")
                stored[name] = Stored(name, file, reader)
        for name, file in places.items():
            if name not in stored or stored[name].file != file:
                raise ValueError(f"{index}: {name!r}: not in {file.name}")
        yield stored


def read_index(index: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index of a split checkpoint."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: weight_map: {places!r}; need an object of file names")
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index}: {name!r}: {file!r}; need the name of a file in the folder")
    return {name: index.parent / file for name, file in places.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object; ValueError when it is missing or malformed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {type(content).__name__}; need a JSON object")
    return content


def write_tensors(
    folder: Path,
    layout: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    arrays: Iterable[np.ndarray],
    shard_bytes: float,
) -> None:
    """Writes `arrays`, which come in the order of `layout` (name -> shape, type).

    More than `shard_bytes` go into several files and an index. Raises ValueError for no positive
    `shard_bytes`.
    """
    if not shard_bytes > 0:
        raise ValueError(f"shard_bytes: {shard_bytes}; need a positive number")
    sizes = {name: dtype.itemsize * int(np.prod(shape)) for name, (shape, dtype) in layout.items()}
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    queue, places = iter(arrays), {}
    for i, names in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(names, file)
        with open(folder / file, "wb") as f:
            f.write(_header({name: layout[name] for name in names}, sizes))
            for array in islice(queue, len(names)):
                f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _header(
    layout: Mapping[str, tuple[tuple[int, ...], np.dtype]], sizes: Mapping[str, int]
) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (shape, dtype) in layout.items():
        end = start + sizes[name]
        header[name] = {"dtype": TYPES[dtype], "shape": shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data start aligned
    return len(text).to_bytes(8, "little") + text
