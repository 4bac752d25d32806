"""The image sources: the calibration of CURVES, the digits, and what MNIST says when its files are not there."""

import dataclasses
import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from curvlib.experiments import CharacterText, ExperimentError, generate_curves
from curvlib.experiments.images import MNIST, Curves, Digits, Images
from curvlib.experiments.problems import PROBLEMS
from curvlib.experiments.tasks import Classification


def curves(count, seed=0):
    return generate_curves(count, torch.Generator().manual_seed(seed))


def reference_curve(control):
    """One image of the recipe, one ink drop at a time."""
    image = np.zeros((28, 28))
    for t in np.linspace(0, 1, 60):
        y, x = (1 - t) ** 2 * control[0] + 2 * t * (1 - t) * control[1] + t**2 * control[2]
        row, column = int(y), int(x)
        for i, share in ((row, 1 - (y - row)), (row + 1, y - row)):
            for j, other in ((column, 1 - (x - column)), (column + 1, x - column)):
                image[i, j] += 0.6 * share * other
    padded = np.pad(image, 1)
    blurred = sum(
        weight * padded[1 + i : 29 + i, 1 + j : 29 + j]
        for i in (-1, 0, 1)
        for j in (-1, 0, 1)
        for weight in [0.15 ** (abs(i) + abs(j))]
    )
    return np.minimum(blurred, 1).ravel()


def test_curves_follow_the_recipe_pixel_by_pixel():
    control = 5.4 + 16.2 * torch.rand(5, 3, 2, generator=torch.Generator().manual_seed(3))
    expected = np.stack([reference_curve(c) for c in control.double().numpy()])
    np.testing.assert_allclose(curves(5, seed=3).numpy(), expected, atol=1e-4)


def test_curves_have_the_calibrated_error_of_a_principal_component_analysis():
    train, test = curves(4000).double(), curves(2000, seed=1).double()
    mean = train.mean(0)
    _, vectors = torch.linalg.eigh((train - mean).T @ (train - mean))
    basis = vectors[:, -18:]
    rest = (test - mean) - (test - mean) @ basis @ basis.T
    # 5.86 on 20,000 images; the mean over 2000 test images has a standard error of about 0.05.
    assert rest.square().sum(1).mean().item() == pytest.approx(5.86, abs=0.2)


def test_curves_are_pixels_and_depend_on_the_seed_alone():
    images = curves(50)
    assert images.shape == (50, 784)
    assert images.min() == 0
    assert images.max() == 1
    assert torch.equal(images, curves(50))
    assert not torch.equal(images, curves(50, seed=1))
    assert generate_curves(0, torch.Generator()).shape == (0, 784)


def test_curves_source_has_the_sizes_that_it_was_given_and_separate_test_images():
    source = Curves(train_images=30, test_images=20)
    train, test = source.load(None)
    assert (len(train.pixels), len(test.pixels)) == source.sizes == (30, 20)
    assert not torch.equal(train.pixels[:20], test.pixels)
    with pytest.raises(ExperimentError, match="test_images must be at least 1, got 0"):
        Curves(test_images=0)
    with pytest.raises(ExperimentError, match="needs labelled images"):
        Classification().targets(train)


def test_digits_are_split_without_overlap_and_with_every_class_on_both_sides():
    train, test = Digits().load(None)
    assert (len(train.pixels), len(test.pixels)) == Digits().sizes
    assert train.pixels.min() == 0
    assert train.pixels.max() == 1
    together = torch.cat([train.pixels, test.pixels])
    assert len(torch.unique(together, dim=0)) == len(together)
    assert torch.equal(train.labels.unique(), torch.arange(10))
    assert torch.equal(test.labels.unique(), torch.arange(10))


def test_mnist_says_what_is_missing(tmp_path):
    with pytest.raises(ExperimentError, match="--data DIR or set the environment variable CURVLIB_DATA"):
        MNIST().load(None)
    with pytest.raises(ExperimentError, match=r"nowhere does not exist.*--data"):
        MNIST().load(tmp_path / "nowhere")
    with pytest.raises(ExperimentError, match=r"No train-images-idx3-ubyte or train-images-idx3-ubyte\.gz"):
        MNIST().load(tmp_path)
    small = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 28, 28) + bytes(2 * 784)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(small))
    with pytest.raises(ExperimentError, match=r"shape \(2, 28, 28\), MNIST needs uint8 of shape \(60000, 28, 28\)"):
        MNIST().load(tmp_path)


def test_mnist_has_its_published_moments():
    folder = os.environ.get("CURVLIB_DATA")
    if folder is None or not list(Path(folder).rglob("train-images-idx3-ubyte*")):
        pytest.skip("needs MNIST: set CURVLIB_DATA to the folder of its idx files")
    train, test = MNIST().load(Path(folder))
    assert (len(train.pixels), len(test.labels)) == (60_000, 10_000)
    assert 255 * train.pixels.double().mean().item() == pytest.approx(33.3184, abs=1e-3)
    assert 255 * train.pixels.double().std().item() == pytest.approx(78.567, abs=1e-2)
    assert torch.equal(train.labels[:5], torch.tensor([5, 0, 4, 1, 9]))


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_every_problem_is_what_its_listing_says(name, tmp_path):
    problem = PROBLEMS.get(name)
    network, source = problem.network, problem.source
    if isinstance(source, MNIST):
        train = Images(pixels=torch.rand(20, source.side**2), labels=torch.arange(20) % 10)
    else:
        if isinstance(source, CharacterText):
            (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog " * 20)
        small = {"train_images", "test_images", "train_sequences", "test_sequences"}
        sizes = {field.name: 20 for field in dataclasses.fields(source) if field.name in small}
        train, _ = dataclasses.replace(source, **sizes).load(tmp_path / "text")
    if train.symbols is not None:
        assert network.parameters is None
        network = network.for_symbols(train.symbols)
    model = network.build()
    assert sum(p.numel() for p in model.parameters()) == network.parameters
    targets, loss = problem.task.targets(train), problem.task.loss(train)
    outputs = model(train.inputs)
    assert loss(outputs, targets).isfinite()
    assert problem.task.metric(outputs, targets).isfinite()
