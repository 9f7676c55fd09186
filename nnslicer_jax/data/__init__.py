"""Data sets, one file each: from disk in their standard layouts, or embedded."""

from collections.abc import Callable
from typing import Any

from nnslicer_jax.data import cifar10, digits, fashion_mnist, imagenet_folder, mnist, svhn
from nnslicer_jax.data.dataset import Dataset, to_float

__all__ = ["DATASETS", "Dataset", "load", "to_float"]

DATASETS: dict[str, Callable[..., Dataset]] = {
    "cifar10": cifar10.load,
    "digits": digits.load,
    "fashion_mnist": fashion_mnist.load,
    "imagenet_folder": imagenet_folder.load,
    "mnist": mnist.load,
    "svhn": svhn.load,
}


def load(
    name: str, data_dir: str | None = None, *, download: bool = True, **options: Any
) -> Dataset:
    """Loads a data set by name.

    Args:
        name: one of ``DATASETS``.
        data_dir: folder searched first; then $NNSLICER_DATA, then the user's cache.
        download: fetch a set that is nowhere, into data_dir or else the user's cache.
        **options: further options of that data set's loader.

    Raises:
        ValueError: unknown name, or files that are damaged.
        FileNotFoundError: the set is nowhere and cannot be downloaded.
    """
    if name not in DATASETS:
        raise ValueError(f"data: {name!r} is unknown; known are {', '.join(sorted(DATASETS))}")
    return DATASETS[name](data_dir, download=download, **options)
