"""The experiment `din`: runs on any log, GAUC in its evaluations, what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest

from bestiary.__main__ import main
from bestiary.train.log import read_metrics


def ratings(path: Path, items: int) -> str:
    random = np.random.default_rng(0)
    rows = [f"{u},{random.integers(items)},{t}" for u in range(12) for t in range(6)]
    path.write_text("\n".join(["user,item,timestamp", *rows]))
    return str(path)


def said(capsys: pytest.CaptureFixture, *argv: str) -> tuple[int, str, str]:
    status = main(argv)
    heard = capsys.readouterr()
    return status, heard.out, heard.err


def test_a_run_on_a_log(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log, run_dir = ratings(tmp_path / "log.csv", 30), str(tmp_path / "run")
    flags = ("--data.path", log, "--data.length", "4", "--data.batch-size", "8", "--steps", "6")
    argv = ("train", "din", *flags, "--log-every", "3", "--run-dir", run_dir)
    assert said(capsys, *argv)[0] == 0
    lines = read_metrics(tmp_path / "run")
    assert {"loss", "penalty", "samples_per_second"} <= lines[0].keys()
    assert 0 <= lines[-1]["validation_gauc"] <= 1 and 0 <= lines[-1]["validation_auc"] <= 1
    assert "is finished after step 6" in said(capsys, *argv)[1]
    status, out, _ = said(capsys, "eval", run_dir, "--json")
    found = json.loads(out)
    assert status == 0 and found.keys() == {"loss", "auc", "gauc"}
    assert found["gauc"] == pytest.approx(lines[-1]["validation_gauc"])
    other = ratings(tmp_path / "other.csv", 25)
    assert said(capsys, "eval", run_dir, "--data.path", other)[0] == 0
    assert "gauc" in said(capsys, "eval", run_dir, "--steps", "1")[1]


def test_what_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = ratings(tmp_path / "log.csv", 30)
    run = ("--run-dir", str(tmp_path / "run"))
    for flags, message in (
        (("--data.path", log, "--model.num-items", "3"), "model.num_items: 3; need at least"),
        (("--data.path", str(tmp_path / "none.csv")), "data.path="),
        (("--data.length", "0"), "data.length=0"),
    ):
        status, _, err = said(capsys, "train", "din", *flags, *run)
        assert status == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()
