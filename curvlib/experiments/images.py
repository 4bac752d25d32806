"""Sources of images: where a problem's data come from. A new source is one subclass of :class:`ImageSource`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from curvlib.experiments.curves import generate_curves
from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.idx import read_idx
from curvlib.experiments.sources import Source

# The split and the generated images belong to the problem: they must not move with the seed of a run.
_DATA_SEED = 20150319


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images with pixels in [0, 1], and their labels where there are any.

    Args:
        pixels: one image a row.
        labels: class numbers, or None.
    """

    pixels: Tensor  # shape: (N, pixels)
    labels: Tensor | None = None  # shape: (N,)

    @property
    def inputs(self) -> Tensor:
        """The pixels, shape (N, pixels)."""
        return self.pixels

    @property
    def symbols(self) -> None:
        """Images have no alphabet."""

    @property
    def fingerprint(self) -> None:
        """The images of a source are always the same."""


class ImageSource(Source[Images]):
    """A set of training images and a set of test images."""

    examples = "images"


@dataclass(frozen=True, kw_only=True)
class Digits(ImageSource):
    """The 1797 handwritten digits of 8 x 8 pixels that ship inside scikit-learn, shuffled once and split."""

    @property
    def sizes(self) -> tuple[int, int]:
        """1500 and 297."""
        return 1500, 297

    @property
    def origin(self) -> str:
        """Scikit-learn."""
        return "scikit-learn"

    def load(self, path: Path | None) -> tuple[Images, Images]:
        """Return the two parts of the digits, pixels divided by their highest value 16."""
        del path
        return _digits(self.sizes[0])


@functools.lru_cache(maxsize=1)
def _digits(train: int) -> tuple[Images, Images]:
    raw = load_digits()
    order = torch.randperm(len(raw.data), generator=torch.Generator().manual_seed(_DATA_SEED))
    pixels = torch.tensor(raw.data, dtype=torch.float32)[order] / 16.0
    labels = torch.tensor(raw.target)[order].long()
    return (
        Images(pixels=pixels[:train], labels=labels[:train]),
        Images(pixels=pixels[train:], labels=labels[train:]),
    )


@dataclass(frozen=True, kw_only=True)
class Curves(ImageSource):
    """Generated 28 x 28 images of curves, see :func:`curvlib.experiments.curves.generate_curves`.

    Args:
        train_images: number of training images.
        test_images: number of test images.
    """

    train_images: int = 20_000
    test_images: int = 10_000

    def __post_init__(self) -> None:
        for name, value in (("train_images", self.train_images), ("test_images", self.test_images)):
            if value < 1:
                raise ExperimentError(f"{name} must be at least 1, got {value}.")

    @property
    def sizes(self) -> tuple[int, int]:
        """As given."""
        return self.train_images, self.test_images

    @property
    def origin(self) -> str:
        """Generated."""
        return "generated"

    def load(self, path: Path | None) -> tuple[Images, Images]:
        """Return generated images, the same ones in every run; they are kept in memory only."""
        del path
        return _curves(self.train_images, self.test_images)


@functools.lru_cache(maxsize=1)
def _curves(train: int, test: int) -> tuple[Images, Images]:
    generator = torch.Generator().manual_seed(_DATA_SEED)
    return Images(pixels=generate_curves(train, generator)), Images(pixels=generate_curves(test, generator))


@dataclass(frozen=True, kw_only=True)
class MNIST(ImageSource):
    """The handwritten digits of 28 x 28 pixels of LeCun et al. (1998), read from their original idx files."""

    reads_files = True
    side: ClassVar[int] = 28

    @property
    def sizes(self) -> tuple[int, int]:
        """60000 and 10000."""
        return 60_000, 10_000

    @property
    def origin(self) -> str:
        """Idx files."""
        return "idx files in --data"

    def load(self, path: Path | None) -> tuple[Images, Images]:
        """Return the two parts of MNIST, pixels divided by 255."""
        if path is None:
            raise ExperimentError(
                "MNIST needs the folder that holds its idx files, and none was given: "
                "use --data DIR or set the environment variable CURVLIB_DATA."
            )
        if not path.is_dir():
            raise ExperimentError(f"The data folder {path} does not exist or is no folder: check --data.")
        train, test = self.sizes
        return _mnist_part(path, "train", train), _mnist_part(path, "t10k", test)


@dataclass(frozen=True, kw_only=True)
class SmallMNIST(MNIST):
    """MNIST at 16 x 16 pixels: two rows and columns of zeros on every side, then the mean of every 2 x 2 pixels.

    Martens and Grosse (2015) draw the Fisher matrix of a classifier of such images; how they made them smaller they do
    not say.
    """

    side: ClassVar[int] = 16

    def load(self, path: Path | None) -> tuple[Images, Images]:
        """Return the two parts of MNIST, halved."""
        train, test = super().load(path)
        return _halved(train), _halved(test)


def _halved(images: Images) -> Images:
    padded = functional.pad(images.pixels.view(-1, 1, 28, 28), (2, 2, 2, 2))
    return Images(pixels=functional.avg_pool2d(padded, 2).flatten(1), labels=images.labels)


def _mnist_part(folder: Path, part: str, count: int) -> Images:
    pixels = _mnist_array(folder, f"{part}-images-idx3-ubyte", (count, 28, 28))
    labels = _mnist_array(folder, f"{part}-labels-idx1-ubyte", (count,))
    return Images(
        pixels=torch.from_numpy(pixels).view(count, -1).to(torch.float32) / 255.0,
        labels=torch.from_numpy(labels).long(),
    )


def _mnist_array(folder: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    # CURVLIB_DATA may name the folder above that of the data set.
    places = [folder / name, folder / f"{name}.gz", folder / "mnist" / name, folder / "mnist" / f"{name}.gz"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ExperimentError(f"No {name} or {name}.gz in {folder} (nor in its folder mnist): check --data.")
    array = read_idx(path)
    if array.shape != shape or array.dtype != np.uint8:
        raise ExperimentError(
            f"{path} holds {array.dtype.name} of shape {array.shape}, MNIST needs uint8 of shape {shape}."
        )
    return array
