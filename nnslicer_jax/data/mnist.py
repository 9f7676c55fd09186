"""MNIST handwritten digits (LeCun, Cortes, Burges): 60,000 and 10,000 images of 28x28."""

from nnslicer_jax.data import idx
from nnslicer_jax.data.dataset import Dataset


def load(data_dir: str | None = None, *, download: bool = True) -> Dataset:
    """Reads ``MNIST/raw/*-ubyte`` or ``*-ubyte.gz``; images [N, 28, 28, 1] uint8."""
    return idx.load("mnist", "MNIST/raw", tuple("0123456789"), data_dir, download)
