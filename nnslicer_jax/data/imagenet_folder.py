"""Images in class folders, the layout of ImageNet: ``train/<class>/*.JPEG``, ``val/<class>/...``.

Images are decoded when they are asked for, so a set may be larger than the memory.
"""

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nnslicer_jax.data import files
from nnslicer_jax.data.dataset import Dataset, check

_SUFFIXES = frozenset((".jpeg", ".jpg", ".png", ".bmp", ".webp"))


class ImageFiles:
    """Image files that are indexed like an array [N, size, size, 3] uint8.

    An image is converted to RGB, resized so that its shorter side measures ``resize`` pixels, and
    cropped to the central ``size`` x ``size``.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, paths: Sequence[Path], size: int, resize: int):
        self.paths = tuple(paths)
        self.size = size
        self.resize = resize

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, size, size, 3], the shape of all images as one array."""
        return (len(self.paths), self.size, self.size, 3)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Decodes one image (a whole number) or several (a slice, or an array of indices)."""
        if isinstance(index, slice):
            return self._decode(self.paths[index])
        if np.ndim(index) == 0:
            return self._decode([self.paths[operator.index(index)]])[0]
        chosen = np.arange(len(self.paths))[np.asarray(index)]
        return self._decode([self.paths[i] for i in chosen])

    def _decode(self, paths: Sequence[Path]) -> np.ndarray:
        out = np.empty((len(paths), self.size, self.size, 3), np.uint8)
        for row, path in zip(out, paths, strict=True):
            try:
                with Image.open(path) as image:
                    row[...] = self._crop(image.convert("RGB"))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"{path}: not a readable image ({reason})") from None
        return out

    def _crop(self, image: Image.Image) -> np.ndarray:
        scale = self.resize / min(image.size)
        width, height = (max(self.size, round(length * scale)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))


def load(
    data_dir: str | None = None,
    *,
    download: bool = True,
    size: int = 224,
    resize: int | None = None,
    classes: Sequence[str] | None = None,
) -> Dataset:
    """Lists the images of ``train`` and ``val`` in ``imagenet``, or in the data folder itself.

    Args:
        data_dir: searched first, as for every data set.
        download: not used; ImageNet has to be asked for at image-net.org.
        size: height and width of the images given.
        resize: length that the shorter side is resized to first; 256 / 224 of size if None.
        classes: folder names in label order, for a set that holds only some of them; if None,
            the folders that are there, sorted.

    Returns:
        Images of type ``ImageFiles``; a missing ``train`` or ``val`` has no images.

    Raises:
        FileNotFoundError: no folder holds ``train`` or ``val``.
        ValueError: sizes that do not fit, or a folder that is not among classes.
    """
    del download
    resize = round(size * 256 / 224) if resize is None else resize
    if not 0 < size <= resize:
        raise ValueError(f"size: expected 1 to resize ({resize}), got {size}")
    folders = files.search_folders(data_dir)
    roots = [root for folder in folders for root in (folder / "imagenet", folder)]
    root = next((r for r in roots if (r / "train").is_dir() or (r / "val").is_dir()), None)
    if root is None:
        searched = ", ".join(str(folder) for folder in folders)
        raise FileNotFoundError(
            f"imagenet_folder: not found in {searched}; put imagenet/train/<class>/*.JPEG and "
            "imagenet/val/<class>/*.JPEG into one of them"
        )
    present = sorted(
        {path.name for split in ("train", "val") for path in (root / split).glob("*/")}
    )
    order = tuple(present if classes is None else classes)
    unknown = sorted(set(present) - set(order))
    if unknown:
        raise ValueError(f"{root}: the folder {unknown[0]} is not among the {len(order)} classes")
    (train_paths, train_labels), (test_paths, test_labels) = (
        _listing(root / split, order) for split in ("train", "val")
    )
    if not train_paths and not test_paths:
        raise FileNotFoundError(f"{root}: train and val hold no images in class folders")
    return check(
        Dataset(
            "imagenet_folder",
            ImageFiles(train_paths, size, resize),
            train_labels,
            ImageFiles(test_paths, size, resize),
            test_labels,
            order,
        )
    )


def _listing(folder: Path, classes: Sequence[str]) -> tuple[list[Path], np.ndarray]:
    paths, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted((folder / name).glob("*")):
            if path.suffix.lower() in _SUFFIXES:
                paths.append(path)
                labels.append(label)
    return paths, np.asarray(labels, np.int32)
