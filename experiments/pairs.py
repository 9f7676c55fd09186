"""Pairs of an original model and its compressed twin, by name.

The three published pairs (Tian et al., TOSEM 2023, table 4, the first rows) are read from their
files: Keras originals and 8-bit TensorFlow Lite twins. Fifteen more are networks of this
repository and the twins that ``experiments.compress`` makes of them; normalisation is part of these
networks (MNIST: mean 0.1307, deviation 0.3081; CIFAR-10: 0.5 and 0.5). The same networks
compressed in the other ways that ``experiments.compress`` knows stand in no table of the paper.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import difftest
from difftest.load import Normalise, load_model
from experiments import compress
from nnslicer_jax import data, zoo
from nnslicer_jax.checkpoint import digest


class Row(NamedTuple):
    """Network and compression, as in the paper's table 4 where it has them."""

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


class Made(NamedTuple):
    """A pair of this repository.

    Attributes:
      network: Its name in the zoo.
      how: Of `compress.HOW`.
      dataset: What it was trained on.
      row: Of table 4.
    """

    network: str
    how: str
    dataset: str
    row: Row


_WORDS = {"pruned": "Prune", "quantized": "Quantization", "distilled": "Knowledge Distillation"}
_OTHER_WORDS = {
    "structured": "Structured Prune",
    "hydra": "HYDRA",
    "sliced": "Slicing",
    "onnx": "Quantization by ONNX Runtime",
}
_NETWORKS = {
    "lenet4_mnist": ("lenet4_mnist", "mnist", "LeNet-4"),
    "lenet5_mnist": ("lenet5_mnist", "mnist", "LeNet-5"),
    "cnn_mnist": ("mnist_cnn", "mnist", "CNN"),
    "plainnet20_cifar10": ("plainnet20_cifar10", "cifar10", "PlainNet-20"),
    "resnet20_cifar10": ("resnet20_cifar10", "cifar10", "ResNet-20"),
    "vgg16_cifar10": ("vgg16_cifar10", "cifar10", "VGG-16"),
}
MADE = {
    f"{name}_{how}": Made(network, how, dataset, Row(title, _WORDS[how]))
    for name, (network, dataset, title) in _NETWORKS.items()
    for how in (("pruned", "quantized") if dataset == "mnist" else _WORDS)
}
# Beyond table 4.
OTHERS = {
    f"{name}_{how}": Made(network, how, dataset, Row(title, {**_WORDS, **_OTHER_WORDS}[how]))
    for name, (network, dataset, title) in _NETWORKS.items()
    for how in compress.HOW
    if f"{name}_{how}" not in MADE
}
NAMES = (*PUBLISHED, *MADE, *OTHERS)


class Images(NamedTuple):
    """Test images, and where they come from.

    Attributes:
      pixels: uint8 `[N, H, W, C]`.
      labels: int `[N]`.
      words: What they are.
      training: uint8 `[M, H, W, C]`, indexed like an array, the training images; None where the
        source has none.
    """

    pixels: np.ndarray
    labels: np.ndarray
    words: str
    training: Any = None


def pair(
    name: str, data_dir: str | None = None, pairs_dir: str | None = None
) -> tuple[difftest.ModelPair, str, Row]:
    """Loads a pair.

    Args:
      name: Of `NAMES`.
      data_dir: Folder searched first for data sets.
      pairs_dir: Folder of the published pairs' files.

    Returns:
      The pair, the name of its data set, and its network and compression.

    Raises:
      ValueError: For an unknown name, or a published pair without its folder.
      FileNotFoundError: For files that are not there; says the command that makes them.
    """
    if name not in NAMES:
        raise ValueError(f"pair: {name!r} is unknown; known are {', '.join(NAMES)}")
    if made := {**MADE, **OTHERS}.get(name):
        network, how, dataset, row = made
        models = (load_model(network), compress.load(network, how))
        return difftest.ModelPair(*models), dataset, row
    chosen = PUBLISHED[name]
    if pairs_dir is None:
        raise ValueError(
            f"{name} is a published pair: give the folder of {chosen.original} and "
            f"{chosen.compressed} as --pairs_dir"
        )
    files = [
        load_model(Path(pairs_dir) / file, chosen.preprocess)
        for file in (chosen.original, chosen.compressed)
    ]
    return difftest.ModelPair(*files), chosen.dataset, chosen.row


def commands(name: str) -> tuple[str, str]:
    """The commands by which a pair's network and twin were made, as their cards have them.

    Args:
      name: Of `NAMES`; a published pair has none.

    Raises:
      FileNotFoundError: For a twin that has not been made.
    """
    if name in PUBLISHED:
        return "", ""
    network, how, *_ = {**MADE, **OTHERS}[name]
    card = json.loads(compress.card_path(network, how).read_text())
    return zoo.load(network).card["command"], card["command"]


def of_files(
    original: str,
    compressed: str,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    channels_first: bool = False,
) -> tuple[difftest.ModelPair, str]:
    """Loads a pair of the user's own, such as one of ImageNet's.

    Args:
      original: File of `difftest.load.SUFFIXES`, or a name of the zoo.
      compressed: The same.
      mean: Subtracted from pixels of 0 to 255 before either model, one number or one a channel;
        with `std` empty too, pixels are divided by 255.
      std: What they are divided by then.
      channels_first: Files of ONNX take `[B, C, H, W]`, as those made by PyTorch do.

    Returns:
      The pair, and a title of the files' names.

    Raises:
      FileNotFoundError: For a file that is not there.
      ValueError: For a file of another kind, or one of `mean` and `std` alone.
    """
    if bool(mean) != bool(std):
        raise ValueError(f"mean is {list(mean)}, std is {list(std)}; give both, or neither")
    # None, not a division: a file that takes whole numbers may be given pixels as they are.
    preprocess = Normalise(mean, std) if mean else None

    def turned(x: Any) -> Any:
        return (preprocess or Normalise(0, 255))(x).transpose(0, 3, 1, 2)

    def is_turned(path: str) -> bool:
        return channels_first and Path(path).suffix.lower() == ".onnx"

    models = [
        load_model(path, turned if is_turned(path) else preprocess)
        for path in (original, compressed)
    ]
    return difftest.ModelPair(*models), f"{Path(original).stem} and {Path(compressed).stem}"


def titled(name: str, row: Any) -> str:
    """Network and compression of a row of table 4, or the pair's name where it has no row."""
    if row is None:
        return name
    return row if isinstance(row, str) else " ".join(str(part) for part in tuple(row)[:2])


def images_of(
    dataset: str, data_dir: str | None = None, file: str | None = None, most: int | None = None
) -> Images:
    """The images of a data set, the test images of CIFAR-10 from a file where one is given.

    Args:
      dataset: Its name.
      data_dir: Folder searched first for data sets.
      file: An .npz file of test_images and test_labels: exact pixels of CIFAR-10 instead of JPEG
        re-encodings, which cost a network that was trained on exact ones 10 points of accuracy.
      most: Of a larger test set so many are drawn, always the same.

    Raises:
      ValueError: For a file without such images.
      FileNotFoundError: For a data set that is nowhere.
    """
    pixels: Any
    training = None
    if file is None or dataset != "cifar10":
        whole = data.load(dataset, data_dir)
        pixels, labels, training = whole.test_images, whole.test_labels, whole.train_images
        jpeg = " (JPEG re-encodings)" if "JPEG" in whole.note else ""
        words = f"{whole.name}{jpeg}, test set"
    else:
        try:
            with open(file, "rb") as raw, np.load(raw, allow_pickle=False) as arrays:
                pixels, labels = arrays["test_images"], arrays["test_labels"]
        except (KeyError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{file}: no test_images and test_labels to be read ({reason})"
            ) from None
        words = f"{dataset}, {len(pixels):,} test images of {Path(file).name}"
    total = len(pixels)
    if most is not None and most < total:
        chosen = np.sort(np.random.default_rng(0).permutation(total)[:most])
        # Indexed before they are converted: of a folder, only these are decoded.
        pixels, labels = pixels[chosen], np.asarray(labels)[chosen]
        words += f", {most:,} of {total:,} images"
    return Images(np.asarray(pixels), np.asarray(labels), words, training)


def labels_of(pair: difftest.ModelPair, images: Any) -> list[np.ndarray]:
    """The labels that the original and the compressed model give, two arrays int `[N]`.

    Args:
      pair: The models.
      images: uint8 `[N, H, W, C]` with N at least 1, indexed like an array, a part at a time.
    """
    size = 256
    parts = [
        [answers.argmax(axis=1) for answers in pair.probabilities(images[at : at + size])]
        for at in range(0, len(images), size)
    ]
    return [np.concatenate(labels) for labels in zip(*parts, strict=True)]


def probe(answers: Sequence[Any]) -> str:
    """A digest of models' answers to some images: other weights, another digest.

    Args:
      answers: Probabilities `[N, K]`, one array a model.
    """
    return digest([np.rint(1000 * np.asarray(each)) for each in answers])
