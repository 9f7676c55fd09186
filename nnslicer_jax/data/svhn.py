"""SVHN, street view house numbers (Netzer et al., 2011), cropped: 73,257 and 26,032 of 32x32."""

from pathlib import Path

import numpy as np
import scipy.io

from nnslicer_jax.data import files
from nnslicer_jax.data.dataset import Dataset, check


def load(data_dir: str | None = None, *, download: bool = True) -> Dataset:
    """Reads ``train_32x32.mat`` and ``test_32x32.mat``; images [N, 32, 32, 3] uint8, RGB.

    The files stand in a data folder or in its ``svhn``. Digit 0, stored as 10, becomes class 0.
    """
    names = ("train_32x32.mat", "test_32x32.mat")
    options = [(f"svhn/{name}", name) for name in names]
    train, test = files.locate("svhn", options, data_dir, download=download)
    return check(Dataset("svhn", *_read(train), *_read(test), tuple("0123456789")))


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        content = scipy.io.loadmat(path, variable_names=("X", "y"))
        pixels, labels = content["X"], content["y"]
    except Exception as error:  # A damaged file raises almost any type of error.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a MATLAB file with X and y ({reason})") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3):
        raise ValueError(
            f"{path}: expected X of shape (32, 32, 3, N) in unsigned bytes, "
            f"got {pixels.shape} in {pixels.dtype}"
        )
    if labels.size != pixels.shape[3] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{path}: expected y of {pixels.shape[3]} whole numbers, got {labels.shape}"
        )
    labels = labels.reshape(-1).astype(np.int32)
    return np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)), np.where(labels == 10, 0, labels)
