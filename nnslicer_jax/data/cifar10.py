"""CIFAR-10 (Krizhevsky, 2009) in its Python layout: 50,000 and 10,000 images of 32x32."""

from pathlib import Path

import numpy as np

from nnslicer_jax.data import files, restricted_pickle
from nnslicer_jax.data.dataset import Dataset, check

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_FOLDER = "cifar-10-batches-py"
_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def load(data_dir: str | None = None, *, download: bool = True) -> Dataset:
    """Reads ``cifar-10-batches-py``; images [N, 32, 32, 3] uint8, RGB.

    A ``NOTE.txt`` beside the batches becomes the note of the data set.
    """
    options = [(f"{_FOLDER}/{name}",) for name in _BATCHES]
    paths = files.locate("cifar10", options, data_dir, download=download)
    batches = [_batch(path) for path in paths]
    note = paths[0].with_name("NOTE.txt")
    return check(
        Dataset(
            "cifar10",
            np.concatenate([images for images, _ in batches[:-1]]),
            np.concatenate([labels for _, labels in batches[:-1]]),
            *batches[-1],
            CLASSES,
            " ".join(note.read_text(errors="replace").split()) if note.is_file() else "",
        )
    )


def _batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    batch = restricted_pickle.load(path)
    pixels = batch.get(b"data") if isinstance(batch, dict) else None
    labels = batch.get(b"labels") if isinstance(batch, dict) else None
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2:
        raise ValueError(f"{path}: expected 'data', an array of N x 3072 unsigned bytes")
    if pixels.shape[1] != 3072:
        raise ValueError(f"{path}: expected 3072 bytes an image, got {pixels.shape[1]}")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        raise ValueError(f"{path}: expected 'labels', a list of {len(pixels)} class numbers")
    if not all(isinstance(label, int) for label in labels):
        raise ValueError(f"{path}: 'labels' holds something other than whole numbers")
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.asarray(labels, np.int32)
