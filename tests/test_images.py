"""Experiments on images: what is read and refused, batches, the objective, whole runs."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from bestiary.__main__ import main
from bestiary.layers import Aux, Layer, Linear, layer
from bestiary.train.checkpoint import load_run
from bestiary.train.classification import Classification
from bestiary.train.data import Data
from bestiary.train.experiment import Evaluation, Experiment, load_experiment
from bestiary.train.images import Images
from bestiary.train.log import read_metrics
from bestiary.train.mesh import Mesh
from bestiary.train.run import train
from bestiary.zoo.llama import llama_tiny
from bestiary.zoo.vit import small_vit

SMALL = {"height": 6, "width": 4, "channels": 3, "classes": 3}


def pictures(folder: Path, suffix: str = ".png", per_class: int = 5) -> dict[str, np.ndarray]:
    """A folder of random images, and their pixels by name."""
    random, pixels = np.random.default_rng(0), {}
    for name in ("ant", "bee", "cat"):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            file = folder / name / f"{i}{suffix}"
            pixels[f"{name}/{i}"] = random.integers(0, 256, (6, 4, 3), np.uint8)
            Image.fromarray(pixels[f"{name}/{i}"]).save(file)
    return pixels


def test_packaged_images() -> None:
    for data, n in ((Images(), 1797), (Images(path="mnist", height=28, width=28), 5000)):
        loaded = data.load()
        held_out = round(0.2 * n)
        assert len(loaded.training_rows["inputs"]) == n - held_out
        assert loaded.validation_batches == -(-held_out // 64)
        images, labels = (loaded.training_rows[name] for name in ("inputs", "targets"))
        assert images.dtype == np.uint8 and (images.min(), images.max()) == (0, 255)
        assert np.bincount(labels).min() > 0.07 * n and labels.max() == 9
        again = data.load()
        np.testing.assert_array_equal(
            again.validation_rows["targets"], loaded.validation_rows["targets"]
        )


def test_folders_and_arrays_hold_the_same(tmp_path: Path) -> None:
    pixels = pictures(tmp_path / "folder")
    (tmp_path / "folder" / "ant" / "notes.txt").write_text("no image")
    images, labels = np.stack(list(pixels.values())), np.repeat([0, 1, 2], 5)
    np.savez(tmp_path / "arrays.npz", images=images, labels=labels)
    loaded = [Images(path=str(tmp_path / n), **SMALL).load() for n in ("folder", "arrays.npz")]
    for part in ("training_rows", "validation_rows"):
        for name in ("inputs", "targets"):
            one, other = (getattr(x, part)[name] for x in loaded)
            np.testing.assert_array_equal(one, other)
    shown = {x.tobytes(): int(y) for x, y in zip(images, labels, strict=True)}
    rows = loaded[0].training_rows
    for image, label in zip(rows["inputs"], rows["targets"], strict=True):
        assert shown[image.tobytes()] == label


def test_epochs_are_shuffled_and_continue_exactly() -> None:
    loaded = Images(batch_size=100).load()
    n = len(loaded.training_rows["targets"])
    first, other = loaded.train(0), loaded.train(1)
    batches = [next(first) for _ in range(30)]
    seen = np.concatenate([b["inputs"] for b in batches])
    epochs = seen[:n], seen[n : 2 * n]

    def in_order(images: np.ndarray) -> list[bytes]:
        return sorted(image.tobytes() for image in images)

    assert in_order(epochs[0]) == in_order(epochs[1])
    assert (epochs[0] != epochs[1]).any() and (next(other)["inputs"] != seen[:100]).any()
    np.testing.assert_allclose(in_order(epochs[0])[0] == min(x.tobytes() for x in epochs[0]), True)
    iterator = loaded.train(0)
    for _ in range(7):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    again = loaded.train(0)
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["inputs"], batches[7]["inputs"])
    parts = [next(loaded.train(0, i, 2))["inputs"] for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts), batches[0]["inputs"])


def test_validation_counts_every_image_once() -> None:
    loaded = Images(batch_size=50).load()
    batches = list(loaded.validation())
    assert len(batches) == loaded.validation_batches == 8
    real = np.concatenate([b["targets"][b["weights"] > 0] for b in batches])
    np.testing.assert_array_equal(real, loaded.validation_rows["targets"])


def test_pixels_are_normalised(tmp_path: Path) -> None:
    pictures(tmp_path, per_class=1)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    data = Images(path=str(tmp_path), validation_fraction=0.0, mean=mean, std=std, **SMALL)
    loaded = data.load()
    raw = loaded.training_rows["inputs"].astype(np.float64) / 255
    batch = loaded.prepare(loaded.training_rows)
    np.testing.assert_allclose(batch["inputs"], (raw - mean) / std, rtol=1e-5, atol=1e-6)
    assert loaded.validation_batches == 0


def test_training_images_vary_and_others_do_not() -> None:
    """Each is one of its mirrored and moved selves; the draws follow from seed and step alone."""
    plain, loaded = (Images(batch_size=40, **c).load() for c in ({}, {"flip": True, "shift": 2}))
    before, after = (next(x.train(3)) for x in (plain, loaded))
    kinds = set()
    for image, seen in zip(before["inputs"], after["inputs"], strict=True):
        wide = np.pad(image, ((2, 2), (2, 2), (0, 0)), constant_values=-1)
        flat = np.pad(image[:, ::-1], ((2, 2), (2, 2), (0, 0)), constant_values=-1)
        found = {
            (flip, y, x)
            for flip, from_ in enumerate((wide, flat))
            for y in range(5)
            for x in range(5)
            if np.allclose(from_[y : y + 8, x : x + 8], seen)
        }
        assert found
        kinds |= found
    assert [{k[i] for k in kinds} for i in range(3)] == [{0, 1}, set(range(5)), set(range(5))]
    np.testing.assert_array_equal(before["targets"], after["targets"])
    parts = [next(loaded.train(3, i, 2))["inputs"] for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts), after["inputs"])
    one, other = (next(iter(x.validation())) for x in (plain, loaded))
    np.testing.assert_array_equal(one["inputs"], other["inputs"])


def test_images_of_other_sizes_are_scaled_and_cut(tmp_path: Path) -> None:
    pictures(tmp_path, per_class=1)
    half = np.zeros((24, 32, 3), np.uint8)
    half[:, 16:] = 255  # covers 4 x 6 as 8 x 6, of which the middle 4 columns stay
    Image.fromarray(half).save(tmp_path / "ant" / "0.png")
    with pytest.raises(ValueError, match="0.png': is 32 x 24; need .* 4 x 6, or data.resize"):
        Images(path=str(tmp_path), **SMALL).load()
    rows = Images(path=str(tmp_path), resize=True, validation_fraction=0.0, **SMALL).load()
    image = rows.training_rows["inputs"][rows.training_rows["targets"] == 0][0].astype(int)
    assert image.shape == (6, 4, 3) and image[:, 0].max() < 40 and image[:, 3].min() > 215


def test_mixing_against_its_definition() -> None:
    x = jnp.arange(2 * 8 * 6, dtype=jnp.float32).reshape(2, 8, 6, 1)
    shares = set()
    for seed in range(6):
        key = jax.random.key(seed)
        y, share = Classification(mixup=0.8).mixed(x, key)
        np.testing.assert_allclose(y, share * x + (1 - share) * x[::-1], rtol=1e-5)
        y, share = Classification(cutmix=1.0).mixed(x, key)
        own = np.asarray(y == x)
        assert (own | np.asarray(y == x[::-1])).all()
        np.testing.assert_allclose(own.mean(), share, rtol=1e-5)
        rows, columns = (~own[0, :, :, 0]).any(1).sum(), (~own[0, :, :, 0]).any(0).sum()
        assert rows * columns == (~own[0]).sum()  # a rectangle
        shares.add(float(share))
    assert len(shares) > 3
    # the targets are mixed as the images are; measuring mixes nothing
    model = Flat(linear=Linear(inputs=6, outputs=4))
    params, objective = model.init(jax.random.key(0)), Classification(mixup=0.8)
    images = jax.random.normal(jax.random.key(1), (5, 3, 2, 1))
    batch = {"inputs": images, "targets": jnp.array([0, 3, 2, 1, 1]), "weights": jnp.ones(5)}
    _, report, _ = objective(model, params, batch, jax.random.key(2))
    y, share = objective.mixed(images, jax.random.split(jax.random.key(2))[0])
    log_p = np.asarray(jax.nn.log_softmax(model.apply(params, y)[0]), np.float64)
    right = np.eye(4)[np.asarray(batch["targets"])]
    mixed = float(share) * right + (1 - float(share)) * right[::-1]
    np.testing.assert_allclose(report["sums"]["loss"], -(mixed * log_p).sum(), rtol=1e-5)
    plain = Classification().measure(model, params, batch)
    np.testing.assert_array_equal(objective.measure(model, params, batch)["loss"], plain["loss"])


def damaged(folder: Path) -> Path:
    pictures(folder)
    file = folder / "bee" / "3.png"
    file.write_bytes(file.read_bytes()[:40])
    return file


def test_what_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    file = damaged(tmp_path / "damaged")
    with pytest.raises(ValueError, match=re.escape(f"data.path='{file}': is no readable image")):
        Images(path=str(tmp_path / "damaged"), **SMALL).load()
    file.write_text("<svg/>")
    with pytest.raises(ValueError, match="bee/3.png': is no readable image"):
        Images(path=str(tmp_path / "damaged"), **SMALL).load()
    Image.new("RGB", (5, 6)).save(file)
    with pytest.raises(ValueError, match="bee/3.png': is 5 x 6; need .* 4 x 6"):
        Images(path=str(tmp_path / "damaged"), **SMALL).load()
    Image.new("I;16", (4, 6)).save(file)
    with pytest.raises(ValueError, match="bee/3.png': has pixels of kind 'I;16'"):
        Images(path=str(tmp_path / "damaged"), **SMALL).load()
    shutil.rmtree(tmp_path / "damaged" / "bee")
    with pytest.raises(ValueError, match="2 class folders; need data.classes, 3"):
        Images(path=str(tmp_path / "damaged"), **SMALL).load()
    (tmp_path / "damaged" / "bee").mkdir()
    with pytest.raises(ValueError, match="bee': holds no image"):
        Images(path=str(tmp_path / "damaged"), **SMALL).load()


GOOD: dict[str, Any] = {"images": np.zeros((4, 6, 4, 3), np.uint8), "labels": np.arange(4) % 3}


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("images are float64", {"images": np.zeros((4, 6, 4, 3))}),
        ("images are 4 x 6 x 3; need data.height x width x channels, 6 x 4 x 3",
         {"images": np.zeros((4, 4, 6, 3), np.uint8)}),
        ("images are uint8 of shape", {"images": np.zeros((4, 6), np.uint8)}),
        ("images are uint8 of shape", {"images": np.zeros((0, 6, 4, 3), np.uint8)}),
        ("labels are float64", {"labels": np.zeros(4)}),
        ("labels are int64 of shape", {"labels": np.zeros(3, int)}),
        ("label 3 of image 2; need below 3", {"labels": np.array([0, 1, 3, 2])}),
        ("label -1 of image 0", {"labels": np.array([-1, 1, 0, 2])}),
        ("cannot be read", {"labels": np.array([{}], object)}),
        ("need the arrays images and labels", {"labels": None}),
    ],
)  # fmt: skip
def test_arrays_are_checked(message: str, changes: dict, tmp_path: Path) -> None:
    arrays = {name: x for name, x in (GOOD | changes).items() if x is not None}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Images(path=str(tmp_path / "a.npz"), **SMALL).load()
    assert str(tmp_path / "a.npz") in str(error.value) and "\n" not in str(error.value)


def test_other_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK\3\4 damaged")
    for path, message in (("a.npz", "cannot be read"), ("b.npz", "no such folder or .npz file")):
        with pytest.raises(ValueError, match=message):
            Images(path=str(tmp_path / path)).load()


@pytest.mark.parametrize(
    ("field", "value"),
    [("path", ""), ("height", 0), ("channels", 2), ("classes", 1), ("batch_size", 0),
     ("validation_fraction", 1.5), ("mean", (0.1, 0.2)), ("std", (0.0,)), ("std", ()),
     ("shift", -1), ("shift", 8)],
)  # fmt: skip
def test_impossible_data_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^data.{field}: "):
        Images(**{field: value})


@layer
class Flat(Layer):
    """Logits that are affine in the pixels, and a loss of its own."""

    linear: Linear

    def spec(self) -> Any:
        return self.linear.spec()

    def apply(self, params: Any, x: Any, ctx: Any = None) -> Any:
        return self.linear.apply(params, x.reshape(len(x), -1)), Aux({"own": jnp.float32(2)})


def test_classification_against_its_definition() -> None:
    random = np.random.default_rng(0)
    model = Flat(linear=Linear(inputs=6, outputs=4))
    params = model.init(jax.random.key(0))
    batch = {
        "inputs": random.normal(size=(5, 3, 2, 1)).astype(np.float32),
        "targets": np.array([0, 3, 2, 1, 1], np.int32),
        "weights": np.array([1, 1, 0, 1, 1], np.float32),
    }
    logits = batch["inputs"].reshape(5, 6) @ np.asarray(params["weight"], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    right = np.eye(4)[batch["targets"]]
    plain = -(batch["weights"] @ (right * log_p).sum(-1))
    smooth = -(batch["weights"] @ ((0.8 * right + 0.2 / 4) * log_p).sum(-1))
    objective = Classification(smoothing=0.2)
    loss, report, states = objective(model, params, batch)
    hits = batch["weights"] @ (logits.argmax(-1) == batch["targets"])
    expected = {"loss": plain, "tokens": 4, "accuracy": hits, "own": 2 * 4}
    assert report["sums"].keys() == expected.keys() and not states
    for name, value in expected.items():
        np.testing.assert_allclose(report["sums"][name], value, rtol=1e-5)
    np.testing.assert_allclose(loss, smooth + 2 * 4, rtol=1e-5)
    found = objective.summary([jax.device_get(objective.measure(model, params, batch))] * 2)
    assert found == pytest.approx({"loss": plain / 4, "accuracy": hits / 4}, rel=1e-5)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    digits = load_experiment("digits")
    with pytest.raises(ValueError, match="objective: Classification of Data; need classes"):
        replace(digits, data=Data())
    with pytest.raises(ValueError, match="objective: NextToken of Images; need text"):
        replace(load_experiment("tiny"), data=Images())
    with pytest.raises(ValueError, match="objective.smoothing: 1"):
        Classification(smoothing=1)
    with pytest.raises(ValueError, match="objective.mixup: -1"):
        Classification(mixup=-1)
    run = {"run_dir": str(tmp_path / "run"), "steps": 1}
    with pytest.raises(ValueError, match="model: ViT reads no text; need a language model"):
        train(replace(load_experiment("tiny"), model=digits.model, **run), "tiny")
    with pytest.raises(ValueError, match="model: Decoder reads no images of 8 x 8 x 1: "):
        train(replace(digits, model=llama_tiny(), **run), "digits")
    with pytest.raises(ValueError, match="model: ViT reads no images of 8 x 8 x 1: .*need"):
        train(replace(digits, model=small_vit(28, 4, 16, 1), **run), "digits")
    many = Images(path=str(tmp_path / "a.npz"), classes=12)
    np.savez(tmp_path / "a.npz", images=np.zeros((9, 8, 8), np.uint8), labels=np.arange(9))
    with pytest.raises(ValueError, match=r"gives \(10,\) logits .* need data.classes, 12"):
        train(replace(digits, data=many, **run), "digits")
    assert not (tmp_path / "run").exists()


def tiny(run_dir: Path, **changes: Any) -> Experiment:
    fields = {
        "model": small_vit(8, 4, 32, 1),
        "data": Images(batch_size=16),
        "evaluation": Evaluation(every=10, batches=0),
        "run_dir": str(run_dir),
        "steps": 20,
        "log_every": 5,
    }
    return replace(load_experiment("digits"), **(fields | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps."""
    checkpoints = replace(load_experiment("digits").checkpoints, every=10)
    return train(tiny(tmp_path_factory.mktemp("run"), checkpoints=checkpoints), "digits")


def test_a_run_shows_its_accuracy(finished: Path) -> None:
    lines = read_metrics(finished)
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert all({"loss", "accuracy", "images_per_second"} <= line.keys() for line in lines)
    measured = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in measured] == [10, 20]
    assert all("validation_accuracy" in line for line in measured)
    assert lines[-1]["compilations"] == 1 and "tokens" not in lines[-1]
    assert (finished / "curves.png").is_file() and not (finished / "samples.txt").exists()


def test_a_run_continues_bit_exactly(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    checkpoints = replace(load_experiment("digits").checkpoints, every=10)
    train(tiny(tmp_path / "run", checkpoints=checkpoints), "digits")
    one, other = (load_run(r)[1] for r in (finished, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (one, other)))


def test_a_run_that_draws_continues_bit_exactly(tmp_path: Path) -> None:
    """Augmentation, mixing and stochastic depth follow from seed and step."""
    checkpoints = replace(load_experiment("digits").checkpoints, every=2)
    run = tiny(
        tmp_path / "run",
        model=replace(small_vit(8, 4, 32, 2), drop_path=0.3),
        data=Images(batch_size=16, flip=True, shift=1),
        objective=Classification(smoothing=0.1, mixup=0.8, cutmix=1.0),
        checkpoints=checkpoints,
        steps=4,
    )
    first = jax.device_get(load_run(train(run, "digits"))[1])
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    jax.tree.map(np.testing.assert_array_equal, first, load_run(train(run, "digits"))[1])


def test_devices_do_not_change_the_losses(finished: Path, tmp_path: Path) -> None:
    mesh = Mesh(data=2, fsdp=2, tensor=2)
    run_dir = train(tiny(tmp_path / "run", mesh=mesh, accumulate=2), "digits")
    for one, other in zip(read_metrics(finished), read_metrics(run_dir), strict=True):
        for name in {"loss", "accuracy", "validation_loss"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-3), name


def test_a_run_begins_from_another(finished: Path, tmp_path: Path) -> None:
    start = {"initial": str(finished), "only": "head/", "steps": 2}
    run_dir = train(tiny(tmp_path / "run", **start), "digits")
    one, other = (load_run(r)[1] for r in (finished, run_dir))
    np.testing.assert_array_equal(one["patches"]["weight"], other["patches"]["weight"])
    assert (np.asarray(one["head"]["weight"]) != np.asarray(other["head"]["weight"])).any()


def said(capsys: pytest.CaptureFixture, *argv: str) -> tuple[int, str, str]:
    status = main(argv)
    heard = capsys.readouterr()
    return status, heard.out, heard.err


def test_evaluation_says_what_the_run_did(finished: Path, capsys: pytest.CaptureFixture) -> None:
    status, out, _ = said(capsys, "eval", str(finished), "--json")
    last, found = read_metrics(finished)[-1], json.loads(out)
    assert status == 0 and found.keys() == {"loss", "accuracy"}
    assert found["loss"] == pytest.approx(last["validation_loss"], rel=1e-5)
    assert found["accuracy"] == pytest.approx(last["validation_accuracy"], rel=1e-6)
    assert "accuracy" in said(capsys, "eval", str(finished), "--steps", "1")[1]


@pytest.mark.parametrize(
    "argv",
    [("generate", "RUN", "--prompt", "a"), ("eval", "RUN", "--sparsity"),
     ("eval", "RUN", "--cache", "full"), ("export", "RUN", "--out", "NEW"),
     ("convert", "RUN", "--group-size", "2", "--latent", "2")],
)  # fmt: skip
def test_what_is_for_text_says_so(
    argv: tuple[str, ...], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    names = {"RUN": str(finished), "NEW": str(tmp_path / "new")}
    status, _, err = said(capsys, *(names.get(arg, arg) for arg in argv))
    assert status == 2 and err.endswith("model: ViT; need a language model for this\n")
    assert err.count("\n") == 1 and not (tmp_path / "new").exists()


def test_runs_are_merged(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = str(tmp_path / "merged")
    assert said(capsys, "merge", "linear", str(finished), str(finished), "--out", out)[0] == 0
    assert json.loads(said(capsys, "eval", out, "--json")[1])["accuracy"] > 0


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, out, _ = said(capsys, "show", "digits", "--json")
    assert status == 0 and json.loads(out)["config"]["data"]["class"].endswith("Images")
    assert "forward FLOPs per image" in said(capsys, "show", "deit_tiny")[1]
    assert "digits" in said(capsys, "list")[1]
    for argv, message in (
        (("show", "deit_tiny", "--length", "8"), "is no language model"),
        (("train", "digits", "--data.height", "9"), "model: ViT reads no images|images are 8 x 8"),
        (("train", "digits", "--data.path", str(tmp_path / "none")), "no such folder"),
        (("train", "digits", "--data.channels", "2"), "data.channels: 2"),
        (("train", "digits", "--objective.chunks", "2"), "chunks"),
        (("plan", "deit_tiny", "--topology", "v5e:2x2"), "is no language model"),
    ):
        status, _, err = said(
            capsys, *argv, *(("--run-dir", str(tmp_path / "r")) * ("train" in argv))
        )
        assert status == 2 and re.search(message, err) and err.count("\n") == 1, err
    assert not (tmp_path / "r").exists()
