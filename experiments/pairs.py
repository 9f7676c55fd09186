"""Pairs of an original model and its compressed twin, by name.

The three published pairs (Tian et al., TOSEM 2023, table 4, the first rows) are read from their
files: Keras originals and 8-bit TensorFlow Lite twins.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import difftest
from difftest.load import Normalise, load_model


class Row(NamedTuple):
    """Of the paper's table 4: network, compression."""

    network: str
    compression: str


class Published(NamedTuple):
    """A published pair.

    Attributes:
      original: File of the Keras model.
      compressed: File of its twin.
      preprocess: Of both; None: x / 255.
      dataset: What it was trained on.
      row: Of table 4.
    """

    original: str
    compressed: str
    preprocess: Callable | None
    dataset: str
    row: Row


_CIFAR = Normalise(mean=(125.307, 122.95, 113.865), std=(62.9932, 62.0887, 66.7048))
PUBLISHED = {
    "lenet1": Published(
        "lenet1.h5", "lenet1-quan.lite", None, "mnist", Row("LeNet-1", "Quantization-8-bit")
    ),
    "lenet5": Published(
        "lenet5.h5", "lenet5-quan.lite", None, "mnist", Row("LeNet-5", "Quantization-8-bit")
    ),
    "resnet20": Published(
        "resnet.h5", "resnet-quan.lite", _CIFAR, "cifar10", Row("ResNet-20", "Quantization-8-bit")
    ),
}
NAMES = tuple(PUBLISHED)


def pair(
    name: str, data_dir: str | None = None, pairs_dir: str | None = None
) -> tuple[difftest.ModelPair, str, Row]:
    """Loads a pair.

    Args:
      name: Of `NAMES`.
      data_dir: Folder searched first for data sets.
      pairs_dir: Folder of the published pairs' files.

    Returns:
      The pair, the name of its data set, and its row of table 4.

    Raises:
      ValueError: For an unknown name, or a published pair without its folder.
      FileNotFoundError: For files that are not there.
    """
    if name not in NAMES:
        raise ValueError(f"pair: {name!r} is unknown; known are {', '.join(NAMES)}")
    chosen = PUBLISHED[name]
    if pairs_dir is None:
        raise ValueError(
            f"{name} is a published pair: give the folder of {chosen.original} and "
            f"{chosen.compressed} as --pairs_dir"
        )
    models = [
        load_model(Path(pairs_dir) / file, chosen.preprocess)
        for file in (chosen.original, chosen.compressed)
    ]
    return difftest.ModelPair(*models), chosen.dataset, chosen.row
