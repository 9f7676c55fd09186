"""A labelled image data set in memory, or read on demand."""

from typing import Any, NamedTuple

import numpy as np


class Dataset(NamedTuple):
    """Training and test images with their labels.

    Attributes:
        name: the name ``data.load`` knows it by.
        train_images: [N, H, W, C] uint8, 0..255; an array, or a sequence read on demand that is
            indexed like one.
        train_labels: [N] int32, 0..len(classes) - 1.
        test_images: as train_images.
        test_labels: as train_labels.
        classes: the class names in label order.
        note: what sets these files apart from the official ones; empty if nothing is known to.
    """

    name: str
    train_images: Any
    train_labels: np.ndarray
    test_images: Any
    test_labels: np.ndarray
    classes: tuple[str, ...]
    note: str = ""


def to_float(images: np.ndarray) -> np.ndarray:
    """Turns uint8 pixels 0..255 into float32 in [0, 1] of the same shape.

    Raises:
        TypeError: the images are not uint8.
    """
    if images.dtype != np.uint8:
        raise TypeError(f"images: expected uint8 pixels 0..255, got {images.dtype}")
    return images.astype(np.float32) / np.float32(255)


def check(dataset: Dataset) -> Dataset:
    """Returns the data set, or raises ValueError if images, labels and classes do not fit."""
    for split, images, labels in (
        ("train", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),
    ):
        if len(images) != len(labels):
            raise ValueError(
                f"{dataset.name}: {len(images)} {split} images but {len(labels)} {split} labels"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(dataset.classes):
            raise ValueError(
                f"{dataset.name}: {split} labels run from {labels.min()} to {labels.max()}, "
                f"expected 0 to {len(dataset.classes) - 1}"
            )
    return dataset
