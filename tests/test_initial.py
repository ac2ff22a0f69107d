"""Runs that begin from another run's parameters, and runs that train only some of theirs."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bestiary.layers import DSA, MLA, Attention, MoBA
from bestiary.layers.base import Layer, flatten
from bestiary.train.checkpoint import load_run
from bestiary.train.data import Data
from bestiary.train.experiment import Checkpoints, Evaluation, Experiment, load_experiment
from bestiary.train.run import train
from bestiary.zoo.decoder import Decoder
from bestiary.zoo.llama import llama, multi_head, swiglu

LATENT: dict[str, Any] = {"dim": 16, "num_heads": 2, "kv_rank": 8, "q_rank": 8, "nope_dim": 6}
LATENT |= {"rope_dim": 2, "value_dim": 8}
INDEX: dict[str, Any] = {"top_k": 4, "index_heads": 2, "index_dim": 4}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(random.Random(0).choices("abcd efg\n", k=6000)))
    return str(path)


def with_mixer(mixer: Layer) -> Decoder:
    return llama(vocab_size=256, num_layers=2, tied=True, attention=mixer, ffn=swiglu(16, 48))


def experiment(text: str, run_dir: Path, mixer: Layer, **changes: Any) -> Experiment:
    return replace(
        load_experiment("tiny"),
        model=with_mixer(mixer),
        data=Data(path=text, length=16, batch_size=8),
        evaluation=Evaluation(every=0, batches=1),
        checkpoints=Checkpoints(every=8),
        run_dir=str(run_dir),
        **{"steps": 4} | changes,
    )


def trained(text: str, run_dir: Path, mixer: Layer, **changes: Any) -> dict[str, np.ndarray]:
    train(experiment(text, run_dir, mixer, **changes), "tiny")
    return {path: np.asarray(x) for path, x in flatten(load_run(run_dir)[1])}


def test_dense_warmup_and_sparse_stage(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A dense run gets an indexer, which alone is trained, then all is."""
    dense = trained(text, tmp_path / "dense", MLA(**LATENT))
    capsys.readouterr()
    warm = trained(
        text,
        tmp_path / "warm",
        DSA(**LATENT, **INDEX, stage="warmup"),
        initial=str(tmp_path / "dense"),
        only="/indexer/",
    )
    assert "; drawn: blocks/mixer/indexer/key, blocks/mixer/indexer/key_norm/bias" in (
        capsys.readouterr().out
    )
    assert dense.keys() < warm.keys()
    drawn = dict(flatten(with_mixer(DSA(**LATENT, **INDEX)).init(jax.random.key(0))))
    for path, value in warm.items():
        if path in dense:
            np.testing.assert_array_equal(value, dense[path])
        else:
            assert np.any(value != drawn[path]), path
    sparse = trained(
        text, tmp_path / "sparse", DSA(**LATENT, **INDEX), initial=str(tmp_path / "warm")
    )
    for path, value in warm.items():
        assert np.any(sparse[path] != value), path


def test_full_attention_becomes_moba(text: str, tmp_path: Path) -> None:
    """The parameters are the same; a run goes on as MoBA, and where all blocks are chosen, as if
    nothing had changed."""
    attention = multi_head(16, 2)
    fields = {name: getattr(attention, name) for name in Attention.__dataclass_fields__}
    trained(text, tmp_path / "full", attention)
    start = {"initial": str(tmp_path / "full")}
    on = trained(text, tmp_path / "on", attention, **start)
    all_blocks = MoBA(**fields, block_size=4, top_k=4)
    same = trained(text, tmp_path / "all", all_blocks, **start)
    assert on.keys() == same.keys()
    for path, value in on.items():
        np.testing.assert_allclose(same[path], value, atol=2e-4, err_msg=path)


def test_refuses(text: str, tmp_path: Path) -> None:
    mixer = multi_head(16, 2)
    with pytest.raises(ValueError, match="only: 'indexer' is in the path of no trained parameter"):
        experiment(text, tmp_path / "run", mixer, only="indexer")
    with pytest.raises(ValueError, match=r"only: '\(' is no regular expression"):
        experiment(text, tmp_path / "run", mixer, only="(")
    with pytest.raises(ValueError, match="initial: .*; need a run that has a checkpoint"):
        trained(text, tmp_path / "run", mixer, initial=str(tmp_path / "none"))
    assert not (tmp_path / "run").exists()
    trained(text, tmp_path / "one", mixer, steps=1)
    other = replace(
        experiment(text, tmp_path / "other", mixer, initial=str(tmp_path / "one")),
        model=llama(
            vocab_size=300, num_layers=3, tied=True, attention=multi_head(8, 2), ffn=swiglu(8, 9)
        ),
    )
    with pytest.raises(ValueError, match="has no parameter of this model's paths and shapes"):
        train(other, "tiny")
