"""The IDX format of MNIST: a big-endian header, then the values row by row."""

import gzip
import zlib
from pathlib import Path

import numpy as np

from nnslicer_jax.data import files
from nnslicer_jax.data.dataset import Dataset, check

_UNSIGNED_BYTE = 0x08


def read(path: Path, ndim: int) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, raw or gzipped.

    Args:
        path: the file; gzip is told by its first bytes.
        ndim: the number of axes that it must have.

    Returns:
        uint8 array with ``ndim`` axes.

    Raises:
        ValueError: not such a file, or one that is cut off or too long.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({error})") from None
    header = 4 + 4 * ndim
    if len(content) < header or content[:4] != bytes((0, 0, _UNSIGNED_BYTE, ndim)):
        raise ValueError(
            f"{path}: not an IDX file of unsigned bytes with {ndim} axes "
            f"(it begins with {content[:4].hex() or 'nothing'})"
        )
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", ndim, 4))
    size = int(np.prod([int(n) for n in shape], dtype=object))
    if len(content) - header != size:
        raise ValueError(
            f"{path}: the header says {size} values of shape {shape}, "
            f"the file holds {len(content) - header}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def load(
    name: str, folder: str, classes: tuple[str, ...], data_dir: str | None, download: bool
) -> Dataset:
    """Reads the four files of an MNIST-like set from ``folder`` below a data folder."""
    stems = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )
    options = [(f"{folder}/{stem}", f"{folder}/{stem}.gz") for stem in stems]
    paths = files.locate(name, options, data_dir, download=download)
    train_images, test_images = (read(paths[i], 3)[..., np.newaxis] for i in (0, 2))
    train_labels, test_labels = (read(paths[i], 1).astype(np.int32) for i in (1, 3))
    return check(Dataset(name, train_images, train_labels, test_images, test_labels, classes))
