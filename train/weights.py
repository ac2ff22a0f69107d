"""`bestiary import` and `bestiary export`: Hugging Face folders to runs and back."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bestiary.train.checkpoint import load_run, save_run
from bestiary.train.data import Data
from bestiary.train.experiment import Experiment, language_model
from bestiary.zoo import hf, hf_gemma3n


@dataclass(frozen=True, kw_only=True)
class Import:
    """Makes a run of a Hugging Face folder: one checkpoint, and an experiment that continues it."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder with config.json and safetensors files of a known `model_type`."""
    out: str
    """The run directory to make."""


def run_import(options: Import) -> None:
    """Raises ValueError when the folder is not readable as a model or `out` exists."""
    out = Path(options.out)
    if out.exists():
        raise ValueError(f"out: {out} exists already; need a new folder")
    config = hf.read_config(options.folder)
    if config.get("model_type") in tuple(hf_gemma3n.MULTIMODAL):
        raise ValueError(
            f"{options.folder}: model_type: {config['model_type']!r}; a run needs the whole model, "
            "of this one there are the feed-forwards only: see bestiary.zoo.hf_gemma3n"
        )
    model = hf.model_from_config(config)
    params = hf.read(options.folder, model)
    tokenizer = hf.tokenizer_file(options.folder)
    data = Data()
    if tokenizer is not None:
        out.mkdir(parents=True)
        data = dataclasses.replace(data, tokenizer=str(out.resolve() / "tokenizer.json"))
        shutil.copyfile(tokenizer, out / "tokenizer.json")
    save_run(out, Experiment(model=model, data=data, steps=1000), params)
    print(f"{out}: {model.count().total:,} parameters from {options.folder}")


@dataclass(frozen=True, kw_only=True)
class Export:
    """Writes a run's newest checkpoint as a Hugging Face folder."""

    run: Annotated[str, tyro.conf.Positional]
    """The run directory."""
    out: str
    """The folder to write: new or empty."""
    step: int | None = None
    """The checkpoint to write, by its step; by default the newest."""
    shard_gb: float = 5.0
    """Largest size of one weight file, in GB."""


def run_export(options: Export) -> None:
    """Raises ValueError when the run cannot be read or no known family expresses its model."""
    experiment, params = load_run(options.run, options.step)
    model, data = language_model(experiment)
    tokenizer = data.tokenizer
    hf.write(
        options.out,
        model,
        params,
        shard_bytes=options.shard_gb * 1e9,
        tokenizer=None if tokenizer == "bytes" else tokenizer,
        extra={"max_position_embeddings": data.length},
    )
    print(f"{options.out}: {model.count().total:,} parameters of {options.run}")
